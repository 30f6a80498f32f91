//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2): one 4 KiB register page per device.
//!
//! ```text
//!  RESET ──ACK──► ACKNOWLEDGED ──DRIVER──► DRIVER ──FEATURES_OK──► FEATURES_OK ──DRIVER_OK──► RUNNING
//!    ▲                                       │ features may be        │ queues may be             │
//!    │                                       │ chosen                 │ set up                    │
//!    └──────────── status = 0 (reset), from anywhere ────────────────────────────────────────────┘
//! ```
//!
//! Invariants:
//! * Status bits are only ever added one at a time and in the order drawn (plus FAILED, at any time); any other write is ignored.
//! * A register written in a state in which it makes no sense is ignored; a register read anywhere is harmless.
//! * The device is activated exactly once between two resets, with queues that lie wholly in guest memory, and hears of queues and
//!   descriptors only while it runs. An error of the device stops it: it is reset at once, DEVICE_NEEDS_RESET is set.
#![forbid(unsafe_code)]

use std::any::Any;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Active, DeviceError, Interrupt, Memory, VirtioDevice};
use crate::event;
use crate::reactor::{Poller, Readiness};
use crate::snapshot::codec::{Reader, Refusal, Writer};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// Errors of one device that are printed.
const MOST_REPORTED: u8 = 16;
const VENDOR: u32 = u32::from_le_bytes(*b"CMNG");

/// Register offsets (virtio 1.2, table 4.1).
mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_FIRST: u64 = 0xb0;
    pub const SHM_LAST: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Offset of QueueNotify, for registering ioeventfds.
pub const QUEUE_NOTIFY: u64 = register::QUEUE_NOTIFY;

/// Device status bits (virtio 1.2, section 2.1).
pub mod status {
    /// The guest found the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u32 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u32 = 4;
    /// Features are agreed.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot go on.
    pub const NEEDS_RESET: u32 = 64;
    /// The driver gave up.
    pub const FAILED: u32 = 128;
}

/// Tokens from here on are the queues' kicks; a device's own are below.
pub(crate) const KICK_TOKENS: u32 = 0x8000_0000;

/// One device and its register page.
pub struct Transport {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    interrupt: Interrupt,
    poller: Poller,
    kicks: Vec<Arc<EventFd>>,
    queues: Vec<Queue>,
    status: u32,
    driver_features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    /// The device has its [`Active`].
    running: bool,
    /// Errors of the device that were printed.
    reported: u8,
}

impl Transport {
    /// Puts `device` behind a register page. `poller` must be of a source that nobody else uses.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Memory, poller: Poller) -> io::Result<Self> {
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let mut kicks = Vec::new();
        for (index, _) in device.queue_sizes().iter().enumerate() {
            let kick = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
            poller.add(event::borrow(&kick), KICK_TOKENS | index as u32, Readiness::READ)?;
            kicks.push(kick);
        }
        let queues = fresh_queues(device.as_ref()).map_err(io::Error::other)?;
        Ok(Self {
            device,
            memory,
            interrupt,
            poller,
            kicks,
            queues,
            status: 0,
            driver_features: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            running: false,
            reported: 0,
        })
    }

    /// The interrupt, to be registered as irqfd.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// One eventfd a queue, to be registered as ioeventfds on QueueNotify with the queue's index as data match.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// The device, if it is a `T`.
    pub fn device<T: VirtioDevice>(&mut self) -> Option<&mut T> {
        let device: &mut dyn Any = self.device.as_mut();
        device.downcast_mut()
    }

    fn offered_features(&self) -> u64 {
        self.device.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// The guest reads `data.len()` bytes at `offset` of the page.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            return self.device.read_config(offset, data);
        }
        // Registers are 32 bits wide and read so, or not at all (4.2.2.2).
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) => *word = self.read_register(offset).to_le_bytes(),
            Err(_) => data.fill(0),
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let selected = self.queues.get(self.queue_sel as usize);
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.device_type(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.offered_features(), self.device_features_sel),
            register::QUEUE_NUM_MAX => selected.map_or(0, |queue| u32::from(queue.max_size())),
            register::QUEUE_READY => selected.map_or(0, |queue| u32::from(queue.ready())),
            register::INTERRUPT_STATUS => self.interrupt.status(),
            register::STATUS => self.status,
            // No device has shared memory: length and base of every region are all ones (4.2.2).
            register::SHM_FIRST..=register::SHM_LAST => u32::MAX,
            register::CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    /// The guest writes `data` at `offset` of the page.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            if self.status & status::DRIVER != 0 {
                self.device.write_config(offset, data);
            }
            return;
        }
        if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.choose_features(value),
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_NOTIFY => self.kick(value as usize),
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => self.write_status(value),
            register::QUEUE_NUM..=register::QUEUE_DEVICE_HIGH => self.set_up_queue(offset, value),
            _ => {}
        }
    }

    fn choose_features(&mut self, value: u32) {
        if self.status != status::ACKNOWLEDGE | status::DRIVER {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_sel {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn set_up_queue(&mut self, offset: u64, value: u32) {
        if self.status != status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else { return };
        if offset == register::QUEUE_READY {
            return queue.set_ready(value == 1);
        }
        if queue.ready() {
            return; // 4.2.2.2: the driver must not touch these while the queue is ready
        }
        match offset {
            // Sizes that are no power of two or too great are refused by set_size: the old one stays.
            register::QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            register::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            register::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            register::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            register::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// A notification that did not go through its ioeventfd.
    fn kick(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue) {
            let _ = kick.write(1); // fails only if the counter is full: kicked already
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let known = self.status & !status::NEEDS_RESET;
        let value = value & !status::NEEDS_RESET; // the device's bit, which drivers hand back
        if value & known != known {
            return; // only a reset clears bits
        }
        let next = match known {
            0 => status::ACKNOWLEDGE,
            0b0001 => status::DRIVER,
            0b0011 => status::FEATURES_OK,
            0b1011 => status::DRIVER_OK,
            _ => 0,
        };
        match value & !known {
            status::FAILED => self.status |= status::FAILED,
            added if added != next || added == 0 => {}
            status::FEATURES_OK => {
                // Not set: the driver reads it back and sees that the choice is refused.
                let acceptable = self.driver_features & !self.offered_features() == 0
                    && self.driver_features >> VIRTIO_F_VERSION_1 & 1 == 1;
                if acceptable {
                    self.status |= status::FEATURES_OK;
                }
            }
            status::DRIVER_OK => {
                self.activate();
                // A driver that notified too early is heard all the same.
                (0..self.kicks.len()).for_each(|queue| self.kick(queue));
            }
            added => self.status |= added,
        }
    }

    fn activate(&mut self) {
        self.status |= status::DRIVER_OK;
        let event_idx = self.driver_features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        let Ok(fresh) = fresh_queues(self.device.as_ref()) else { return };
        let mut queues = std::mem::replace(&mut self.queues, fresh);
        if queues.iter().any(|queue| queue.ready() && !queue.is_valid(&self.memory)) {
            return self.needs_reset();
        }
        for queue in &mut queues {
            queue.set_event_idx(event_idx);
        }
        let active = Active {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            poller: self.poller.clone(),
            features: self.driver_features,
            kicks: self.kicks.clone(),
        };
        self.running = true;
        let result = self.device.activate(active);
        self.check(result);
    }

    /// A descriptor of this device's poller is ready.
    pub fn event(&mut self, token: u32, readiness: Readiness) {
        let kicked = token.checked_sub(KICK_TOKENS).map(|queue| queue as usize);
        if let Some(kick) = kicked.and_then(|queue| self.kicks.get(queue)) {
            let _ = kick.read(); // fails only if nothing is pending: a spurious event
        }
        if !self.running {
            return;
        }
        let result = match kicked {
            Some(queue) => self.device.queue_event(queue),
            None => self.device.event(token, readiness),
        };
        self.check(result);
    }

    fn check(&mut self, result: Result<(), DeviceError>) {
        if let Err(error) = result {
            // The guest can cause as many as it likes, and the log is memory of the host.
            if self.reported < MOST_REPORTED {
                self.reported += 1;
                eprintln!("sliver-vmm: virtio device {}: {error}", self.device.device_type());
            }
            self.needs_reset();
        }
    }

    fn needs_reset(&mut self) {
        if std::mem::take(&mut self.running) {
            self.device.reset();
        }
        self.status |= status::NEEDS_RESET;
        if self.status & status::DRIVER_OK != 0 {
            self.interrupt.signal_config_change();
        }
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.running) {
            self.device.reset();
        }
        if let Ok(fresh) = fresh_queues(self.device.as_ref()) {
            self.queues = fresh;
        }
        self.status = 0;
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.interrupt.acknowledge(u32::MAX);
    }

    /// Makes the device finish what it has begun, before [`Transport::save`]. The machine must be paused.
    pub fn quiesce(&mut self) -> Result<(), DeviceError> {
        if self.running { self.device.quiesce() } else { Ok(()) }
    }

    /// The registers, queues and device. Nothing may be on its way: see [`Transport::quiesce`].
    pub fn save(&mut self) -> TransportState {
        let queues = match self.device.active() {
            Some(active) if self.running => &active.queues,
            _ => &self.queues,
        };
        let queues = queues.iter().map(Queue::state).collect();
        TransportState {
            device_type: self.device.device_type(),
            running: self.running,
            status: self.status,
            interrupt_status: self.interrupt.status(),
            driver_features: self.driver_features,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            queue_sel: self.queue_sel,
            queues,
            device: if self.running { self.device.save() } else { Vec::new() },
        }
    }

    /// Goes on where another machine's transport was saved; this one must be fresh. Everything in `state` may be a lie.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        let device_type = self.device.device_type();
        if state.device_type != device_type {
            return Err(RestoreError::Type { was: state.device_type, is: device_type });
        }
        if state.driver_features & !self.offered_features() != 0 {
            return Err(RestoreError::Features(state.driver_features & !self.offered_features()));
        }
        let sizes = self.device.queue_sizes();
        let sizes_fit = state.queues.len() == sizes.len()
            && state.queues.iter().zip(sizes).all(|(queue, size)| queue.max_size == *size);
        let queues: Result<Vec<_>, _> = state.queues.iter().map(|queue| Queue::try_from(*queue)).collect();
        self.queues = queues.ok().filter(|_| sizes_fit).ok_or(RestoreError::Queues)?;
        self.driver_features = state.driver_features;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.queue_sel = state.queue_sel;
        self.status = state.status;
        if state.running {
            let pending: Vec<bool> =
                self.queues.iter().map(|queue| has_pending(queue, &self.memory)).collect();
            self.activate();
            if !self.running {
                return Err(RestoreError::Queues);
            }
            self.device.restore(&state.device)?;
            // A notification may have been on its way, too. Queues without descriptors are left alone: looking into them writes to
            // memory that clones share.
            (0..).zip(pending).filter(|(_, pending)| *pending).for_each(|(queue, _)| self.kick(queue));
        }
        // An interrupt may have been on its way when the machine was saved.
        self.interrupt.raise_again(state.interrupt_status);
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn status(&self) -> u32 {
        self.status
    }
}

/// Whether the driver has made descriptors available that were not taken.
fn has_pending(queue: &Queue, memory: &Memory) -> bool {
    queue.ready()
        && queue.avail_idx(memory, Ordering::Acquire).map_or(true, |index| index.0 != queue.next_avail())
}

/// A transport and its device, between two calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransportState {
    device_type: u32,
    running: bool,
    status: u32,
    interrupt_status: u32,
    driver_features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    queues: Vec<QueueState>,
    device: Vec<u8>,
}

/// Why a device does not go on with a state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It is another device's.
    #[error("the snapshot has a device of type {was} there, this machine one of type {is}")]
    Type {
        /// Saved.
        was: u32,
        /// Configured.
        is: u32,
    },
    /// The driver uses features that are not offered.
    #[error("its driver uses features {0:#x}, which it does not have here")]
    Features(u64),
    /// The queues cannot be those of a running device.
    #[error("its queues make no sense")]
    Queues,
    /// The device refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Most queues of a device.
const MAX_QUEUES: usize = 16;

impl TransportState {
    /// Appends it to a state file.
    pub fn write(&self, to: &mut Writer) {
        to.u32(self.device_type);
        to.u8(u8::from(self.running));
        to.u32(self.status);
        to.u32(self.interrupt_status);
        to.u64(self.driver_features);
        to.u32(self.device_features_sel);
        to.u32(self.driver_features_sel);
        to.u32(self.queue_sel);
        to.u32(self.queues.len() as u32);
        for queue in &self.queues {
            to.u16(queue.max_size);
            to.u16(queue.next_avail);
            to.u16(queue.next_used);
            to.u8(u8::from(queue.event_idx_enabled));
            to.u16(queue.size);
            to.u8(u8::from(queue.ready));
            to.u64(queue.desc_table);
            to.u64(queue.avail_ring);
            to.u64(queue.used_ring);
        }
        to.blob(&self.device);
    }

    /// Reads what [`TransportState::write`] wrote.
    pub fn read(from: &mut Reader<'_>) -> Result<Self, Refusal> {
        Ok(Self {
            device_type: from.u32()?,
            running: from.bool()?,
            status: from.u32()?,
            interrupt_status: from.u32()?,
            driver_features: from.u64()?,
            device_features_sel: from.u32()?,
            driver_features_sel: from.u32()?,
            queue_sel: from.u32()?,
            queues: {
                let count = from.count(MAX_QUEUES)?;
                (0..count).map(|_| read_queue(from)).collect::<Result<_, _>>()?
            },
            device: from.blob()?.to_vec(),
        })
    }
}

fn read_queue(from: &mut Reader<'_>) -> Result<QueueState, Refusal> {
    Ok(QueueState {
        max_size: from.u16()?,
        next_avail: from.u16()?,
        next_used: from.u16()?,
        event_idx_enabled: from.bool()?,
        size: from.u16()?,
        ready: from.bool()?,
        desc_table: from.u64()?,
        avail_ring: from.u64()?,
        used_ring: from.u64()?,
    })
}

fn fresh_queues(device: &dyn VirtioDevice) -> Result<Vec<Queue>, virtio_queue::Error> {
    device.queue_sizes().iter().map(|size| Queue::new(*size)).collect()
}

/// 32 of the 64 feature bits.
fn half(features: u64, sel: u32) -> u32 {
    match sel {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
#[path = "mmio_test.rs"]
mod tests;
