//! What needs `unsafe`: code between fork and exec, crediting entropy, and how the allocator behaves.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// Bytes of entropy credited by one call; the kernel's pool holds no more than 32 anyway.
const ENTROPY_CHUNK: usize = 64;

/// `_IOW('R', 0x03, int[2])`, linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 0x07)`, linux/random.h.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// The command will lead a session of its own and receive all signals; with `terminal` its standard input becomes the session's controlling terminal.
pub fn in_new_session(command: &mut Command, terminal: bool) {
    commonage_init::signals::receive_in(command);
    let between = move || {
        rustix::process::setsid()?;
        if terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        Ok(())
    };
    // SAFETY: the closure makes two plain system calls, which are async-signal-safe, and touches no memory but its own copy of a
    // bool; making an `io::Error` from an errno does not allocate.
    unsafe { command.pre_exec(between) };
}

/// `struct rand_pool_info` with room for one chunk.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; ENTROPY_CHUNK],
}

/// All threads share one heap. The allocator would otherwise give each its own, which is memory of a sliver's that it does not share with others.
/// Call it before any thread is started.
pub fn share_one_heap() {
    // SAFETY: sets a number inside the allocator, which is called by this thread alone: there is no other yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Mixes `bytes` into the kernel's random pool, credits them in full, and makes the generator start again from the pool: whatever
/// it gave out before (to a machine of which this one may be a copy) says nothing about what it gives from now on.
///
/// `random` is `/dev/urandom`.
///
/// # Errors
/// It is another file, or the caller is not root.
pub fn credit_entropy(random: &File, bytes: &[u8]) -> io::Result<()> {
    for chunk in bytes.chunks(ENTROPY_CHUNK) {
        let mut info = RandPoolInfo { entropy_count: 0, buf_size: 0, buf: [0; ENTROPY_CHUNK] };
        // At most ENTROPY_CHUNK, so neither conversion can fail.
        let len = libc::c_int::try_from(chunk.len()).unwrap_or(0);
        info.buf_size = len;
        info.entropy_count = len.saturating_mul(8);
        for (to, from) in info.buf.iter_mut().zip(chunk) {
            *to = *from;
        }
        // SAFETY: `random` is open; `info` has the kernel's layout (two ints, then `buf_size` readable bytes) and outlives the
        // call, which only reads it.
        if unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: `random` is open; the request takes no argument.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
