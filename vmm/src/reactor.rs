//! The event loop: one epoll instance, served by one thread.
//!
//! A [`Poller`] is a cheap handle that registers descriptors for one *source* (a device, the control server …). Each registration
//! carries a token of the source's choosing; a ready descriptor comes back as `(source, token, readiness)`. Registration is level
//! triggered and may be done from any thread.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

/// What a descriptor is ready for, or is to be watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// There is something to read (as an event: also the peer's half-close).
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
    /// Error or hang-up. Always reported, never asked for.
    pub hang_up: bool,
}

impl Readiness {
    /// Watch for reading.
    pub const READ: Self = Self { readable: true, writable: false, hang_up: false };
    /// Watch for writing.
    pub const WRITE: Self = Self { readable: false, writable: true, hang_up: false };
    /// Watch for both.
    pub const BOTH: Self = Self { readable: true, writable: true, hang_up: false };
    /// Watch for errors and hang-ups only.
    pub const NOTHING: Self = Self { readable: false, writable: false, hang_up: false };

    fn flags(self) -> EventFlags {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN | EventFlags::RDHUP, self.readable);
        flags.set(EventFlags::OUT, self.writable);
        flags
    }

    fn from_flags(flags: EventFlags) -> Self {
        Self {
            readable: flags.intersects(EventFlags::IN | EventFlags::RDHUP),
            writable: flags.contains(EventFlags::OUT),
            hang_up: flags.intersects(EventFlags::ERR | EventFlags::HUP),
        }
    }
}

/// Registers descriptors on behalf of one source.
#[derive(Clone)]
pub struct Poller {
    epoll: Arc<OwnedFd>,
    source: u32,
}

impl Poller {
    /// Watches `fd`; events carry `token`.
    pub fn add(&self, fd: impl AsFd, token: u32, interest: Readiness) -> io::Result<()> {
        Ok(epoll::add(&*self.epoll, fd, self.data(token), interest.flags())?)
    }

    /// Changes what a watched `fd` is watched for.
    pub fn modify(&self, fd: impl AsFd, token: u32, interest: Readiness) -> io::Result<()> {
        Ok(epoll::modify(&*self.epoll, fd, self.data(token), interest.flags())?)
    }

    /// Stops watching `fd`.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&*self.epoll, fd)?)
    }

    fn data(&self, token: u32) -> EventData {
        EventData::new_u64(u64::from(self.source) << 32 | u64::from(token))
    }
}

/// One ready descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Whose registration it is: the number given to [`Reactor::poller`].
    pub source: u32,
    /// The registration's token.
    pub token: u32,
    /// What it is ready for.
    pub readiness: Readiness,
}

/// The epoll instance itself. As a descriptor it is readable while something is ready, so one reactor can wait for another.
pub struct Reactor {
    epoll: Arc<OwnedFd>,
    ready: Vec<epoll::Event>,
}

impl Reactor {
    /// Most events taken per round, so that no source starves another.
    const ROUND: usize = 32;

    /// A reactor that watches nothing yet.
    pub fn new() -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
        Ok(Self { epoll, ready: Vec::with_capacity(Self::ROUND) })
    }

    /// A handle for `source`.
    pub fn poller(&self, source: u32) -> Poller {
        Poller { epoll: Arc::clone(&self.epoll), source }
    }

    /// Waits until something is ready and returns one round of events. A signal gives an empty round.
    pub fn wait(&mut self) -> io::Result<impl Iterator<Item = Event> + '_> {
        self.round(true)
    }

    /// One round of events, for which it may `wait`.
    pub fn round(&mut self, wait: bool) -> io::Result<impl Iterator<Item = Event> + '_> {
        let patience = (!wait).then_some(Timespec { tv_sec: 0, tv_nsec: 0 });
        self.ready.clear();
        match epoll::wait(&*self.epoll, rustix::buffer::spare_capacity(&mut self.ready), patience.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.ready.iter().map(|event| {
            let (flags, data) = (event.flags, event.data);
            Event {
                source: (data.u64() >> 32) as u32,
                token: data.u64() as u32,
                readiness: Readiness::from_flags(flags),
            }
        }))
    }
}

impl AsFd for Reactor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
