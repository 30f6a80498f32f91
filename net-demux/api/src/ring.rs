//! The ring: a pair of single-producer single-consumer queues of Ethernet frames in one shared, sealed memfd, between a sliver's
//! machine and net-demux.
//!
//! Layout of the memory, in 64-bit words: one header page (magic, capacity, and for each direction the producer's and the consumer's
//! index and two wake-up wishes, each on a cache line of its own), then the data of guest → demux, then that of demux →
//! guest. A record is one word with the frame's length in bytes, then the frame, padded to a whole word. Indices count
//! bytes from the ring's creation, never wrap, and are always multiples of 8.
//!
//! Invariants:
//! - *The other side is hostile.* Each index, length and wish of the peer is read once into a local and checked before use; each side
//!   keeps its own indices in its own memory and only publishes them. A peer that breaks the rules makes the endpoint
//!   [`broken`](Endpoint::broken): nothing more is sent or received, nobody panics. Shared memory is only ever touched through
//!   atomics, so that a peer that writes while we read gives strange bytes, not undefined behaviour.
//! - *Nothing here waits.* The two events are Unix sockets, not eventfds: a compromised machine could clear an eventfd's
//!   `O_NONBLOCK`, fill its counter, and so hang net-demux in `write`. `MSG_DONTWAIT` cannot be taken back by the other side.
//! - *Indices live in the memory*, so a new net-demux continues where a killed one stopped. At worst one frame is seen twice.
//! - After creation only `sendto` and `recvfrom` are called (for seccomp filters), `fcntl` by [`Endpoint::fds`], and `munmap` and
//!   `close` on drop.
//!
//! Use: poll [`Endpoint::event`] for reading; when it is ready, [`Endpoint::drain_event`], then [`Endpoint::recv`] until `None` (or
//! remember to come back), and retry what was [`Full`]. The peer wakes us only if `recv` said `None` or `send` said `Full` since.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::mapping::Mapping;

/// Longest frame, bytes: 1500 of payload and an Ethernet header, without its checksum. There are no offloads.
pub const MAX_FRAME: usize = 1514;

/// Bytes each direction holds by default: 42 of the longest frames.
pub const DEFAULT_CAPACITY: usize = 64 * 1024;

/// Largest capacity accepted: what a hostile machine can make net-demux map.
pub const MAX_CAPACITY: usize = 1024 * 1024;

const MIN_CAPACITY: usize = 4096;
const HEADER: usize = 4096;
const WORD: usize = 8;
/// "cmnring" and the layout's version, 1.
const MAGIC: u64 = u64::from_le_bytes(*b"cmnring\x01");
const REQUIRED_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Word offsets in the header page.
const MAGIC_WORD: usize = 0;
const CAPACITY_WORD: usize = 1;
const DIRECTION_WORDS: [usize; 2] = [64, 128];
const TAIL: usize = 0;
const HEAD: usize = 8;
const WANTS_DATA: usize = 16;
const WANTS_ROOM: usize = 24;

const GUEST_TO_DEMUX: usize = 0;
const DEMUX_TO_GUEST: usize = 1;

/// The queue has no room for this frame. The event will become ready when half of it is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the ring is full: send again when its event is ready")]
pub struct Full;

/// Why a ring handed in by a machine is refused.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// A system call failed.
    #[error("cannot open the ring ({what}): {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The memory could be shrunk under us.
    #[error(
        "the ring's memory is not a memfd sealed against shrinking, growing and new seals (seals: {0:#x})"
    )]
    NotSealed(u32),
    /// The memory's size is not a header page and twice a permitted power of two.
    #[error("the ring's memory has {0} bytes, which no ring has")]
    BadSize(u64),
    /// An event is not a Unix sequenced-packet socket.
    #[error("the ring's event {0:?} is not a Unix SOCK_SEQPACKET socket")]
    BadEvent(&'static str),
    /// The contents are not a ring's, or were destroyed.
    #[error("the ring is corrupt ({0}): its machine must be restarted")]
    Corrupt(&'static str),
}

impl RingError {
    fn io(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::Io { what, source: errno.into() }
    }
}

/// net-demux's descriptors of a ring, in the order in which they travel.
#[derive(Debug)]
pub struct RingFds {
    /// The sealed memory.
    pub memory: OwnedFd,
    /// Ready when the guest sent, or made room.
    pub sent: OwnedFd,
    /// Written to tell the machine that its guest may receive, or has room again.
    pub room: OwnedFd,
}

impl RingFds {
    /// From descriptors in the order in which they travel; `None` unless there are exactly three.
    pub fn from_vec(fds: Vec<OwnedFd>) -> Option<Self> {
        let [memory, sent, room] = <[OwnedFd; 3]>::try_from(fds).ok()?;
        Some(Self { memory, sent, room })
    }

    /// Borrowed, in the order in which they travel.
    pub fn as_array(&self) -> [BorrowedFd<'_>; 3] {
        [self.memory.as_fd(), self.sent.as_fd(), self.room.as_fd()]
    }
}

/// Makes rings.
#[derive(Debug)]
pub struct Ring;

impl Ring {
    /// A new ring of the default capacity: the machine's endpoint, and what net-demux opens.
    pub fn create() -> io::Result<(Endpoint, RingFds)> {
        Self::with_capacity(DEFAULT_CAPACITY)
    }

    /// A new ring that holds `capacity` bytes each way: a power of two from 4096 to [`MAX_CAPACITY`].
    pub fn with_capacity(capacity: usize) -> io::Result<(Endpoint, RingFds)> {
        if !permitted(capacity) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a ring's capacity is a power of two, 4 KiB to 1 MiB",
            ));
        }
        let memory =
            rustix::fs::memfd_create("commonage-ring", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&memory, (HEADER + 2 * capacity) as u64)?;
        rustix::fs::fcntl_add_seals(&memory, REQUIRED_SEALS)?;
        let map = Mapping::new(memory.as_fd(), HEADER + 2 * capacity)?;
        let words = map.words();
        words[CAPACITY_WORD].store(capacity as u64, Ordering::Relaxed);
        words[MAGIC_WORD].store(MAGIC, Ordering::Release);
        let (notify, sent) = event_pair()?;
        let (room, event) = event_pair()?;
        let fds = RingFds { memory, sent, room };
        let peer = duplicate(&fds)?;
        let tx = Half::new(GUEST_TO_DEMUX, 0, 0);
        let rx = Half::new(DEMUX_TO_GUEST, 0, 0);
        let endpoint = Endpoint {
            map,
            mask: capacity - 1,
            tx,
            rx,
            notify,
            event,
            peer: Some(peer),
            broken: false,
            oversized: 0,
        };
        Ok((endpoint, fds))
    }
}

/// One direction as this side knows it, bytes since creation.
#[derive(Debug, Clone, Copy)]
struct Half {
    /// First word of its header.
    header: usize,
    /// Which of the two data areas.
    area: usize,
    /// Our own index: the tail of what we send, the head of what we receive. The shared copy is never read again.
    ours: u64,
    /// The peer's index when last read and found valid.
    theirs: u64,
}

impl Half {
    fn new(direction: usize, ours: u64, theirs: u64) -> Self {
        Self { header: DIRECTION_WORDS[direction], area: direction, ours, theirs }
    }
}

/// One side of a ring.
#[derive(Debug)]
pub struct Endpoint {
    map: Mapping,
    /// Capacity minus 1, bytes.
    mask: usize,
    tx: Half,
    rx: Half,
    /// Written to wake the peer.
    notify: OwnedFd,
    /// Ready when the peer woke us.
    event: OwnedFd,
    /// The machine's side keeps net-demux's descriptors, for the next net-demux.
    peer: Option<RingFds>,
    broken: bool,
    oversized: u64,
}

impl Endpoint {
    /// net-demux's side of a machine's ring, new or in use by an earlier net-demux that is gone. Both sides are woken once, because
    /// the earlier one may have died owing a wake-up.
    pub fn open(fds: RingFds) -> Result<Self, RingError> {
        let seals = rustix::fs::fcntl_get_seals(&fds.memory).map_err(|_| RingError::NotSealed(0))?;
        if !seals.contains(REQUIRED_SEALS) {
            return Err(RingError::NotSealed(seals.bits()));
        }
        let size = rustix::fs::fstat(&fds.memory).map_err(RingError::io("fstat of its memory"))?.st_size;
        let size = u64::try_from(size).unwrap_or(0);
        let capacity =
            usize::try_from(size).ok().and_then(|size| size.checked_sub(HEADER)).map(|both| both / 2);
        let Some(capacity) = capacity.filter(|&c| permitted(c) && (HEADER + 2 * c) as u64 == size) else {
            return Err(RingError::BadSize(size));
        };
        check_event(&fds.sent, "sent")?;
        check_event(&fds.room, "room")?;
        let map = Mapping::new(fds.memory.as_fd(), HEADER + 2 * capacity)
            .map_err(|source| RingError::Io { what: "mmap of its memory", source })?;
        let words = map.words();
        if words[MAGIC_WORD].load(Ordering::Acquire) != MAGIC {
            return Err(RingError::Corrupt("its first word is not a ring's"));
        }
        if words[CAPACITY_WORD].load(Ordering::Relaxed) != capacity as u64 {
            return Err(RingError::Corrupt("its capacity does not fit its size"));
        }
        // Our own indices lie in memory that the machine can write, so even they are only believed if they are consistent.
        let half = |direction: usize, ours: usize, theirs: usize| {
            let header = DIRECTION_WORDS[direction];
            let half = Half::new(
                direction,
                words[header + ours].load(Ordering::Acquire),
                words[header + theirs].load(Ordering::Acquire),
            );
            let used = if ours == TAIL {
                half.ours.wrapping_sub(half.theirs)
            } else {
                half.theirs.wrapping_sub(half.ours)
            };
            let aligned = (half.ours | half.theirs).is_multiple_of(WORD as u64);
            if used <= capacity as u64 && aligned {
                Ok(half)
            } else {
                Err(RingError::Corrupt("its indices contradict each other"))
            }
        };
        let rx = half(GUEST_TO_DEMUX, HEAD, TAIL)?;
        let tx = half(DEMUX_TO_GUEST, TAIL, HEAD)?;
        // Our own first wake-up is owed too: if the guest sent while nobody listened, only the wish below will tell us.
        words[rx.header + WANTS_DATA].store(1, Ordering::SeqCst);
        let endpoint = Self {
            map,
            mask: capacity - 1,
            tx,
            rx,
            notify: fds.room,
            event: fds.sent,
            peer: None,
            broken: false,
            oversized: 0,
        };
        endpoint.wake_peer();
        Ok(endpoint)
    }

    /// Duplicates of net-demux's descriptors, to hand out again. Only the machine's side has them.
    pub fn fds(&self) -> io::Result<RingFds> {
        let peer = self.peer.as_ref().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                "only the machine's side of a ring can hand out its descriptors",
            )
        })?;
        duplicate(peer)
    }

    /// Ready for reading when the peer sent something or made room.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Takes back the event's readiness. Call before looking for frames, not after. False when the event is over (the peer closed
    /// it, in part or whole): it stays ready for ever then, so whoever polls must stop polling it.
    pub fn drain_event(&self) -> bool {
        let mut byte = [0u8; 8];
        // Bounded, because a hostile peer can write as fast as we read; what stays only wakes us again.
        for _ in 0..64 {
            match rustix::net::recv(&self.event, &mut byte[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return false,
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return e == Errno::AGAIN,
            }
        }
        true
    }

    /// True once the peer broke the ring's rules. It stays so: nothing is sent or received any more.
    pub fn broken(&self) -> bool {
        self.broken
    }

    /// Frames that [`send`](Self::send) discarded for being empty or longer than [`MAX_FRAME`].
    pub fn oversized(&self) -> u64 {
        self.oversized
    }

    /// Queues a frame and wakes the peer if it waits. A frame that is empty or longer than [`MAX_FRAME`] is discarded and counted; a
    /// broken ring is always full.
    pub fn send(&mut self, frame: &[u8]) -> Result<(), Full> {
        if frame.is_empty() || frame.len() > MAX_FRAME {
            self.oversized += 1;
            return Ok(());
        }
        let need = record_size(frame.len());
        if self.broken || !(self.room(need) || self.room_after_asking(need)) {
            return Err(Full);
        }
        let mut position = self.tx.ours;
        let mut put = |value: u64| {
            self.word(self.tx.area, position).store(value, Ordering::Relaxed);
            position = position.wrapping_add(WORD as u64);
        };
        put(frame.len() as u64);
        let (whole, rest) = frame.as_chunks::<WORD>();
        whole.iter().for_each(|chunk| put(u64::from_ne_bytes(*chunk)));
        if !rest.is_empty() {
            let mut last = [0; WORD];
            last[..rest.len()].copy_from_slice(rest);
            put(u64::from_ne_bytes(last));
        }
        self.tx.ours = position;
        // Release: the record is visible before the index that covers it.
        self.header(self.tx, TAIL).store(position, Ordering::Release);
        // Pairs with the fence in `recv`: either we see the peer's wish, or the peer sees our index.
        fence(Ordering::SeqCst);
        self.wake_if_wished(self.tx, WANTS_DATA);
        Ok(())
    }

    /// Takes the next frame into `buf` and tells its length, in bytes; `None` when there is none. `buf` should hold [`MAX_FRAME`] bytes;
    /// a longer frame is cut to it.
    pub fn recv(&mut self, buf: &mut [u8]) -> Option<usize> {
        if self.broken {
            return None;
        }
        if self.available() == 0 {
            self.read_tail()?;
        }
        if self.available() == 0 {
            self.header(self.rx, WANTS_DATA).store(1, Ordering::Relaxed);
            // Pairs with the fence in `send`.
            fence(Ordering::SeqCst);
            self.read_tail()?;
            if self.available() == 0 {
                return None;
            }
            self.header(self.rx, WANTS_DATA).store(0, Ordering::Relaxed);
        }
        let mut position = self.rx.ours;
        let length = self.word(self.rx.area, position).load(Ordering::Relaxed);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length == 0 || length > MAX_FRAME || record_size(length) > self.available() {
            self.broken = true;
            return None;
        }
        let kept = length.min(buf.len());
        let (whole, rest) = buf[..kept].as_chunks_mut::<WORD>();
        let mut take = || {
            position = position.wrapping_add(WORD as u64);
            self.word(self.rx.area, position).load(Ordering::Relaxed).to_ne_bytes()
        };
        whole.iter_mut().for_each(|chunk| *chunk = take());
        if !rest.is_empty() {
            rest.copy_from_slice(&take()[..rest.len()]);
        }
        self.rx.ours = self.rx.ours.wrapping_add(record_size(length));
        // Release: the bytes are read before the index that lets the peer overwrite them.
        self.header(self.rx, HEAD).store(self.rx.ours, Ordering::Release);
        // A peer that waits for room is woken once half the queue is free, so that it then sends many. Pairs with the fence in
        // `room_after_asking`; `available` leaves out what came since the tail was last read, which at worst wakes early.
        fence(Ordering::SeqCst);
        if self.available() <= self.capacity() / 2 {
            self.wake_if_wished(self.rx, WANTS_ROOM);
        }
        Some(kept)
    }

    fn capacity(&self) -> u64 {
        self.mask as u64 + 1
    }

    fn header(&self, half: Half, field: usize) -> &AtomicU64 {
        &self.map.words()[half.header + field]
    }

    /// The word of a data area at a byte position. The mask keeps it in bounds whatever the position.
    fn word(&self, area: usize, position: u64) -> &AtomicU64 {
        let offset = position as usize & self.mask & !(WORD - 1);
        &self.map.words()[(HEADER + area * (self.mask + 1) + offset) / WORD]
    }

    /// Bytes received and not yet taken.
    fn available(&self) -> u64 {
        self.rx.theirs.wrapping_sub(self.rx.ours)
    }

    fn room(&self, need: u64) -> bool {
        self.capacity() - self.tx.ours.wrapping_sub(self.tx.theirs) >= need
    }

    fn read_tail(&mut self) -> Option<()> {
        let tail = self.header(self.rx, TAIL).load(Ordering::Acquire);
        if tail.wrapping_sub(self.rx.ours) > self.capacity() || !tail.is_multiple_of(WORD as u64) {
            self.broken = true;
            return None;
        }
        self.rx.theirs = tail;
        Some(())
    }

    fn read_head(&mut self) -> bool {
        let head = self.header(self.tx, HEAD).load(Ordering::Acquire);
        if self.tx.ours.wrapping_sub(head) > self.capacity() || !head.is_multiple_of(WORD as u64) {
            self.broken = true;
            return false;
        }
        self.tx.theirs = head;
        true
    }

    fn room_after_asking(&mut self, need: u64) -> bool {
        if !self.read_head() {
            return false;
        }
        if self.room(need) {
            return true;
        }
        self.header(self.tx, WANTS_ROOM).store(1, Ordering::Relaxed);
        // Pairs with the fence at the end of `recv`.
        fence(Ordering::SeqCst);
        self.read_head() && self.room(need)
    }

    fn wake_if_wished(&self, half: Half, wish: usize) {
        let wish = self.header(half, wish);
        if wish.load(Ordering::Relaxed) != 0 {
            // Cleared before the wake-up: whoever is woken wishes again if it finds nothing.
            wish.store(0, Ordering::Relaxed);
            self.wake_peer();
        }
    }

    fn wake_peer(&self) {
        // A full socket holds wake-ups enough, a closed one has nobody to wake.
        let _ = rustix::net::send(&self.notify, &[1], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}

fn permitted(capacity: usize) -> bool {
    capacity.is_power_of_two() && (MIN_CAPACITY..=MAX_CAPACITY).contains(&capacity)
}

/// Bytes a frame of `length` takes in the queue.
fn record_size(length: usize) -> u64 {
    (WORD + length.next_multiple_of(WORD)) as u64
}

fn event_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn check_event(fd: &OwnedFd, name: &'static str) -> Result<(), RingError> {
    let unix = rustix::net::sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX);
    let packets = rustix::net::sockopt::socket_type(fd) == Ok(SocketType::SEQPACKET);
    // One that listens would be ready for ever and never say anything.
    let listens = rustix::net::sockopt::socket_acceptconn(fd) != Ok(false);
    if unix && packets && !listens { Ok(()) } else { Err(RingError::BadEvent(name)) }
}

fn duplicate(fds: &RingFds) -> io::Result<RingFds> {
    Ok(RingFds { memory: fds.memory.try_clone()?, sent: fds.sent.try_clone()?, room: fds.room.try_clone()? })
}

#[cfg(test)]
#[path = "ring_test.rs"]
mod test;
