//! Loads another kernel to be started by [`crate::power::end`] (`kexec_file_load`, system call 320).

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use crate::error::{Context as _, Result};

/// Loads a kernel and its initramfs. Both descriptors must be of regular files.
///
/// # Errors
/// When the kernel refuses: `ENOEXEC` is no kernel image, `EPERM` a locked-down (Secure Boot) machine.
pub fn load(kernel: BorrowedFd<'_>, initramfs: BorrowedFd<'_>, cmdline: &str) -> Result<()> {
    let load = || {
        let cmdline = CString::new(cmdline).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let cmdline = cmdline.as_bytes_with_nul();
        // SAFETY: the descriptors are borrowed for the call; the kernel reads `cmdline.len()` bytes of `cmdline`, which
        // includes the zero byte, and keeps no pointer.
        let done = unsafe {
            libc::syscall(
                libc::SYS_kexec_file_load,
                kernel.as_raw_fd(),
                initramfs.as_raw_fd(),
                cmdline.len(),
                cmdline.as_ptr(),
                0_u64,
            )
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    load().what(|| "load the kernel for kexec".into())
}
