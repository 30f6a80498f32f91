//! Signals as something to poll (signalfd), and the mask and dispositions that children must not inherit.

use std::{
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::Command,
};

use crate::error::{Context as _, Result};

/// Signals of this process, read instead of handled. Pending ones of the same number are one.
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals in this thread and receives them here. Call it before any thread is started. PID 1 gets them
    /// too: a blocked signal is never ignored.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open(signals: &[i32]) -> Result<Self> {
        let what = || "receive signals".into();
        let set = set(signals);
        // SAFETY: `set` is initialised; the old mask is not asked for.
        if unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } < 0 {
            return Err(io::Error::last_os_error()).what(what);
        }
        // SAFETY: `set` is initialised; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).what(what);
        }
        // SAFETY: the kernel just made this descriptor for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The numbers of the signals that have come, without waiting.
    pub fn read(&self) -> Vec<i32> {
        let mut numbers = Vec::new();
        let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
        // The first field, ssi_signo, is the number.
        while rustix::io::read(&self.0, &mut info) == Ok(info.len()) {
            let [a, b, c, d, ..] = info;
            numbers.extend(i32::try_from(u32::from_ne_bytes([a, b, c, d])));
        }
        numbers
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Lets the child of this command receive all signals, and be ended by them: what is blocked or ignored is inherited otherwise.
pub fn receive_in(command: &mut Command) {
    let receive = || {
        for signal in 1..=libc::SIGRTMAX() {
            // SAFETY: gives no handler; signal is async-signal-safe. SIGKILL, SIGSTOP and the C library's own are refused, and are as they should be.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        let none = set(&[]);
        // SAFETY: `none` is initialised; sigprocmask is async-signal-safe.
        match unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec this only makes async-signal-safe calls and does not allocate.
    unsafe { command.pre_exec(receive) };
}

/// Sends a signal to every process but this one and the kernel's.
pub fn send_to_all(signal: i32) {
    if rustix::process::getpid().is_init() {
        // SAFETY: plain system call; -1 means every process that PID 1 may signal, never itself. Only PID 1 comes here.
        unsafe { libc::kill(-1, signal) };
    }
}

fn set(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the whole set; sigaddset then changes an initialised set and refuses bad numbers.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn a_child_is_ended_by_what_its_parent_ignores() {
        // SAFETY: ignores a signal that nobody sends to this process.
        unsafe { libc::signal(libc::SIGUSR1, libc::SIG_IGN) };
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "kill -USR1 $$; echo survived"]);
        receive_in(&mut command);
        let output = command.output().unwrap();
        assert_eq!((output.status.signal(), output.stdout), (Some(libc::SIGUSR1), Vec::new()));
    }
}
