//! The network device (virtio 1.2, section 5.1): one receive and one transmit queue, no offloads, frames of at most 1514 bytes. Its back
//! end is the ring shared with net-demux.
//!
//! Back pressure, both ways, with at most one frame held here: a full ring stops the transmit queue until net-demux makes room; a guest
//! without receive buffers stops the ring until it offers some.
#![forbid(unsafe_code)]

use commonage_net_demux_api::ring::{Endpoint, MAX_FRAME};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
use virtio_queue::QueueT;

use super::segments::split;
use super::{Active, Chain, DeviceError, Memory, VirtioDevice, pop, read_config_from};
use crate::reactor::Readiness;

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [128, 128];
/// `struct virtio_net_hdr_v1`: 12 bytes, always present in virtio 1.
const HEADER: usize = 12;
/// Offset of `num_buffers` in it.
const NUM_BUFFERS: usize = 10;
const RING_TOKEN: u32 = 0;
/// Frames moved in one direction before other devices get their turn.
const BUDGET: usize = 256;

/// A frame between ring and guest.
struct Frame {
    bytes: [u8; MAX_FRAME],
    len: usize,
}

impl Frame {
    fn new() -> Box<Self> {
        Box::new(Self { bytes: [0; MAX_FRAME], len: 0 })
    }

    /// Empty when no frame is held.
    fn contents(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }
}

/// What went through the device; (sent, received) by the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Frames.
    pub frames: (u64, u64),
    /// Bytes of those.
    pub bytes: (u64, u64),
}

/// The network device.
pub struct Net {
    mac: [u8; 6],
    ring: Endpoint,
    /// From the ring, waiting for a receive buffer.
    received: Box<Frame>,
    /// From the guest, waiting for room in the ring.
    sent: Box<Frame>,
    counters: Counters,
    active: Option<Active>,
}

impl Net {
    /// A device with address `mac` on `ring`.
    pub fn new(mac: [u8; 6], ring: Endpoint) -> Self {
        Self {
            mac,
            ring,
            received: Frame::new(),
            sent: Frame::new(),
            counters: Counters::default(),
            active: None,
        }
    }

    /// What went through so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Guest to ring.
    fn transmit(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        for _ in 0..BUDGET {
            if self.sent.len > 0 {
                if self.ring.send(self.sent.contents()).is_err() {
                    return active.signal_used(TX); // the ring's event will come when there is room
                }
                self.counters.frames.0 += 1;
                self.counters.bytes.0 += self.sent.len as u64;
                self.sent.len = 0;
            }
            let Some(chain) = pop(&mut active.queues, &active.memory, TX)? else {
                if wants_more(active, TX)? {
                    continue;
                }
                return active.signal_used(TX);
            };
            let head = chain.head_index();
            self.sent.len = gather(&active.memory, chain, &mut self.sent.bytes).unwrap_or(0);
            active.add_used(TX, head, 0)?;
        }
        yield_to_others(active, TX)
    }

    /// Ring to guest.
    fn receive(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        for _ in 0..BUDGET {
            if self.received.len == 0 {
                let Some(len) = self.ring.recv(&mut self.received.bytes) else {
                    return active.signal_used(RX); // the ring's event will come when there is a frame
                };
                self.received.len = len;
            }
            let Some(chain) = pop(&mut active.queues, &active.memory, RX)? else {
                if wants_more(active, RX)? {
                    continue;
                }
                return active.signal_used(RX); // the guest will notify when there is a buffer
            };
            let head = chain.head_index();
            // A buffer that is too small costs the guest the frame, nothing else.
            let written = scatter(&active.memory, chain, self.received.contents()).unwrap_or(0);
            if written > 0 {
                self.counters.frames.1 += 1;
                self.counters.bytes.1 += self.received.len as u64;
            }
            self.received.len = 0;
            active.add_used(RX, head, written)?;
        }
        yield_to_others(active, RX)
    }
}

/// Asks to be notified of the next buffer of an empty `queue`; whether one came in the meantime.
fn wants_more(active: &mut Active, queue: usize) -> Result<bool, DeviceError> {
    let Some(ring) = active.queues.get_mut(queue).filter(|ring| ring.ready()) else { return Ok(false) };
    ring.enable_notification(&active.memory).map_err(|source| DeviceError::Queue { queue, source })
}

/// Ends a round that used up its budget: the rest comes as another event.
fn yield_to_others(active: &mut Active, queue: usize) -> Result<(), DeviceError> {
    if let Some(kick) = active.kicks.get(queue) {
        let _ = kick.write(1); // fails only if the counter is full: kicked already
    }
    active.signal_used(queue)
}

/// Copies a frame out of a transmit chain; `None` if it is malformed or longer than a frame may be.
fn gather(memory: &Memory, chain: Chain<'_>, frame: &mut [u8; MAX_FRAME]) -> Option<usize> {
    let (output, _) = split(chain).ok()?;
    let (_header, payload) = output.split_at(HEADER as u64)?;
    if payload.len() > MAX_FRAME as u64 {
        return None;
    }
    payload.read(memory, frame)
}

/// Copies header and frame into a receive chain; `None` if it is malformed or too small.
fn scatter(memory: &Memory, chain: Chain<'_>, frame: &[u8]) -> Option<u32> {
    let (_, input) = split(chain).ok()?;
    let (header, payload) = input.split_at(HEADER as u64)?;
    if payload.len() < frame.len() as u64 {
        return None;
    }
    let mut bytes = [0; HEADER];
    bytes[NUM_BUFFERS] = 1;
    header.write(memory, &bytes)?;
    payload.write(memory, frame)?;
    u32::try_from(HEADER + frame.len()).ok()
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_from(&self.mac, offset, data);
    }

    fn activate(&mut self, active: Active) -> Result<(), DeviceError> {
        active
            .poller
            .add(self.ring.event(), RING_TOKEN, Readiness::READ)
            .map_err(|source| DeviceError::Host { what: "watch the network ring", source })?;
        self.active = Some(active);
        self.receive()
    }

    fn active(&mut self) -> Option<&mut Active> {
        self.active.as_mut()
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            // Fails only if it was never added.
            let _ = active.poller.remove(self.ring.event());
        }
        self.received.len = 0;
        self.sent.len = 0;
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        match queue {
            RX => self.receive(),
            _ => self.transmit(),
        }
    }

    fn event(&mut self, _token: u32, _readiness: Readiness) -> Result<(), DeviceError> {
        // This side made both ends and holds them: the event is never over.
        let _ = self.ring.drain_event();
        self.transmit()?;
        self.receive()
    }
}

#[cfg(test)]
#[path = "net_test.rs"]
mod tests;
