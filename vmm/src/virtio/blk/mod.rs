//! The block device (virtio 1.2, section 5.2): one raw image file, one queue, requests answered in the order in which they end.
//!
//! ```text
//!  queue ──► request::parse ──► rate limit ──► ring: io_uring on the image ──► used ring, interrupt
//!              refused: answered at once         │
//!                                                └ writes that find room in the page cache: done on the spot
//! ```
//!
//! Sectors have 512 bytes. Every request is parsed and checked against the image's size before the image is touched; what fails the
//! check is answered with IOERR or UNSUPP and harms nobody. A flush is answered when all writes answered before it was begun are durable. Discard
//! and write-zeroes punch holes, so that what the guest deletes is given back to the host.
//!
//! Invariants:
//! * A request is taken from the queue only when it can be begun: not while the rate limit holds back, nor while [`DEPTH`] requests or
//!   [`MOST_BYTES`] are under way. What is not taken stays in the queue, and so in a snapshot.
//! * A reset returns when nothing touches guest memory any more.
#![forbid(unsafe_code)]

mod policy;
mod request;
mod timer;

use std::fs::File;
use std::io;
use std::time::Instant;

use commonage_vmm_api::{BlockMetrics, RateLimit};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use self::policy::{Durability, Patience};
use self::request::{ID_BYTES, Request};
use self::timer::Timer;
use super::segments::split;
use super::{Active, Chain, DeviceError, Memory, VirtioDevice, pop, read_config_from};
use crate::rate_limit::Limiter;
use crate::reactor::Readiness;
use crate::uring::{DEPTH, Ended, Job, Ring};

/// Size of a sector, bytes.
pub const SECTOR: u64 = 512;
const QUEUE: usize = 0;
/// Descriptors: a read of 1 MiB into pages that lie anywhere is two requests, not three.
const QUEUE_SIZE: u16 = 256;
/// Data segments per request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes per segment.
const SIZE_MAX: u32 = 128 << 10;
/// Bytes per read or write that keeps to the limits announced.
const MAX_REQUEST: u64 = SEG_MAX as u64 * SIZE_MAX as u64;
/// Bytes under way that keep further requests waiting: what a reset or a pause has to wait for, less one request.
const MOST_BYTES: u64 = MAX_REQUEST;
/// Bytes served in one round of the event loop, so that a busy disk does not starve other devices.
const ROUND_BYTES: u64 = 8 << 20;
/// What a discard should be aligned to: a page of the host, less is not given back.
const PAGE: u32 = 4096;
/// Sectors per discard or write-zeroes request: 1 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
const ID: &[u8; ID_BYTES] = b"commonage-disk\0\0\0\0\0\0";

/// Tokens of the event loop.
const RING: u32 = 0;
const TIMER: u32 = 1;

/// Whose a job is.
struct Ticket {
    head: u16,
    status: GuestAddress,
    does: Does,
}

/// What a job does, to be counted when it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Does {
    Read(u64),
    Write(u64),
    Flush,
    Erase,
    Nothing,
}

impl Does {
    fn bytes(self) -> u64 {
        match self {
            Self::Read(bytes) | Self::Write(bytes) => bytes,
            Self::Flush | Self::Erase | Self::Nothing => 0,
        }
    }
}

/// Why no more requests are taken from the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// There are none.
    Empty,
    /// As much is under way as may be.
    Full,
    /// The rate limit, for so many nanoseconds.
    HeldBack(u64),
    /// Others want to be served too.
    Round,
}

/// The image, and what is under way.
struct Disk {
    ring: Ring<Ticket>,
    sectors: u64,
    durability: Durability,
    patience: Patience,
    /// Bytes under way in the ring.
    bytes: u64,
    metrics: BlockMetrics,
    /// The origin of all times.
    origin: Instant,
}

/// The block device.
pub struct Blk {
    disk: Disk,
    limiter: Option<Limiter>,
    timer: Timer,
    /// The next request is held back, and counted so.
    holding: bool,
    config: [u8; 60],
    active: Option<Active>,
}

impl Blk {
    /// A device for the image in `file`, open for reading and writing. A last incomplete sector is not shown to the guest.
    pub fn new(file: File, rate: Option<RateLimit>) -> io::Result<Self> {
        let sectors = file.metadata()?.len() / SECTOR;
        let disk = Disk {
            ring: Ring::new(file)?,
            sectors,
            durability: Durability::default(),
            patience: Patience::default(),
            bytes: 0,
            metrics: BlockMetrics::default(),
            origin: Instant::now(),
        };
        let limiter = rate.map(|rate| Limiter::new(rate, 0));
        let config = config(sectors);
        Ok(Self { disk, limiter, timer: Timer::default(), holding: false, config, active: None })
    }

    /// What it has done.
    pub fn metrics(&self) -> BlockMetrics {
        self.disk.metrics
    }

    /// Takes, begins and answers what there is.
    fn serve(&mut self) -> Result<(), DeviceError> {
        let mut round = Round { requests: 2 * u32::from(QUEUE_SIZE), bytes: ROUND_BYTES };
        loop {
            // A turn counts even if it takes nothing: in rings that overlap, asking for notifications changes what is available.
            round.requests = round.requests.saturating_sub(1);
            let pause = self.take(&mut round)?;
            let Some(active) = &mut self.active else { return Ok(()) };
            let answered = self.disk.answer(active)?;
            match pause {
                Pause::Empty if enable_notification(active)? => {}
                Pause::Full if answered => {}
                Pause::Empty | Pause::Full => break,
                Pause::HeldBack(wait) => {
                    self.timer.arm(&active.poller, TIMER, wait).map_err(host("arm a timer"))?;
                    break;
                }
                Pause::Round => {
                    if let Some(kick) = active.kicks.get(QUEUE) {
                        let _ = kick.write(1); // fails only if the counter is full: kicked already
                    }
                    break;
                }
            }
        }
        match &mut self.active {
            Some(active) => active.signal_used(QUEUE),
            None => Ok(()),
        }
    }

    /// Takes requests from the queue and begins them, until there is a reason not to.
    fn take(&mut self, round: &mut Round) -> Result<Pause, DeviceError> {
        let Self { disk, limiter, active, holding, .. } = self;
        let Some(Active { memory, queues, .. }) = active else { return Ok(Pause::Empty) };
        let Some(queue) = queues.get_mut(QUEUE).filter(|queue| queue.ready()) else {
            return Ok(Pause::Empty);
        };
        queue.disable_notification(memory).map_err(broken)?;
        loop {
            if disk.is_full() {
                return Ok(Pause::Full);
            }
            if round.requests == 0 || round.bytes == 0 {
                return Ok(Pause::Round);
            }
            let wait = limiter.as_mut().map_or(0, |limiter| limiter.wait(disk.now()));
            if wait > 0 {
                let waiting = queues.get(QUEUE).map(|queue| has_more(queue, memory)).transpose()?;
                if waiting != Some(true) {
                    return Ok(Pause::Empty);
                }
                disk.metrics.held_back += u64::from(!std::mem::replace(holding, true));
                return Ok(Pause::HeldBack(wait));
            }
            let Some(chain) = pop(queues, memory, QUEUE)? else { return Ok(Pause::Empty) };
            *holding = false;
            let head = chain.head_index();
            let bytes = match disk.begin(memory, chain)? {
                Begun::UnderWay(bytes) => bytes,
                Begun::Answered { written, bytes } => {
                    add_used(queues, memory, head, written)?;
                    bytes
                }
            };
            if let Some(limiter) = limiter {
                limiter.take(bytes);
            }
            round.requests -= 1;
            round.bytes = round.bytes.saturating_sub(bytes);
        }
    }
}

/// What is left of a round.
struct Round {
    requests: u32,
    bytes: u64,
}

/// What became of a request that was taken.
enum Begun {
    /// So many bytes are under way.
    UnderWay(u64),
    /// It is done: so many bytes were written into the chain, so many moved.
    Answered { written: u32, bytes: u64 },
}

impl Disk {
    /// Nanoseconds since the device was made.
    fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn is_full(&self) -> bool {
        self.ring.under_way() >= DEPTH || self.bytes >= MOST_BYTES
    }

    /// Begins what a chain asks for.
    fn begin(&mut self, memory: &Memory, chain: Chain<'_>) -> Result<Begun, DeviceError> {
        let unanswerable = Begun::Answered { written: 0, bytes: 0 };
        let head = chain.head_index();
        let Ok((output, input)) = split(chain) else { return Ok(unanswerable) };
        // The status is the last writable byte. Without it there is no way to answer.
        let Some((input, status)) = input.len().checked_sub(1).and_then(|at| input.split_at(at)) else {
            return Ok(unanswerable);
        };
        let Some((status, _)) = status.ranges().next() else { return Ok(unanswerable) };
        let request = match request::parse(memory, self.sectors, output, input) {
            Ok(request) => request,
            Err(refusal) => {
                return Ok(Begun::Answered {
                    written: write_status(memory, status, refusal.status(), 0),
                    bytes: 0,
                });
            }
        };
        let (job, does) = match &request {
            Request::Read { offset, into } => (Job::Read { offset: *offset, into }, Does::Read(into.len())),
            Request::Write { offset, from } => {
                (Job::Write { offset: *offset, from }, Does::Write(from.len()))
            }
            Request::Flush if self.durability.begin_flush() => (Job::Flush, Does::Flush),
            Request::Flush => {
                let ticket = Ticket { head, status, does: Does::Nothing };
                return Ok(self.finish(memory, Ended { tag: ticket, result: Ok(()) }));
            }
            Request::Id { into } => {
                let told = into.write(memory, ID).map(drop).ok_or(io::ErrorKind::InvalidInput.into());
                let code = if told.is_ok() { VIRTIO_BLK_S_OK } else { VIRTIO_BLK_S_IOERR } as u8;
                let written = write_status(memory, status, code, ID_BYTES as u64);
                let _: io::Result<()> = told;
                return Ok(Begun::Answered { written, bytes: 0 });
            }
            Request::Erase { offset, len, unmap } => {
                (Job::Erase { offset: *offset, len: *len, unmap: *unmap }, Does::Erase)
            }
        };
        let bytes = does.bytes();
        let ticket = Ticket { head, status, does };
        let begun = self.now();
        let on_the_spot = matches!(does, Does::Write(_)) && self.patience.on_the_spot(bytes, begun);
        let ended = self.ring.start(&job, ticket, on_the_spot).map_err(host("submit to io_uring"))?;
        if on_the_spot {
            let now = self.now();
            self.patience.learn(bytes, now.saturating_sub(begun), now);
        }
        Ok(match ended {
            Some(ended) => self.finish(memory, ended),
            None => {
                self.bytes += bytes;
                Begun::UnderWay(bytes)
            }
        })
    }

    /// Counts a job that ended and writes its status.
    fn finish(&mut self, memory: &Memory, ended: Ended<Ticket>) -> Begun {
        let Ended { tag: Ticket { status, does, .. }, result } = ended;
        let well = result.is_ok();
        match does {
            Does::Write(_) | Does::Erase => self.durability.wrote(),
            Does::Flush => self.durability.flushed(well),
            Does::Read(_) | Does::Nothing => {}
        }
        let mut read = 0;
        if well {
            self.metrics.requests += 1;
            match does {
                Does::Read(bytes) => {
                    self.metrics.read_bytes += bytes;
                    read = bytes;
                }
                Does::Write(bytes) => self.metrics.written_bytes += bytes,
                Does::Flush | Does::Erase | Does::Nothing => {}
            }
        }
        let code = if well { VIRTIO_BLK_S_OK } else { VIRTIO_BLK_S_IOERR } as u8;
        Begun::Answered { written: write_status(memory, status, code, read), bytes: does.bytes() }
    }

    /// Begins what was taken on, and answers what ended. True if anything did.
    fn answer(&mut self, active: &mut Active) -> Result<bool, DeviceError> {
        let mut any = false;
        loop {
            let began = self.ring.submit().map_err(host("submit to io_uring"))?;
            while let Some(ended) = self.ring.ended() {
                any = true;
                let head = ended.tag.head;
                self.bytes = self.bytes.saturating_sub(ended.tag.does.bytes());
                if let Begun::Answered { written, .. } = self.finish(&active.memory, ended) {
                    active.add_used(QUEUE, head, written)?;
                }
            }
            if !began {
                return Ok(any);
            }
        }
    }
}

/// Writes a status behind `written` bytes; returns how many bytes were written in all.
fn write_status(memory: &Memory, at: GuestAddress, code: u8, written: u64) -> u32 {
    match memory.write_obj(code, at) {
        Ok(()) => u32::try_from(written).unwrap_or(u32::MAX).saturating_add(1),
        Err(_) => 0,
    }
}

fn broken(source: virtio_queue::Error) -> DeviceError {
    DeviceError::Queue { queue: QUEUE, source }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> DeviceError {
    move |source| DeviceError::Host { what, source }
}

fn has_more(queue: &virtio_queue::Queue, memory: &Memory) -> Result<bool, DeviceError> {
    let available = queue.avail_idx(memory, std::sync::atomic::Ordering::Acquire).map_err(broken)?;
    Ok(available.0 != queue.next_avail())
}

/// Asks to be notified again. True if the driver was quicker.
fn enable_notification(active: &mut Active) -> Result<bool, DeviceError> {
    let Active { memory, queues, .. } = active;
    match queues.get_mut(QUEUE).filter(|queue| queue.ready()) {
        Some(queue) => queue.enable_notification(memory).map_err(broken),
        None => Ok(false),
    }
}

fn add_used(
    queues: &mut [virtio_queue::Queue],
    memory: &Memory,
    head: u16,
    written: u32,
) -> Result<(), DeviceError> {
    match queues.get_mut(QUEUE) {
        Some(queue) => queue.add_used(memory, head, written).map_err(broken),
        None => Ok(()),
    }
}

/// `struct virtio_blk_config`.
fn config(sectors: u64) -> [u8; 60] {
    let mut config = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in config.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    put(0, &sectors.to_le_bytes()); // capacity
    put(8, &SIZE_MAX.to_le_bytes()); // size_max
    put(12, &SEG_MAX.to_le_bytes()); // seg_max
    put(20, &(SECTOR as u32).to_le_bytes()); // blk_size: logical, so that file systems with 1 KiB blocks mount
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes()); // max_discard_sectors
    put(40, &1u32.to_le_bytes()); // max_discard_seg
    put(44, &(PAGE / SECTOR as u32).to_le_bytes()); // discard_sector_alignment
    put(48, &MAX_DISCARD_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    put(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
    put(56, &[1]); // write_zeroes_may_unmap
    config
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_DISCARD
            | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_from(&self.config, offset, data);
    }

    fn activate(&mut self, active: Active) -> Result<(), DeviceError> {
        active.poller.add(self.disk.ring.event(), RING, Readiness::READ).map_err(host("watch io_uring"))?;
        self.disk.ring.attach(active.memory.clone());
        self.active = Some(active);
        Ok(())
    }

    fn active(&mut self) -> Option<&mut Active> {
        self.active.as_mut()
    }

    /// Ends every request under way. What is held back stays in the queue.
    fn quiesce(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        self.disk.answer(active)?;
        while self.disk.ring.under_way() > 0 {
            self.disk.ring.wait().map_err(host("wait for io_uring"))?;
            self.disk.answer(active)?;
        }
        active.signal_used(QUEUE)
    }

    /// The capacity that the driver knows.
    fn save(&self) -> Vec<u8> {
        self.disk.sectors.to_le_bytes().to_vec()
    }

    /// The disk may be another one: its size is told if it differs.
    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        if state != self.disk.sectors.to_le_bytes()
            && let Some(active) = &self.active
        {
            active.interrupt.signal_config_change();
        }
        Ok(())
    }

    /// Waits for what is under way: the driver may use its memory for something else afterwards.
    fn reset(&mut self) {
        self.disk.ring.detach();
        self.disk.bytes = 0;
        // A flush that was under way may have failed.
        self.disk.durability = Durability::default();
        self.holding = false;
        if let Some(active) = self.active.take() {
            // They fail only if they were never added.
            let _ = active.poller.remove(self.disk.ring.event());
            self.timer.disarm(&active.poller);
        }
    }

    fn queue_event(&mut self, _queue: usize) -> Result<(), DeviceError> {
        self.serve()
    }

    fn event(&mut self, token: u32, _readiness: Readiness) -> Result<(), DeviceError> {
        if token == TIMER {
            self.timer.acknowledge();
        }
        self.serve()
    }
}

#[cfg(test)]
#[path = "device_test.rs"]
mod tests;
