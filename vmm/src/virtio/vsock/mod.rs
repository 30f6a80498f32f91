//! The virtio-vsock device (VIRTIO 1.2, section 5.10): streams between the guest's vsock ports and Unix sockets on the host.
//!
//! * A host program connects to the machine's socket `path`, writes `CONNECT port\n`, reads `OK port\n`, and then speaks with the guest's
//!   `port`. If the guest refuses, or does not answer in time, the socket is closed without an answer.
//! * A guest that connects to a port of context id 2 reaches the client of the control socket that accepts ([`Vsock::set_accepter`]); while
//!   nobody does, it is refused at once.
//! * The machine itself connects to the guest by [`Vsock::connect`].
//!
//! This file moves packets between the virtqueues and the [`Muxer`], which owns the sockets and the table of streams; a
//! [`connection`] is one stream without I/O. Everything runs in the machine's event loop; the sockets are in an epoll instance of
//! the muxer's own, which is the only descriptor that the event loop sees.
//!
//! A machine that is restored has none of the streams that the saved one had: if there were any, the guest is told so on the event queue
//! (TRANSPORT_RESET, 5.10.6.7), resets them, and goes on listening. It gets no packet before it has done so: Linux resets every stream that it has
//! at that moment, new ones as well.
//!
//! Streams only: neither SEQPACKET nor datagrams are offered.
#![forbid(unsafe_code)]

pub mod connection;
pub mod muxer;
pub mod packet;
pub mod socket;

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use commonage_vmm_api::VsockConfig;
use virtio_queue::{QueueOwnedT, QueueT};

use self::muxer::Muxer;
use self::packet::{Header, MAX_PAYLOAD};
use self::socket::Accepter;
use super::segments::split;
use super::{Active, Chain, DeviceError, Memory, VirtioDevice, pop, read_config_from};
use crate::reactor::Readiness;

/// Virtio device id.
const DEVICE_TYPE: u32 = 19;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// Linux's driver fills the receive queue with a page a descriptor, so its size is guest memory that every sliver pays for.
const QUEUE_SIZES: [u16; 3] = [64, 64, 4];
/// The only event there is: VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The context id is reserved.
    #[error("vsock context id {cid} is reserved; give the guest one from 3 to 4294967294")]
    ReservedCid {
        /// The context id.
        cid: u32,
    },
    /// A socket's name has room for 107 bytes.
    #[error("{path} is too long for a vsock's Unix socket; choose a path of at most 107 bytes")]
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
    loss: Loss,
}

/// Whether the guest has streams that no longer exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    /// It has none.
    None,
    /// It has, and is to be told.
    Untold,
    /// It was told, and has all its event buffers to give back once it has reset them.
    Told,
}

impl Vsock {
    /// Creates the device and its listening socket. Clients may connect from now on; they wait until the guest's driver is ready.
    pub fn new(config: &VsockConfig) -> Result<Self, VsockError> {
        if config.cid < 3 || config.cid == u32::MAX {
            return Err(VsockError::ReservedCid { cid: config.cid });
        }
        let guest_cid = u64::from(config.cid);
        let muxer = Muxer::new(guest_cid, &config.path)?;
        Ok(Self { guest_cid, muxer, active: None, loss: Loss::None })
    }

    /// The guest's connections to ports of the host go to `accepter` from now on.
    pub fn set_accepter(&mut self, accepter: Accepter) {
        self.muxer.set_accepter(accepter);
    }

    /// Connects `stream`, which must not block, to the guest's `port`. It is told `OK port\n` if the guest accepts, and closed if it refuses or
    /// does not answer in time. An error if the guest's driver is not up.
    pub fn connect(&mut self, stream: OwnedFd, port: u32) -> io::Result<()> {
        let active = self.active.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        self.muxer.connect_host(stream, port, Instant::now())?;
        if let Some(kick) = active.kicks.get(RX) {
            let _ = kick.write(1); // fails only if the counter is full: kicked already
        }
        Ok(())
    }

    /// Streams at present.
    pub fn connections(&self) -> usize {
        self.muxer.stream_count()
    }

    /// Takes what the guest has sent.
    fn take_from_guest(&mut self) -> Result<(), DeviceError> {
        let Self { active: Some(active), muxer, .. } = self else { return Ok(()) };
        // One packet's payload on its way to a socket. Not kept: most of the time there is none.
        let mut payload = Vec::new();
        active.drain(TX, |memory, chain| {
            if let Some((header, count)) = read_packet(memory, chain, &mut payload) {
                muxer.from_guest(&header, payload.get(..count).unwrap_or_default());
            }
            0
        })
    }

    /// Tells the guest that its streams are gone, as soon as it has made room for that; sees later that it has reset them.
    fn tell_loss(&mut self) -> Result<(), DeviceError> {
        let Self { active: Some(active), loss, .. } = self else { return Ok(()) };
        match *loss {
            Loss::None => return Ok(()),
            // All buffers are taken, those not needed come back empty: the next one that is there says that the guest is done.
            Loss::Untold => {
                for _ in 0..QUEUE_SIZES[EVENT] {
                    let Some(chain) = pop(&mut active.queues, &active.memory, EVENT)? else { break };
                    let head = chain.head_index();
                    let event = if *loss == Loss::Untold { &TRANSPORT_RESET[..] } else { &[] };
                    let written = split(chain).ok().and_then(|(_, room)| room.write(&active.memory, event));
                    *loss = Loss::Told;
                    active.add_used(EVENT, head, written.unwrap_or(0) as u32)?;
                }
                active.signal_used(EVENT)?;
            }
            Loss::Told => {
                if pop(&mut active.queues, &active.memory, EVENT)?.is_some() {
                    *loss = Loss::None;
                    if let Some(ring) = active.queues.get_mut(EVENT) {
                        ring.go_to_previous_position();
                    }
                    return Ok(());
                }
            }
        }
        if refilled_meanwhile(active, EVENT)?
            && let Some(kick) = active.kicks.get(EVENT)
        {
            let _ = kick.write(1); // fails only if the counter is full: kicked already
        }
        Ok(())
    }

    /// Gives the guest what there is for it, as far as it has made room.
    fn give_to_guest(&mut self, now: Instant) -> Result<(), DeviceError> {
        if self.loss != Loss::None {
            return Ok(());
        }
        let Self { active: Some(active), muxer, .. } = self else { return Ok(()) };
        let mut payload = Vec::new();
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
                if refilled_meanwhile(active, RX)? { continue } else { break }
            };
            let head = chain.head_index();
            let Some(written) =
                write_packet(&active.memory, chain, &mut payload, |room| muxer.to_guest(room, now))
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

/// `queue` is empty: asks the driver for a kick when it no longer is. True if it no longer is already.
fn refilled_meanwhile(active: &mut Active, queue: usize) -> Result<bool, DeviceError> {
    let Some(ring) = active.queues.get_mut(queue).filter(|ring| ring.ready()) else { return Ok(false) };
    ring.enable_notification(&active.memory).map_err(|source| DeviceError::Queue { queue, source })
}

/// The first `len` bytes of `buffer`, which grows if need be, to at most a packet's payload; `None` if that is too little.
fn room(buffer: &mut Vec<u8>, len: usize) -> Option<&mut [u8]> {
    if len > MAX_PAYLOAD {
        return None;
    }
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    buffer.get_mut(..len)
}

/// Copies a packet out of `chain`: its header, and the number of bytes put in `payload`. If the chain is shorter than the header says
/// or the packet longer than any may be, no payload is copied, and the muxer sees the contradiction. `None` without a whole header.
fn read_packet(memory: &Memory, chain: Chain<'_>, payload: &mut Vec<u8>) -> Option<(Header, usize)> {
    let mut reader = chain.reader(memory).ok()?;
    let mut bytes = [0; Header::SIZE];
    reader.read_exact(&mut bytes).ok()?;
    let header = Header::parse(&bytes);
    let whole = usize::try_from(header.len)
        .ok()
        .and_then(|len| room(payload, len))
        .and_then(|payload| reader.read_exact(payload).ok().map(|()| payload.len()));
    Some((header, whole.unwrap_or(0)))
}

/// Writes the packet that `next` gives, which may put as many payload bytes as it is offered in there, into `chain`. Returns the
/// bytes written; 0 if the chain cannot hold a packet, `None` if there was no packet to write.
fn write_packet(
    memory: &Memory,
    chain: Chain<'_>,
    payload: &mut Vec<u8>,
    next: impl FnOnce(&mut [u8]) -> Option<Header>,
) -> Option<u32> {
    let Ok(mut writer) = chain.writer(memory) else { return Some(0) };
    let available = writer.available_bytes().saturating_sub(Header::SIZE).min(MAX_PAYLOAD);
    // A chain without room for a single byte could never take what waits, however often it were tried.
    let Some(room) = room(payload, available).filter(|room| !room.is_empty()) else { return Some(0) };
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
        self.loss = Loss::None;
    }

    /// Whether there are streams, one byte.
    fn save(&self) -> Vec<u8> {
        vec![u8::from(self.loss != Loss::None || self.muxer.is_known_to_guest())]
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let existed = state.first().is_some_and(|existed| *existed != 0);
        self.loss = if existed { Loss::Untold } else { Loss::None };
        self.tell_loss()
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        let now = Instant::now();
        match queue {
            EVENT => self.tell_loss()?,
            TX => self.take_from_guest()?,
            _ => {}
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
