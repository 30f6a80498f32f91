//! For tests: a driver's side of a device, with rings in guest memory that the test lays out itself.
#![expect(missing_docs, reason = "test code whose names say what it does")]

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use std::sync::Arc;

use super::{Active, Interrupt, Memory};
use crate::reactor::Reactor;

/// Guest memory in tests, bytes.
pub const MEMORY: u64 = 0x10_0000;
/// Queue `q`'s rings begin at `q * RINGS`; each part has 4 KiB.
pub const RINGS: u64 = 0x4000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Where tests may put buffers.
pub const BUFFERS: u64 = 0x2_0000;

/// Descriptor flags.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;

/// The driver.
pub struct Driver {
    pub memory: Memory,
    pub reactor: Reactor,
    sizes: Vec<u16>,
    free: Vec<u16>,
}

impl Driver {
    pub fn new(sizes: &[u16]) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let reactor = Reactor::new().unwrap();
        Self { memory, reactor, sizes: sizes.to_vec(), free: vec![0; sizes.len()] }
    }

    /// What the device is given. The interrupt line is the caller's to look at.
    pub fn activate(&self) -> (Active, Interrupt) {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(event());
        let queues = self.sizes.iter().enumerate().map(|(index, size)| {
            let base = index as u64 * RINGS;
            let mut queue = Queue::new(*size).unwrap();
            queue.try_set_desc_table_address(GuestAddress(base)).unwrap();
            queue.try_set_avail_ring_address(GuestAddress(base + AVAIL)).unwrap();
            queue.try_set_used_ring_address(GuestAddress(base + USED)).unwrap();
            queue.set_ready(true);
            assert!(queue.is_valid(&self.memory));
            queue
        });
        let active = Active {
            memory: self.memory.clone(),
            queues: queues.collect(),
            interrupt: interrupt.clone(),
            poller: self.reactor.poller(0),
            features: 1 << 32,
            kicks: self.sizes.iter().map(|_| Arc::new(event())).collect(),
        };
        (active, interrupt)
    }

    /// Writes descriptor `index` of `queue` as it is.
    pub fn descriptor(&self, queue: usize, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let descriptor = RawDescriptor::from(Descriptor::new(addr, len, flags, next));
        let at = queue as u64 * RINGS + u64::from(index) * 16;
        self.memory.write_obj(descriptor, GuestAddress(at)).unwrap();
    }

    /// Makes the chain that starts at `head` available.
    pub fn offer(&self, queue: usize, head: u16) {
        let avail = queue as u64 * RINGS + AVAIL;
        let at: u16 = self.memory.read_obj(GuestAddress(avail + 2)).unwrap();
        let slot = u64::from(at % self.sizes[queue]);
        self.memory.write_obj(head, GuestAddress(avail + 4 + 2 * slot)).unwrap();
        self.memory.write_obj(at.wrapping_add(1), GuestAddress(avail + 2)).unwrap();
    }

    /// Offers a well-formed chain of (address, length, device writes).
    pub fn chain(&mut self, queue: usize, parts: &[(u64, u32, bool)]) {
        let size = self.sizes[queue];
        let head = self.free[queue];
        for (at, (addr, len, write)) in parts.iter().enumerate() {
            let index = (head + at as u16) % size;
            let next = (index + 1) % size;
            let flags = if *write { WRITE } else { 0 } | if at + 1 < parts.len() { NEXT } else { 0 };
            self.descriptor(queue, index, *addr, *len, flags, next);
        }
        self.free[queue] = (head + parts.len() as u16) % size;
        self.offer(queue, head);
    }

    /// Chains made available so far, up to 65535.
    pub fn offered(&self, queue: usize) -> u64 {
        let avail = queue as u64 * RINGS + AVAIL;
        u64::from(self.memory.read_obj::<u16>(GuestAddress(avail + 2)).unwrap())
    }

    /// What the device asks for with EVENT_IDX: to be notified when the chain of this number is offered.
    pub fn notify_at(&self, queue: usize) -> u16 {
        let used = queue as u64 * RINGS + USED;
        self.memory.read_obj(GuestAddress(used + 4 + 8 * u64::from(self.sizes[queue]))).unwrap()
    }

    /// Empties the rings, as a driver does that begins again.
    pub fn forget(&mut self, queue: usize) {
        self.write(queue as u64 * RINGS, &[0; RINGS as usize]);
        self.free[queue] = 0;
    }

    /// The used ring's (head, written), from the beginning.
    pub fn used(&self, queue: usize) -> Vec<(u32, u32)> {
        let used = queue as u64 * RINGS + USED;
        let count: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
        (0..u64::from(count))
            .map(|at| {
                let entry = used + 4 + 8 * (at % u64::from(self.sizes[queue]));
                let field = |offset| self.memory.read_obj(GuestAddress(entry + offset)).unwrap();
                (field(0), field(4))
            })
            .collect()
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

/// What a hostile driver writes: descriptors, available entries, an available index.
#[derive(Debug, Clone)]
pub struct Hostile {
    pub descriptors: Vec<(u64, u32, u16, u16)>,
    pub heads: Vec<u16>,
    pub available: u16,
    pub bytes: Vec<u8>,
}

/// Addresses and flags that are nearly right, so that the checks behind the first one are reached too.
pub fn hostile() -> impl proptest::strategy::Strategy<Value = Hostile> {
    use proptest::prelude::*;
    let address = prop_oneof![
        8 => BUFFERS..BUFFERS + 0x100,
        1 => 0..MEMORY + 0x1000,
        1 => MEMORY - 4..MEMORY + 4,
        1 => u64::MAX - 16..=u64::MAX,
        1 => any::<u64>(),
    ];
    let length =
        prop_oneof![6 => Just(16u32), 3 => 0u32..1100, 1 => Just(512), 1 => Just(1), 1 => any::<u32>()];
    // NEXT, WRITE, INDIRECT.
    let flags = prop_oneof![8 => 0u16..4, 2 => 0u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0u16..16, 1 => any::<u16>()];
    (
        prop::collection::vec((address, length, flags, next.clone()), 16),
        prop::collection::vec(next, 16),
        prop_oneof![8 => 0u16..=16, 1 => any::<u16>()],
        prop::collection::vec(prop_oneof![3 => Just(0u8), 1 => 0u8..16, 1 => any::<u8>()], 0x200),
    )
        .prop_map(|(descriptors, heads, available, bytes)| Hostile {
            descriptors,
            heads,
            available,
            bytes,
        })
}

impl Hostile {
    /// Lays it out as `queue`.
    pub fn apply(&self, driver: &Driver, queue: usize) {
        for (index, (addr, len, flags, next)) in self.descriptors.iter().enumerate() {
            driver.descriptor(queue, index as u16, *addr, *len, *flags, *next);
        }
        let avail = queue as u64 * RINGS + AVAIL;
        for (at, head) in self.heads.iter().enumerate() {
            driver.memory.write_obj(*head, GuestAddress(avail + 4 + 2 * at as u64)).unwrap();
        }
        driver.write(BUFFERS, &self.bytes);
        driver.memory.write_obj(self.available, GuestAddress(avail + 2)).unwrap();
    }
}
