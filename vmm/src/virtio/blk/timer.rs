//! A timer in the event loop that costs nothing until it is first needed.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::reactor::{Poller, Readiness};

/// Longest time it is armed for, nanoseconds: a minute. Whoever needs longer arms it again.
const LONGEST: u64 = 60_000_000_000;

/// The timer.
#[derive(Default)]
pub struct Timer {
    fd: Option<OwnedFd>,
}

impl Timer {
    /// Ready under `token` in `wait` nanoseconds, or earlier if that is long; only once.
    pub fn arm(&mut self, poller: &Poller, token: u32, wait: u64) -> io::Result<()> {
        let fd = match &self.fd {
            Some(fd) => fd,
            None => {
                let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
                let fd = timerfd_create(TimerfdClockId::Monotonic, flags)?;
                poller.add(&fd, token, Readiness::READ)?;
                self.fd.insert(fd)
            }
        };
        let wait = Duration::from_nanos(wait.clamp(1, LONGEST));
        let it_value = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        timerfd_settime(fd, TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value })?;
        Ok(())
    }

    /// It was ready: it no longer is.
    pub fn acknowledge(&self) {
        if let Some(fd) = &self.fd {
            // Nothing to read: a spurious event.
            let _ = rustix::io::read(fd, &mut [0; 8]);
        }
    }

    /// Forgets it.
    pub fn disarm(&mut self, poller: &Poller) {
        if let Some(fd) = self.fd.take() {
            // Closing it removes it too; this is for a duplicate in some other process.
            let _ = poller.remove(&fd);
        }
    }
}
