//! The virtio machinery every device shares: the [`VirtioDevice`] trait, what a device is given when the guest's driver is ready
//! ([`Active`]), and how it interrupts the guest ([`Interrupt`]).
//!
//! # Who calls what, and when
//!
//! ```text
//!  guest driver                     mmio::Transport                     device
//!  reads/writes config space  ───►  bounds already checked       ───►   read_config / write_config
//!  DRIVER_OK                  ───►  queues valid, features agreed ───►  activate(Active)
//!  QueueNotify (ioeventfd)    ───►  event loop                   ───►   queue_event(queue)
//!                                   event loop: a polled fd is ready ─► event(token, readiness)
//!  status = 0                 ───►                                      reset()
//! ```
//!
//! * Every call is made with the device's lock held, so a device needs no locking of its own. Configuration, activation and
//!   reset come from a vCPU thread; `queue_event` and `event` come from the event-loop thread. No call may block for long.
//! * `queue_event` and `event` come only between `activate` and `reset`. Exactly one `reset` follows each `activate` before the next.
//! * The memory behind `Active::memory` and everything in it is the guest's: hostile, and changing while it is read. Read a field
//!   once, check it, then use it.
//! * A device that returns an error from `activate`, `queue_event` or `event` is marked DEVICE_NEEDS_RESET: it gets no more calls
//!   until the guest resets it. So errors are for broken rings and a failed host, not for one bad request.
//! * File descriptors that the device polls are registered through [`Active::poller`] with a token of the device's choosing and must
//!   be removed in `reset` (dropping the descriptor does it if it has no duplicates).
#![forbid(unsafe_code)]

pub mod balloon;
pub mod blk;
pub mod console;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod rng;
pub mod segments;
#[cfg(test)]
pub mod testing;
pub mod vsock;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::reactor::{Poller, Readiness};

/// Guest memory as devices see it. Cloning is cheap (shared mappings).
pub type Memory = GuestMemoryMmap<()>;
/// A descriptor chain borrowed from [`Memory`].
pub type Chain<'m> = DescriptorChain<&'m Memory>;

/// Why a device cannot go on until its driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver wrote a ring that cannot be followed.
    #[error("queue {queue} is broken: {source}; the guest's driver must reset the device")]
    Queue {
        /// Index of the queue.
        queue: usize,
        /// What is wrong with it.
        source: virtio_queue::Error,
    },
    /// The host refused something the device needs to go on.
    #[error("{what}: {source}")]
    Host {
        /// What the device tried to do.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

/// One virtio device behind [`mmio::Transport`]. See the module's documentation for who calls what. What the control socket asks of one kind of
/// device alone goes by [`mmio::Transport::device`].
pub trait VirtioDevice: Any + Send {
    /// Virtio device id (virtio 1.2, section 5), for example 2 for a block device.
    fn device_type(&self) -> u32;

    /// The greatest size of each queue, in queue order. Powers of two, at most 32768. The length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Device-specific feature bits offered. The transport adds VERSION_1, RING_INDIRECT_DESC and RING_EVENT_IDX itself.
    fn features(&self) -> u64 {
        0
    }

    /// Reads configuration space into `data` from `offset` on. Bytes beyond its end read as zero: see [`read_config_from`].
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space. Most devices have nothing writable and ignore it, as the standard asks.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready (DRIVER_OK). `active.queues` has one entry per element of [`queue_sizes`](Self::queue_sizes); a queue
    /// that the driver left disabled is present but not `ready()`.
    fn activate(&mut self, active: Active) -> Result<(), DeviceError>;

    /// What [`activate`](Self::activate) gave, until [`reset`](Self::reset): the transport saves the queues in it.
    fn active(&mut self) -> Option<&mut Active>;

    /// The machine is paused and about to be saved: finish every request that was begun, so that queues and memory tell all. Nothing is
    /// called again before the machine is resumed.
    fn quiesce(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// What must survive a snapshot besides the queues, taken after [`quiesce`](Self::quiesce). Most devices have nothing.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes back what [`save`](Self::save) gave, on a device of a new machine that was just activated with the saved queues. `state` is checked
    /// only by a checksum: it may be of a machine that lied.
    fn restore(&mut self, _state: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The driver reset the device: forget everything since `activate`, drop the [`Active`], remove polled descriptors.
    fn reset(&mut self);

    /// The driver made descriptors of `queue` available. May be spurious.
    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError>;

    /// A descriptor registered with [`Active::poller`] under `token` is ready. May be spurious, and may come once more for a token
    /// whose descriptor was removed earlier in the same round of the event loop.
    fn event(&mut self, _token: u32, _readiness: Readiness) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Everything a device gets when its driver is ready.
pub struct Active {
    /// Guest memory.
    pub memory: Memory,
    /// The queues, configured by the driver and checked to lie in guest memory.
    pub queues: Vec<Queue>,
    /// Interrupts the guest.
    pub interrupt: Interrupt,
    /// Registers descriptors with the event loop.
    pub poller: Poller,
    /// The negotiated feature bits.
    pub features: u64,
    /// One per queue: writing it is as if the driver had notified the queue. [`Active::drain`] uses it to yield.
    pub kicks: Vec<Arc<EventFd>>,
}

impl Active {
    /// Whether feature bit number `bit` was negotiated.
    pub fn has_feature(&self, bit: u32) -> bool {
        1u64.checked_shl(bit).is_some_and(|mask| self.features & mask != 0)
    }

    /// Serves every available chain of `queue` with `serve`, which answers with the number of bytes it wrote into the chain (the used
    /// length), then interrupts the guest if it wants that. For queues whose requests are all served at once (blk, rng, pmem, and
    /// transmit queues).
    ///
    /// A guest that refills the ring as fast as it is drained cannot hold the event loop: after two rings full the
    /// rest is left to a next round, by kicking the queue.
    pub fn drain(
        &mut self,
        queue: usize,
        mut serve: impl FnMut(&Memory, Chain<'_>) -> u32,
    ) -> Result<(), DeviceError> {
        let broken = |source| DeviceError::Queue { queue, source };
        let Some(ring) = self.queues.get_mut(queue).filter(|ring| ring.ready()) else { return Ok(()) };
        let mut budget = 2 * u32::from(ring.size());
        let mut again = true;
        while again && budget > 0 {
            // A turn counts even if it serves nothing: in rings that overlap, asking for notifications changes what is available.
            budget -= 1;
            ring.disable_notification(&self.memory).map_err(broken)?;
            while budget > 0 {
                let Some(chain) = ring.iter(&self.memory).map_err(broken)?.next() else { break };
                budget -= 1;
                let head = chain.head_index();
                let written = serve(&self.memory, chain);
                ring.add_used(&self.memory, head, written).map_err(broken)?;
            }
            again = ring.enable_notification(&self.memory).map_err(broken)?;
        }
        if again && let Some(kick) = self.kicks.get(queue) {
            // Only a full counter can fail, and then the queue is kicked already.
            let _ = kick.write(1);
        }
        self.signal_used(queue)
    }

    /// Returns the chain that starts at `head` to the driver with `written` bytes in it. Does not interrupt.
    pub fn add_used(&mut self, queue: usize, head: u16, written: u32) -> Result<(), DeviceError> {
        let Some(ring) = self.queues.get_mut(queue) else { return Ok(()) };
        ring.add_used(&self.memory, head, written).map_err(|source| DeviceError::Queue { queue, source })
    }

    /// Interrupts the guest for `queue`, if the driver asked to be (EVENT_IDX or NO_INTERRUPT considered). Call it once after a batch of
    /// [`Active::add_used`].
    pub fn signal_used(&mut self, queue: usize) -> Result<(), DeviceError> {
        let Some(ring) = self.queues.get_mut(queue).filter(|ring| ring.ready()) else { return Ok(()) };
        if ring.needs_notification(&self.memory).map_err(|source| DeviceError::Queue { queue, source })? {
            self.interrupt.signal_used_queue();
        }
        Ok(())
    }
}

/// Takes the next available chain of `queue`, if any; none if the queue is disabled. A free function so that the chain borrows only
/// `memory`: `pop(&mut active.queues, &active.memory, RX)`. Give it back with [`Active::add_used`].
pub fn pop<'m>(
    queues: &mut [Queue],
    memory: &'m Memory,
    queue: usize,
) -> Result<Option<Chain<'m>>, DeviceError> {
    let Some(ring) = queues.get_mut(queue).filter(|ring| ring.ready()) else { return Ok(None) };
    Ok(ring.iter(memory).map_err(|source| DeviceError::Queue { queue, source })?.next())
}

/// A device's interrupt line: an eventfd that KVM turns into an interrupt (irqfd), and the status register that tells the driver why.
#[derive(Clone)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    line: Arc<EventFd>,
}

impl Interrupt {
    /// InterruptStatus bit: a used buffer was returned.
    pub const USED_RING: u32 = 1;
    /// InterruptStatus bit: configuration or device status changed.
    pub const CONFIG_CHANGE: u32 = 2;

    /// An interrupt that pulses `line`.
    pub fn new(line: EventFd) -> Self {
        Self { status: Arc::new(AtomicU32::new(0)), line: Arc::new(line) }
    }

    /// Tells the driver that some queue has used buffers.
    pub fn signal_used_queue(&self) {
        self.signal(Self::USED_RING);
    }

    /// Tells the driver that configuration space or the device status changed.
    pub fn signal_config_change(&self) {
        self.signal(Self::CONFIG_CHANGE);
    }

    fn signal(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::SeqCst);
        // A write fails only if the counter is full, and then the interrupt is pending already.
        let _ = self.line.write(1);
    }

    /// After a restore: sets InterruptStatus, and interrupts once if anything is in it.
    pub fn raise_again(&self, status: u32) {
        if status != 0 {
            self.signal(status);
        }
    }

    /// The eventfd to register as irqfd.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// InterruptStatus.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// InterruptACK: clears `causes`.
    pub fn acknowledge(&self, causes: u32) {
        self.status.fetch_and(!causes, Ordering::SeqCst);
    }
}

/// Fills `data` from `config` at `offset`; bytes beyond the end are zero. What [`VirtioDevice::read_config`] usually does.
pub fn read_config_from(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let tail = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or(&[]);
    for (to, from) in data.iter_mut().zip(tail) {
        *to = *from;
    }
}
