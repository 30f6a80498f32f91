//! The virtio-vsock device (VIRTIO 1.2, section 5.10): streams between the guest's vsock ports and Unix sockets on the host.
//!
//! * A host program connects to the machine's socket `path`, writes `CONNECT port\n`, reads `OK port\n`, and then speaks with the guest's
//!   `port`. If the guest refuses, or does not answer in time, the socket is closed without an answer.
//! * A guest that connects to port P of context id 2 reaches the Unix socket `{path}_P`; if nobody listens there, it is refused at once.
//!
//! This file moves packets between the virtqueues and the [`Muxer`], which owns the sockets and the table of streams; a
//! [`connection`] is one stream without I/O. Everything runs in the machine's event loop; the sockets are in an epoll instance of
//! the muxer's own, which is the only descriptor that the event loop sees.
//!
//! Streams only: neither SEQPACKET nor datagrams are offered, and the event queue is never used.
#![forbid(unsafe_code)]

pub mod connection;
pub mod muxer;
pub mod packet;
mod socket;

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::Instant;

use commonage_vmm_api::VsockConfig;
use virtio_queue::{QueueOwnedT, QueueT};

use self::muxer::Muxer;
use self::packet::{Header, MAX_PAYLOAD};
use super::{Active, Chain, DeviceError, Memory, VirtioDevice, pop, read_config_from};
use crate::reactor::Readiness;

/// Virtio device id.
const DEVICE_TYPE: u32 = 19;
const RX: usize = 0;
const TX: usize = 1;
/// Linux's driver fills the receive queue with a page a descriptor, so its size is guest memory that every sliver pays for.
const QUEUE_SIZES: [u16; 3] = [64, 64, 4];

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The context id is reserved.
    #[error("vsock context id {cid} is reserved; give the guest one from 3 to 4294967294")]
    ReservedCid {
        /// The context id.
        cid: u32,
    },
    /// A socket's name has room for 107 bytes, and `_4294967295` may follow.
    #[error("{path} is too long for a vsock's Unix socket; choose a path of at most 96 bytes")]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Something that is not a socket has the path.
    #[error("{path} exists and is not a socket; remove it or choose another path for the vsock")]
    InTheWay {
        /// The path.
        path: PathBuf,
    },
    /// The file system or the kernel refused.
    #[error("vsock: cannot {what} at {path}: {source}")]
    Socket {
        /// The path.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The kernel refused to poll.
    #[error("vsock: cannot {what}: {source}")]
    Poll {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// The device.
pub struct Vsock {
    guest_cid: u64,
    muxer: Muxer,
    active: Option<Active>,
    /// One packet's payload on its way between guest memory and a socket.
    payload: Box<[u8]>,
}

impl Vsock {
    /// Creates the device and its listening socket. Clients may connect from now on; they wait until the guest's driver is ready.
    pub fn new(config: &VsockConfig) -> Result<Self, VsockError> {
        if config.cid < 3 || config.cid == u32::MAX {
            return Err(VsockError::ReservedCid { cid: config.cid });
        }
        let guest_cid = u64::from(config.cid);
        let muxer = Muxer::new(guest_cid, &config.path)?;
        Ok(Self { guest_cid, muxer, active: None, payload: vec![0; MAX_PAYLOAD].into_boxed_slice() })
    }

    /// Takes what the guest has sent.
    fn take_from_guest(&mut self) -> Result<(), DeviceError> {
        let Self { active: Some(active), muxer, payload, .. } = self else { return Ok(()) };
        active.drain(TX, |memory, chain| {
            if let Some((header, count)) = read_packet(memory, chain, payload) {
                muxer.from_guest(&header, payload.get(..count).unwrap_or_default());
            }
            0
        })
    }

    /// Gives the guest what there is for it, as far as it has made room.
    fn give_to_guest(&mut self, now: Instant) -> Result<(), DeviceError> {
        let Self { active: Some(active), muxer, payload, .. } = self else { return Ok(()) };
        // As in `Active::drain`: a guest that makes room as fast as it is used must not hold the event loop.
        let mut budget = 2 * QUEUE_SIZES[RX];
        while muxer.has_packet() {
            if budget == 0 {
                if let Some(kick) = active.kicks.get(RX) {
                    // Only a full counter can fail, and then the queue is kicked already.
                    let _ = kick.write(1);
                }
                break;
            }
            budget -= 1;
            let Some(chain) = pop(&mut active.queues, &active.memory, RX)? else {
                if refilled_meanwhile(active)? { continue } else { break }
            };
            let head = chain.head_index();
            let Some(written) =
                write_packet(&active.memory, chain, payload, |room| muxer.to_guest(room, now))
            else {
                if let Some(ring) = active.queues.get_mut(RX) {
                    ring.go_to_previous_position();
                }
                break;
            };
            active.add_used(RX, head, written)?;
        }
        active.signal_used(RX)
    }
}

/// The receive queue is empty: asks the driver for a kick when it no longer is. True if it no longer is already.
fn refilled_meanwhile(active: &mut Active) -> Result<bool, DeviceError> {
    let Some(ring) = active.queues.get_mut(RX).filter(|ring| ring.ready()) else { return Ok(false) };
    ring.enable_notification(&active.memory).map_err(|source| DeviceError::Queue { queue: RX, source })
}

/// Copies a packet out of `chain`: its header, and the number of bytes put in `payload`. If the chain is shorter than the header says
/// or the packet longer than any may be, no payload is copied, and the muxer sees the contradiction. `None` without a whole header.
fn read_packet(memory: &Memory, chain: Chain<'_>, payload: &mut [u8]) -> Option<(Header, usize)> {
    let mut reader = chain.reader(memory).ok()?;
    let mut bytes = [0; Header::SIZE];
    reader.read_exact(&mut bytes).ok()?;
    let header = Header::parse(&bytes);
    let whole = usize::try_from(header.len)
        .ok()
        .and_then(|len| payload.get_mut(..len))
        .and_then(|payload| reader.read_exact(payload).ok().map(|()| payload.len()));
    Some((header, whole.unwrap_or(0)))
}

/// Writes the packet that `next` gives, which may put as many payload bytes as it is offered in there, into `chain`. Returns the
/// bytes written; 0 if the chain cannot hold a packet, `None` if there was no packet to write.
fn write_packet(
    memory: &Memory,
    chain: Chain<'_>,
    payload: &mut [u8],
    next: impl FnOnce(&mut [u8]) -> Option<Header>,
) -> Option<u32> {
    let Ok(mut writer) = chain.writer(memory) else { return Some(0) };
    let room = writer.available_bytes().saturating_sub(Header::SIZE).min(payload.len());
    // A chain without room for a single byte could never take what waits, however often it were tried.
    let Some(room) = payload.get_mut(..room).filter(|room| !room.is_empty()) else { return Some(0) };
    let header = next(room)?;
    let data = usize::try_from(header.len).ok().and_then(|len| room.get(..len)).unwrap_or_default();
    // Cannot fail: the room is the writer's own.
    let written = writer.write_all(&header.encode()).and_then(|()| writer.write_all(data));
    Some(if written.is_ok() { Header::SIZE as u32 + header.len } else { 0 })
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_from(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, active: Active) -> Result<(), DeviceError> {
        active
            .poller
            .add(self.muxer.epoll(), 0, Readiness::READ)
            .map_err(|source| DeviceError::Host { what: "cannot watch the vsock's sockets", source })?;
        self.active = Some(active);
        Ok(())
    }

    fn active(&mut self) -> Option<&mut Active> {
        self.active.as_mut()
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            // It fails only if it was never added.
            let _ = active.poller.remove(self.muxer.epoll());
        }
        self.muxer.reset();
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        let now = Instant::now();
        if queue == TX {
            self.take_from_guest()?;
        }
        self.give_to_guest(now)
    }

    fn event(&mut self, _token: u32, _readiness: Readiness) -> Result<(), DeviceError> {
        let now = Instant::now();
        self.muxer
            .poll(now)
            .map_err(|source| DeviceError::Host { what: "cannot poll the vsock's sockets", source })?;
        self.give_to_guest(now)
    }
}

#[cfg(test)]
mod connection_test;
#[cfg(test)]
mod device_test;
#[cfg(test)]
mod muxer_test;
