//! For fuzzing: everything that a guest, or whoever wrote a snapshot or a configuration, can say, as functions of bytes. `fuzz/` has a target for
//! each; the inputs it found are replayed by an ordinary test. Part of no product: feature `fuzz`, or tests.
//!
//! A [`Bench`] is one device behind its register page, with 64 KiB of guest memory. It is made once a process and reset before each input,
//! as a guest resets it. The input is a program of what a driver can do: registers, configuration space, descriptors, notifications.
#![forbid(unsafe_code)]
#![expect(missing_docs, reason = "names say what they do")]
#![allow(clippy::expect_used, reason = "not part of a product")]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use commonage_net_demux_api::ring::{Endpoint, Ring};
use commonage_vmm_api::{MachineConfig, RateLimit, VsockConfig};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, Image};
use crate::devices::console::Console;
use crate::event;
use crate::reactor::{Reactor, Readiness};
use crate::snapshot::{State, codec, touched};
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::console::VirtioConsole;
use crate::virtio::mmio::{KICK_TOKENS, Transport, TransportState};
use crate::virtio::net::Net;
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::virtio::{Memory, VirtioDevice};

/// A target's name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 11] = [
    ("blk", blk),
    ("net", net),
    ("pmem", pmem),
    ("rng", rng),
    ("balloon", balloon),
    ("console", console),
    ("vsock", vsock),
    ("vsock_packets", vsock_packets),
    ("snapshot", snapshot),
    ("boot", boot),
    ("config", config),
];

const MEMORY: u64 = 0x1_0000;
/// Each queue's rings, three parts of [`PART`].
const RINGS: u64 = 0x1800;
const PART: u64 = 0x800;
const BUFFERS: u64 = 0x9000;
const QUEUE_SIZE: u32 = 16;
/// Most steps of one input.
const STEPS: usize = 256;

/// The input, byte by byte; zeroes after its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    /// An address, most often within the buffers.
    fn address(&mut self) -> u64 {
        match self.byte() {
            0 => u64::from(self.u32()) << 32 | u64::from(self.u32()),
            1 => MEMORY - u64::from(self.byte()),
            high => BUFFERS + u64::from(high % 0x60) * 0x100 + u64::from(self.byte()),
        }
    }
}

/// A device, its registers and its guest's memory.
struct Bench {
    transport: Transport,
    memory: Memory,
    queues: u64,
    /// Watches what the device polls, and something that is always ready, so that it never waits.
    reactor: Reactor,
    _always: EventFd,
}

impl Bench {
    fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("memory");
        let reactor = Reactor::new().expect("an event loop");
        let queues = device.queue_sizes().len() as u64;
        let transport = Transport::new(device, memory.clone(), reactor.poller(0)).expect("a transport");
        let always = EventFd::new(0).expect("an event");
        always.write(1).expect("room in a fresh event");
        reactor.poller(1).add(event::borrow(&always), 0, Readiness::READ).expect("watched");
        Self { transport, memory, queues, reactor, _always: always }
    }

    /// One round of the event loop.
    fn serve(&mut self) {
        let events: Vec<_> = self.reactor.wait().expect("events").filter(|event| event.source == 0).collect();
        for event in events {
            self.transport.event(event.token, event.readiness);
        }
    }

    fn register(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        // Beyond memory nothing is written.
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
    }

    fn notify(&mut self, queue: u64) {
        let token = KICK_TOKENS | (queue % self.queues.max(1)) as u32;
        self.transport.event(token, Readiness::READ);
    }

    /// Does what a well-behaved driver does first. `without` are feature bits to leave out.
    fn start(&mut self, without: u64) {
        self.register(0x70, 0);
        self.put(0, &[0; MEMORY as usize]);
        self.register(0x70, 1);
        self.register(0x70, 3);
        for half in 0..2 {
            self.register(0x14, half);
            let offered = self.read(0x10);
            self.register(0x24, half);
            // VERSION_1 is always taken.
            let kept = offered & !((without >> (32 * half)) as u32) | offered & half;
            self.register(0x20, kept);
        }
        self.register(0x70, 11);
        for queue in 0..self.queues {
            let base = (queue * RINGS) as u32;
            self.register(0x30, queue as u32);
            let most = self.read(0x34);
            let settings = [
                (0x38, QUEUE_SIZE.min(most)),
                (0x80, base),
                (0x84, 0),
                (0x90, base + PART as u32),
                (0x94, 0),
                (0xa0, base + 2 * PART as u32),
                (0xa4, 0),
                (0x44, 1),
            ];
            for (offset, value) in settings {
                self.register(offset, value);
            }
        }
        self.register(0x70, 15);
    }

    fn descriptor(&self, queue: u64, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(queue * RINGS + index % u64::from(QUEUE_SIZE) * 16, &bytes);
    }

    fn offer(&self, queue: u64, head: u16) {
        let available = queue * RINGS + PART;
        let index: u16 = self.memory.read_obj(GuestAddress(available + 2)).unwrap_or(0);
        self.put(available + 4 + u64::from(index % QUEUE_SIZE as u16) * 2, &head.to_le_bytes());
        self.put(available + 2, &index.wrapping_add(1).to_le_bytes());
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let queue = |input: &mut Input<'_>, queues: u64| u64::from(input.byte()) % queues.max(1);
        match input.byte() % 12 {
            0 => {
                let offset = u64::from(input.byte()) * 4;
                let value = input.u32();
                self.register(offset, value);
            }
            1 => {
                let (offset, len) = (u64::from(input.u16() % 0x1000), input.byte() % 9);
                self.transport.read(offset, &mut vec![0; len.into()]);
            }
            2 => {
                let offset = 0x100 + u64::from(input.byte());
                let bytes: Vec<u8> = (0..input.byte() % 9).map(|_| input.byte()).collect();
                self.transport.write(offset, &bytes);
            }
            3 => {
                let at = u64::from(input.u16());
                let bytes: Vec<u8> = (0..input.byte() % 64).map(|_| input.byte()).collect();
                self.put(at, &bytes);
            }
            4 | 5 => {
                let queue = queue(input, self.queues);
                let (index, address, len) = (u64::from(input.byte()), input.address(), input.byte());
                // Most lengths are small, some are any.
                let len = if len == 0xff { input.u32() } else { u32::from(len) * 8 };
                let (flags, next) = (u16::from(input.byte() % 8), u16::from(input.byte() % 32));
                self.descriptor(queue, index, address, len, flags, next);
            }
            6 => {
                let queue = queue(input, self.queues);
                let head = u16::from(input.byte() % 32);
                self.offer(queue, head);
            }
            7 | 8 => {
                let queue = queue(input, self.queues);
                self.notify(queue);
            }
            9 if input.byte().is_multiple_of(8) => {
                self.transport.event(u32::from(input.byte()), Readiness::BOTH)
            }
            9 => self.serve(),
            10 => {
                // A whole chain: readable pieces, then writable ones, with bytes in the first.
                let queue = queue(input, self.queues);
                let (readable, writable) = (input.byte() % 4, input.byte() % 4);
                let count = u64::from(readable + writable).max(1);
                for index in 0..count {
                    let next = if index + 1 < count { 1 } else { 0 };
                    let write = if index >= u64::from(readable) { 2 } else { 0 };
                    let (address, len) = (BUFFERS + index * 0x400, u32::from(input.byte()) * 4);
                    self.descriptor(queue, index, address, len, next | write, index as u16 + 1);
                }
                let bytes: Vec<u8> = (0..input.byte() % 64).map(|_| input.byte()).collect();
                self.put(BUFFERS, &bytes);
                self.offer(queue, 0);
                self.notify(queue);
            }
            _ => {
                // A pause, as for a snapshot.
                let _ = self.transport.quiesce();
                self.transport.save();
            }
        }
    }

    /// Runs `program` on a device that was just started.
    fn run(&mut self, program: &[u8]) {
        let mut input = Input(program);
        let without = u64::from(input.byte()) << (input.byte() % 64);
        self.start(without);
        for _ in 0..STEPS {
            if input.0.is_empty() {
                break;
            }
            self.step(&mut input);
        }
        // Every device can be started again after whatever happened.
        self.start(0);
        assert_eq!(self.read(0x70), 15, "the device does not start any more");
        self.register(0x70, 0);
    }
}

/// A target: one bench a process (a thread, in tests), made by `make`.
macro_rules! device {
    ($name:ident, $make:expr) => {
        pub fn $name(program: &[u8]) {
            thread_local!(static BENCH: RefCell<Bench> = RefCell::new(Bench::new(Box::new($make))));
            BENCH.with_borrow_mut(|bench| bench.run(program));
        }
    };
}

const IMAGE: u64 = 0x1_0000;

fn memory_file(len: u64) -> File {
    let fd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a file in memory");
    let file = File::from(fd);
    file.set_len(len).expect("a file of that length");
    file
}

fn new_blk() -> Blk {
    // So fast that nothing is held back for long, so slow that it happens.
    let rate = RateLimit { bytes_per_second: 1 << 34, requests_per_second: 1 << 20 };
    Blk::new(memory_file(IMAGE), Some(rate)).expect("a disk")
}

fn new_net() -> Net {
    // The other end stays as it is: nobody takes what the guest sends.
    let (endpoint, peer) = Ring::with_capacity(4096).expect("a ring");
    let mut peer: Endpoint = Endpoint::open(peer).expect("its other end");
    while peer.send(&[0x55; 100]).is_ok() {}
    std::mem::forget(peer);
    Net::new([2, 0, 0, 0, 0, 1], endpoint)
}

/// A path that nobody else uses.
fn own_path(kind: &str) -> PathBuf {
    let thread = format!("{:?}", std::thread::current().id());
    let thread: String = thread.chars().filter(char::is_ascii_digit).collect();
    std::env::temp_dir().join(format!("fuzz-{kind}-{}-{thread}", std::process::id()))
}

fn new_vsock(kind: &str) -> Vsock {
    let path = own_path(kind);
    let mut vsock = Vsock::new(&VsockConfig { cid: 3, path: path.clone() }).expect("a vsock");
    // Nobody connects; nothing is left behind.
    let _ = std::fs::remove_file(path);
    // A host that says something, reads nothing, and forgets all but the last few connections.
    let mut kept = VecDeque::new();
    vsock.set_accepter(Box::new(move |port, end| {
        if port % 4 == 3 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let mut stream = UnixStream::from(end.try_clone_to_owned()?);
        stream.write_all(&[0x55; 300])?;
        kept.push_back(stream);
        if kept.len() > 4 {
            kept.pop_front();
        }
        Ok(())
    }));
    vsock
}

fn new_console() -> VirtioConsole {
    let path = own_path("console");
    let console = Console::file(&path).expect("a console");
    let _ = std::fs::remove_file(path);
    VirtioConsole::new(console)
}

device!(blk, new_blk());
device!(net, new_net());
device!(pmem, Pmem::new(GuestAddress(1 << 32), 1 << 21));
device!(rng, Rng::default());
device!(balloon, Balloon::new(64));
device!(console, new_console());
device!(vsock, new_vsock("vsock"));

/// Packets one after the other, each as long as its first byte says, on a vsock whose guest always has room to receive.
pub fn vsock_packets(packets: &[u8]) {
    thread_local!(static BENCH: RefCell<Bench> = RefCell::new(Bench::new(Box::new(new_vsock("packets")))));
    const RX: u64 = 0;
    const TX: u64 = 1;
    const HEADER: usize = 44;
    BENCH.with_borrow_mut(|bench| {
        bench.start(0);
        let mut input = Input(packets);
        for turn in 0..STEPS as u64 {
            if input.0.is_empty() {
                break;
            }
            let extra = usize::from(input.byte());
            let mut packet: Vec<u8> = (0..HEADER + extra).map(|_| input.byte()).collect();
            // The addresses that a guest cannot lie about for long are right, most often.
            if extra & 1 == 0 {
                packet[..8].copy_from_slice(&3u64.to_le_bytes());
                packet[8..16].copy_from_slice(&2u64.to_le_bytes());
                packet[24..28].copy_from_slice(&(extra as u32).to_le_bytes());
                packet[28..30].copy_from_slice(&1u16.to_le_bytes());
            }
            bench.put(BUFFERS, &packet);
            bench.descriptor(TX, 0, BUFFERS, packet.len() as u32, 0, 0);
            bench.descriptor(RX, turn, BUFFERS + 0x1000, 0x400, 2, 0);
            bench.offer(RX, turn as u16 % QUEUE_SIZE as u16);
            bench.offer(TX, 0);
            bench.notify(TX);
            bench.notify(RX);
            bench.serve();
        }
        bench.register(0x70, 0);
    });
}

/// A state file as it is and with its envelope made right, and a list of pages.
pub fn snapshot(file: &[u8]) {
    let _ = State::decode(file);
    if let Ok(state) = State::decode(&codec::seal(file)) {
        assert_eq!(codec::open(&state.encode()).ok(), Some(file), "what was read is not what is written");
        state.devices.iter().for_each(restore);
    }
    if let Ok(saved) = TransportState::read(&mut codec::Reader::new(file)) {
        restore(&saved);
    }
    let _ = touched::decode(&codec::seal(file), Default::default(), 1 << 14);
}

/// Goes on with a device's state on each kind of device.
fn restore(saved: &TransportState) {
    let devices: [fn() -> Box<dyn VirtioDevice>; 3] = [
        || Box::new(Rng::default()),
        || Box::new(Balloon::new(64)),
        || Box::new(Pmem::new(GuestAddress(1 << 32), 1 << 21)),
    ];
    for device in devices {
        let mut bench = Bench::new(device());
        if bench.transport.restore(saved).is_ok() {
            (0..bench.queues).for_each(|queue| bench.notify(queue));
            bench.serve();
        }
    }
}

/// A kernel, and half of it as an initrd and a command line.
pub fn boot(kernel: &[u8]) {
    thread_local!(static MEMORY: Memory = Memory::from_ranges(&[(GuestAddress(0), 32 << 20)]).expect("memory"));
    let image = |bytes: &[u8]| {
        let file = memory_file(0);
        file.write_all_at(bytes, 0).expect("written");
        Image { path: PathBuf::from("fuzz"), file }
    };
    let half = kernel.get(kernel.len() / 2..).unwrap_or(&[]);
    let command_line = String::from_utf8_lossy(half);
    MEMORY.with(|memory| {
        let vcpus = kernel.first().map_or(1, |byte| byte % 8 + 1);
        let _ = boot::load(memory, 32, vcpus, &mut image(kernel), Some(&mut image(half)), &command_line);
    });
}

/// A machine's description.
pub fn config(json: &[u8]) {
    if let Ok(config) = serde_json::from_slice::<MachineConfig>(json) {
        let text = serde_json::to_vec(&config).expect("what was read can be written");
        assert_eq!(serde_json::from_slice::<MachineConfig>(&text).ok(), Some(config));
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use proptest::prelude::*;

    fn target(wanted: &str) -> fn(&[u8]) {
        TARGETS.into_iter().find(|(name, _)| *name == wanted).map(|(_, run)| run).unwrap()
    }

    /// Every input that fuzzing kept: what reaches most of the code, and what once failed.
    #[test]
    fn every_case_that_was_found_is_harmless() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
        for (name, run) in TARGETS {
            let cases =
                std::fs::read_dir(directory.join(name)).unwrap_or_else(|_| panic!("no cases for {name}"));
            for case in cases {
                run(&std::fs::read(case.unwrap().path()).unwrap());
            }
        }
    }

    proptest! {
        #[test]
        fn random_programs_are_harmless(
            which in 0..TARGETS.len(),
            program in prop::collection::vec(any::<u8>(), 0..1000),
        ) {
            target(TARGETS[which].0)(&program);
        }
    }
}
