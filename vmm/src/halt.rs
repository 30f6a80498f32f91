//! When to look whether the guest has halted. A halted guest tells nobody: its processors sleep with interrupts off. But its kernel's last words
//! say that it is about to, so the processors are looked at when they went by on the console, and a few times more until they have got there.
//!
//! The words prove nothing (any program in the guest may print them); a look pauses the guest for less than a millisecond.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use vmm_sys_util::eventfd::EventFd;

use crate::event;
use crate::reactor::{Poller, Readiness};

/// The words went by.
const SAID: u32 = 0;
/// It is time to look again.
const AGAIN: u32 = 1;
/// The first pause between two looks, nanoseconds; each is twice the one before.
const FIRST_PAUSE_NS: i64 = 8_000_000;
/// Looks after the first: 4 s in all.
const LOOKS: u32 = 9;

/// The schedule of looks.
pub struct HaltWatch {
    said: EventFd,
    timer: OwnedFd,
    /// Looks that were had since the words went by.
    looks: u32,
}

impl HaltWatch {
    /// Waits for `said` to be written.
    pub fn new(said: EventFd, poller: &Poller) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        poller.add(event::borrow(&said), SAID, Readiness::READ)?;
        poller.add(&timer, AGAIN, Readiness::READ)?;
        Ok(Self { said, timer, looks: 0 })
    }

    /// An event of the poller's came: the processors are to be looked at. If they have not halted, [`HaltWatch::again`].
    pub fn event(&mut self, token: u32) {
        match token {
            SAID => {
                let _ = self.said.read(); // fails only if nothing is pending
                self.looks = 0;
            }
            _ => {
                let _ = rustix::io::read(&self.timer, &mut [0; 8]); // fails only if it was set anew
            }
        }
    }

    /// Plans the next look, if there is to be one.
    pub fn again(&mut self) {
        if self.looks < LOOKS {
            let pause = FIRST_PAUSE_NS << self.looks;
            self.looks += 1;
            let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
            let value = Timespec { tv_sec: pause / 1_000_000_000, tv_nsec: pause % 1_000_000_000 };
            let spec = Itimerspec { it_interval: zero, it_value: value };
            // Cannot fail: the timer is valid and so is the time.
            let _ = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::Reactor;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[test]
    fn words_are_followed_by_some_looks_and_no_more() {
        let mut reactor = Reactor::new().unwrap();
        let said = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut watch = HaltWatch::new(said.try_clone().unwrap(), &reactor.poller(0)).unwrap();
        said.write(1).unwrap();
        let mut next = || reactor.wait().unwrap().next().unwrap().token;
        let token = next();
        assert_eq!(token, SAID);
        watch.event(token);
        watch.again();
        let token = next();
        assert_eq!(token, AGAIN);
        watch.event(token);
        watch.looks = LOOKS;
        watch.again();
        assert_eq!(reactor.round(false).unwrap().count(), 0);
    }
}
