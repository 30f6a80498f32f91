//! The device behind real rings in guest memory, with a driver that lays packets out as it likes.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use tempfile::TempDir;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::packet::{HOST_CID, Op, TYPE_STREAM};
use super::*;
use crate::reactor::Reactor;
use crate::virtio::Interrupt;

const MEMORY: usize = 1 << 20;
const QUEUE_STRIDE: u64 = 0x4000;
const BUFFERS: u64 = 0x4_0000;
const WRITABLE: u16 = 2;
const NEXT: u16 = 1;

/// A driver's view of one ring: descriptor table, available ring and used ring at fixed offsets.
struct Ring {
    base: u64,
    next_descriptor: u16,
    available: u16,
}

impl Ring {
    const AVAILABLE: u64 = 0x1000;
    const USED: u64 = 0x2000;

    fn new(index: usize) -> Self {
        Self { base: 0x1000 + QUEUE_STRIDE * index as u64, next_descriptor: 0, available: 0 }
    }

    fn queue(&self, size: u16) -> Queue {
        let mut queue = Queue::new(size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.base + Self::AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.base + Self::USED)).unwrap();
        queue.set_ready(true);
        queue
    }

    /// Makes a chain of (address, length) available.
    fn offer(&mut self, memory: &Memory, parts: &[(u64, u32)], flags: u16) {
        let head = self.next_descriptor;
        for (at, (address, len)) in parts.iter().enumerate() {
            let more = if at + 1 < parts.len() { NEXT } else { 0 };
            let entry = GuestAddress(self.base + 16 * u64::from(self.next_descriptor));
            self.next_descriptor += 1;
            memory.write_obj(*address, entry).unwrap();
            memory.write_obj(*len, GuestAddress(entry.0 + 8)).unwrap();
            memory.write_obj(flags | more, GuestAddress(entry.0 + 12)).unwrap();
            memory.write_obj(self.next_descriptor, GuestAddress(entry.0 + 14)).unwrap();
        }
        let ring = self.base + Self::AVAILABLE;
        memory.write_obj(head, GuestAddress(ring + 4 + 2 * u64::from(self.available))).unwrap();
        self.available += 1;
        memory.write_obj(self.available, GuestAddress(ring + 2)).unwrap();
    }

    /// How many chains came back, and the length written into the last one.
    fn used(&self, memory: &Memory) -> (u16, u32) {
        let ring = self.base + Self::USED;
        let count: u16 = memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let last = u64::from(count.max(1) - 1);
        (count, memory.read_obj(GuestAddress(ring + 4 + 8 * last + 4)).unwrap())
    }
}

struct World {
    dir: TempDir,
    _reactor: Reactor,
    device: Vsock,
    memory: Memory,
    line: EventFd,
    rx: Ring,
    tx: Ring,
    event: Ring,
    accepted: Receiver<UnixStream>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let reactor = Reactor::new().unwrap();
        let mut device = Vsock::new(&VsockConfig { cid: 3, path: dir.path().join("v") }).unwrap();
        let (accepter, accepted) = channel();
        device.set_accepter(Box::new(move |_, connection| {
            accepter.send(UnixStream::from(connection.try_clone_to_owned()?)).map_err(io::Error::other)
        }));
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let rings = [Ring::new(0), Ring::new(1), Ring::new(2)];
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        device
            .activate(Active {
                memory: memory.clone(),
                queues: rings.iter().zip(QUEUE_SIZES).map(|(ring, size)| ring.queue(size)).collect(),
                interrupt: Interrupt::new(line.try_clone().unwrap()),
                poller: reactor.poller(0),
                features: 0,
                kicks: (0..3).map(|_| Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())).collect(),
            })
            .unwrap();
        let [rx, tx, event] = rings;
        Self { dir, _reactor: reactor, device, memory, line, rx, tx, event, accepted }
    }

    /// Sends `bytes`, laid out over descriptors of the given lengths.
    fn send(&mut self, bytes: &[u8], lengths: &[u32]) {
        self.memory.write_slice(bytes, GuestAddress(BUFFERS)).unwrap();
        let mut at = BUFFERS;
        let mut parts = vec![];
        for len in lengths {
            parts.push((at, *len));
            at += u64::from(*len);
        }
        self.tx.offer(&self.memory, &parts, 0);
        self.device.queue_event(TX).unwrap();
    }

    /// Offers a receive chain whose descriptors have the given lengths, and returns its used count, length and header afterwards.
    fn receive(&mut self, lengths: &[u32]) -> (u16, u32, Header) {
        let start = BUFFERS + 0x2_0000;
        let mut at = start;
        let mut parts = vec![];
        for len in lengths {
            parts.push((at, *len));
            at += u64::from(*len);
        }
        self.rx.offer(&self.memory, &parts, WRITABLE);
        self.device.queue_event(RX).unwrap();
        let (count, written) = self.rx.used(&self.memory);
        let mut bytes = [0; Header::SIZE];
        self.memory.read_slice(&mut bytes, GuestAddress(start)).unwrap();
        (count, written, Header::parse(&bytes))
    }
}

fn packet(op: Op, len: u32) -> Vec<u8> {
    let header = Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: 1000,
        dst_port: 806,
        len,
        kind: TYPE_STREAM,
        op: op as u16,
        buf_alloc: 1000,
        ..Header::default()
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend((0..len).map(|at| at as u8));
    bytes
}

#[test]
fn framing_is_the_drivers_choice() {
    let mut world = World::new();
    world.send(&packet(Op::Request, 0), &[10, 0, 34]);
    let mut host = world.accepted.try_recv().unwrap();
    // The answer waited for a descriptor.
    let (count, written, header) = world.receive(&[20, 24, 100]);
    assert_eq!((count, written), (1, 44));
    assert_eq!((header.op, header.dst_port, header.dst_cid), (Op::Response as u16, 1000, 3));
    assert_ne!(world.line.read().unwrap(), 0);

    world.send(&packet(Op::Data, 100), &[44, 100]);
    world.send(&packet(Op::Data, 100), &[144]);
    world.send(&packet(Op::Data, 100), &[43, 1, 50, 7, 43]);
    let mut data = [0; 300];
    host.read_exact(&mut data).unwrap();
    assert!(data.chunks(100).all(|chunk| chunk.iter().enumerate().all(|(at, byte)| *byte == at as u8)));
    assert_eq!(world.tx.used(&world.memory).0, 4);

    std::io::Write::write_all(&mut host, b"answer").unwrap();
    world.device.event(0, Readiness::READ).unwrap();
    let (count, written, header) = world.receive(&[4096]);
    assert_eq!((count, written, header.len), (2, 50, 6));
}

#[test]
fn chains_that_are_no_packets_are_returned_and_do_no_harm() {
    let mut world = World::new();
    // Too short for a header; writable; outside of memory.
    world.send(&packet(Op::Request, 0), &[43]);
    world.tx.offer(&world.memory, &[(BUFFERS, 44)], WRITABLE);
    world.tx.offer(&world.memory, &[(u64::MAX - 10, 44)], 0);
    world.tx.offer(&world.memory, &[(MEMORY as u64 - 20, 44)], 0);
    world.device.queue_event(TX).unwrap();
    assert_eq!(world.tx.used(&world.memory).0, 4);
    assert!(!world.device.muxer.has_packet());

    // More payload announced than there is, or than may be: refused.
    world.send(&packet(Op::Data, 100), &[44, 99]);
    let mut huge = packet(Op::Data, 0);
    huge[24..28].fill(0xff);
    world.send(&huge, &[44]);
    // A receive chain without room for data is returned empty, and so is one that is not writable; then the resets come.
    assert_eq!(world.receive(&[44]).1, 0);
    world.rx.offer(&world.memory, &[(BUFFERS, 4096)], 0);
    let (count, written, header) = world.receive(&[4096]);
    assert_eq!((count, written, header.op), (3, 44, Op::Reset as u16));
    let (count, written, header) = world.receive(&[4096]);
    assert_eq!((count, written, header.op), (4, 44, Op::Reset as u16));
    // Nothing to say: the chain stays the driver's until there is.
    assert_eq!(world.receive(&[4096]).0, 4);
    assert_eq!(world.device.muxer.counters().malformed, 2);
}

#[test]
fn a_broken_ring_is_an_error_and_a_reset_forgets_everything() {
    let mut world = World::new();
    world.send(&packet(Op::Request, 0), &[44]);
    assert_eq!(world.device.muxer.stream_count(), 1);
    world.memory.write_obj(0x8000u16, GuestAddress(world.tx.base + Ring::AVAILABLE + 2)).unwrap();
    assert!(matches!(world.device.queue_event(TX), Err(DeviceError::Queue { queue: TX, .. })));
    world.device.reset();
    assert_eq!(world.device.muxer.stream_count(), 0);
    assert!(!world.device.muxer.has_packet());
    world.device.queue_event(RX).unwrap();
    world.device.event(0, Readiness::READ).unwrap();
}

#[test]
fn a_restored_guest_is_told_that_its_streams_are_gone_and_one_without_any_is_not() {
    let mut world = World::new();
    assert_eq!(world.device.save(), [0]);
    world.send(&packet(Op::Request, 0), &[44]);
    let saved = world.device.save();
    assert_eq!(saved, [1]);

    let room = BUFFERS + 0x3_0000;
    let offer = |world: &mut World| {
        world.memory.write_obj(u32::MAX, GuestAddress(room)).unwrap();
        world.event.offer(&world.memory, &[(room, 4)], WRITABLE);
    };
    let mut clone = World::new();
    offer(&mut clone);
    clone.device.restore(&[0]).unwrap();
    clone.device.queue_event(EVENT).unwrap();
    assert_eq!(clone.event.used(&clone.memory).0, 0);

    // There is room for two; one is enough, both are taken.
    offer(&mut clone);
    clone.device.restore(&saved).unwrap();
    assert_eq!(clone.event.used(&clone.memory), (2, 0));
    assert_eq!(clone.memory.read_obj::<u32>(GuestAddress(room)).unwrap(), 0);
    assert_ne!(clone.line.read().unwrap(), 0);
    assert_eq!(clone.device.save(), [1], "it still has to hear it");
    // Who connects meanwhile waits until the guest has reset what it had.
    let (ours, _host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    clone.device.connect(ours.into(), 808).unwrap();
    assert_eq!(clone.receive(&[4096]).0, 0);
    clone.device.queue_event(EVENT).unwrap();
    assert_eq!(clone.receive(&[4096]).0, 0, "a spurious kick says nothing");
    offer(&mut clone);
    clone.device.queue_event(EVENT).unwrap();
    assert_eq!(clone.event.used(&clone.memory).0, 2, "its buffer stays there for the next time");
    assert_eq!(clone.rx.used(&clone.memory).0, 1);
    let mut bytes = [0; Header::SIZE];
    clone.memory.read_slice(&mut bytes, GuestAddress(BUFFERS + 0x2_0000)).unwrap();
    assert_eq!(Header::parse(&bytes).op, Op::Request as u16);

    // A driver that has not made room is told when it does. Nonsense is no loss.
    let mut late = World::new();
    late.device.restore(&saved).unwrap();
    offer(&mut late);
    late.device.queue_event(EVENT).unwrap();
    assert_eq!(late.event.used(&late.memory), (1, 4));
    late.device.restore(&[]).unwrap();
    assert_eq!(late.device.save(), [0]);
}

#[test]
fn the_machine_connects_when_the_driver_is_up() {
    let mut world = World::new();
    let (ours, mut host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    world.device.connect(ours.into(), 809).unwrap();
    assert_eq!(world.device.connections(), 1);
    let (_, _, request) = world.receive(&[4096]);
    assert_eq!((request.op, request.dst_port), (Op::Request as u16, 809));
    world.device.reset();
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0, "a reset ends it");
    let (ours, _host) = UnixStream::pair().unwrap();
    assert_eq!(world.device.connect(ours.into(), 809).unwrap_err().kind(), io::ErrorKind::NotConnected);
}

#[test]
fn the_configuration_is_the_context_id() {
    let world = World::new();
    let mut bytes = [0xff; 12];
    world.device.read_config(0, &mut bytes);
    assert_eq!(bytes, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut bytes = [0xff; 4];
    world.device.read_config(4, &mut bytes);
    assert_eq!(bytes, [0; 4]);
    let reserved = VsockConfig { cid: 2, path: world.dir.path().join("w") };
    assert!(matches!(Vsock::new(&reserved), Err(VsockError::ReservedCid { cid: 2 })));
}
