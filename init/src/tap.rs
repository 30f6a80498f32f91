//! TAP interfaces that stay when nobody holds them open, so that the process that serves one may die and come back.

use std::{fs::File, io, os::fd::AsRawFd as _};

use crate::error::{Context as _, Result};

/// Makes a persistent TAP interface (Ethernet frames, no packet information header). One that is there already stays.
///
/// # Errors
/// When the kernel refuses: the module `tun` must be loaded.
pub fn create_persistent(name: &str) -> Result<()> {
    let what = || format!("make the TAP interface {name}");
    let tun = File::options().read(true).write(true).open("/dev/net/tun").what(what)?;
    // SAFETY: ifreq is plain data; all zeros is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG)).what(what);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    let done = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if done < 0 {
        return Err(io::Error::last_os_error()).what(what);
    }
    // SAFETY: TUNSETPERSIST takes its argument by value.
    let done = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, 1_u64) };
    if done < 0 { Err(io::Error::last_os_error()).what(what) } else { Ok(()) }
}
