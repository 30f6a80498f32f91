//! The table of streams with real Unix sockets, and a guest played packet by packet.
//!
//! Unix sockets of one process change state within the call that causes it, so nothing here waits: what a peer did is there to be polled.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;

use super::connection::{BUF_ALLOC, CLOSE_TIMEOUT, CONNECT_TIMEOUT};
use super::muxer::*;
use super::packet::{
    HOST_CID, Header, MAX_PAYLOAD, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};

const CID: u64 = 3;

struct World {
    dir: TempDir,
    muxer: Muxer,
    now: Instant,
    accepted: Arc<Mutex<VecDeque<(u32, UnixStream)>>>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let muxer = Muxer::new(CID, &dir.path().join("v")).unwrap();
        Self { dir, muxer, now: Instant::now(), accepted: Arc::default() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// From now on the guest's connections to ports below 900 are accepted.
    fn listen(&mut self) {
        let accepted = Arc::clone(&self.accepted);
        self.muxer.set_accepter(Box::new(move |port, connection| {
            if port >= 900 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let connection = connection.try_clone_to_owned()?.into();
            accepted.lock().unwrap().push_back((port, connection));
            Ok(())
        }));
    }

    /// The client's end of the next connection accepted.
    fn accept(&mut self) -> UnixStream {
        let (_, host) = self.accepted.lock().unwrap().pop_front().unwrap();
        host.set_nonblocking(true).unwrap();
        host
    }

    fn poll(&mut self) {
        // A round takes no more than some of the events; no test here causes more than a few rounds.
        for _ in 0..8 {
            self.muxer.poll(self.now).unwrap();
        }
    }

    fn give(&mut self, header: Header) {
        self.muxer.from_guest(&header, &vec![7; header.len as usize]);
    }

    /// All packets for the guest, with their payloads.
    fn take_all(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.poll();
        let mut room = vec![0; 4052];
        let mut packets = vec![];
        while let Some(header) = self.muxer.to_guest(&mut room, self.now) {
            packets.push((header, room[..header.len as usize].to_vec()));
        }
        packets
    }

    fn take_one(&mut self) -> Header {
        let mut packets = self.take_all();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0).0
    }

    /// A stream from guest port 1000 to host port 806.
    fn connect(&mut self) -> UnixStream {
        self.listen();
        self.give(packet(Op::Request));
        assert_eq!(self.take_one().op, Op::Response as u16);
        self.accept()
    }

    /// A host program that asks for guest port 808.
    fn ask(&mut self) -> (UnixStream, Header) {
        let mut host = UnixStream::connect(self.path()).unwrap();
        host.write_all(b"CONNECT 808\n").unwrap();
        let request = self.take_one();
        assert_eq!((request.op, request.dst_port), (Op::Request as u16, 808));
        host.set_nonblocking(true).unwrap();
        (host, request)
    }
}

fn packet(op: Op) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 1000,
        dst_port: 806,
        kind: TYPE_STREAM,
        op: op as u16,
        buf_alloc: 256 * 1024,
        ..Header::default()
    }
}

fn answer(to: &Header, op: Op) -> Header {
    Header { op: op as u16, buf_alloc: 256 * 1024, ..to.reset() }
}

fn is_eof(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0))
}

#[test]
fn the_guest_is_refused_at_once_while_nobody_accepts_or_who_does_has_no_room() {
    let mut world = World::new();
    world.give(packet(Op::Request));
    assert_eq!(world.take_one(), packet(Op::Request).reset());
    world.listen();
    let busy = Header { dst_port: 900, ..packet(Op::Request) };
    world.give(busy);
    assert_eq!(world.take_one(), busy.reset());
    assert_eq!(world.muxer.counters().refused, 2);
    assert_eq!(world.muxer.stream_count(), 0);
    assert!(!world.muxer.is_known_to_guest());
    world.give(packet(Op::Request));
    assert_eq!(world.take_one().op, Op::Response as u16);
    assert_eq!(world.accepted.lock().unwrap().pop_front().unwrap().0, 806);
}

#[test]
fn the_machine_itself_reaches_the_guest() {
    let mut world = World::new();
    let (ours, mut host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    host.set_nonblocking(true).unwrap();
    world.muxer.connect_host(ours.into(), 809, world.now).unwrap();
    assert!(world.muxer.is_known_to_guest());
    let request = world.take_one();
    assert_eq!((request.op, request.dst_port), (Op::Request as u16, 809));
    world.give(answer(&request, Op::Response));
    let mut line = [0; 7];
    host.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 809\n");

    let (ours, mut host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    world.muxer.connect_host(ours.into(), 810, world.now).unwrap();
    let request = world.take_one();
    world.give(answer(&request, Op::Reset));
    assert!(is_eof(&mut host), "refused");
}

#[test]
fn a_host_program_reaches_the_guest() {
    let mut world = World::new();
    let (mut host, request) = world.ask();
    host.write_all(b"early").unwrap();
    assert!(world.take_all().is_empty(), "not before the guest has answered");
    world.give(answer(&request, Op::Response));
    let packets = world.take_all();
    assert_eq!(packets.len(), 1);
    assert_eq!(packets[0].1, b"early");
    let mut line = [0; 7];
    host.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 808\n");
    world.give(Header { len: 3, ..answer(&request, Op::Data) });
    let mut data = [0; 3];
    host.read_exact(&mut data).unwrap();
    assert_eq!(data, [7; 3]);
}

#[test]
fn a_guest_that_refuses_or_does_not_answer_closes_the_client() {
    let mut world = World::new();
    let (mut host, request) = world.ask();
    world.give(answer(&request, Op::Reset));
    assert!(is_eof(&mut host));
    assert_eq!(world.muxer.stream_count(), 0);

    let (mut host, request) = world.ask();
    world.now += CONNECT_TIMEOUT;
    let reset = world.take_one();
    assert_eq!((reset.op, reset.src_port, reset.dst_port), (Op::Reset as u16, request.src_port, 808));
    assert!(is_eof(&mut host));
    assert_eq!(world.muxer.stream_count(), 0);
    // The answer that comes too late finds nobody.
    world.give(answer(&request, Op::Response));
    assert_eq!(world.take_one().op, Op::Reset as u16);
}

#[test]
fn clients_that_say_nothing_are_few_and_leave() {
    let mut world = World::new();
    let mut silent: Vec<UnixStream> =
        (0..MAX_GREETINGS + 1).map(|_| UnixStream::connect(world.path()).unwrap()).collect();
    silent.iter().for_each(|client| client.set_nonblocking(true).unwrap());
    let mut last = silent.pop().unwrap();
    last.write_all(b"CONNECT 808\n").unwrap();
    assert!(world.take_all().is_empty(), "it waits its turn");
    world.now += GREETING_TIMEOUT;
    world.poll();
    assert!(silent.iter_mut().all(is_eof));
    assert_eq!(world.take_one().op, Op::Request as u16);
}

#[test]
fn the_hosts_half_close_comes_after_its_bytes_and_leaves_the_other_half() {
    let mut world = World::new();
    let mut host = world.connect();
    host.write_all(&[9; 10_000]).unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let packets = world.take_all();
    let (end, data) = packets.split_last().unwrap();
    assert_eq!((end.0.op, end.0.flags), (Op::Shutdown as u16, SHUTDOWN_SEND));
    assert_eq!(data.iter().map(|(_, payload)| payload.len()).sum::<usize>(), 10_000);
    // The guest still speaks.
    world.give(Header { len: 5, ..packet(Op::Data) });
    let mut answer = [0; 5];
    host.read_exact(&mut answer).unwrap();
    // When it ends too, so does the stream.
    world.give(Header { flags: SHUTDOWN_SEND, ..packet(Op::Shutdown) });
    assert!(is_eof(&mut host));
    let end = world.take_one();
    assert_eq!((end.op, end.flags), (Op::Shutdown as u16, SHUTDOWN_BOTH));
    world.give(packet(Op::Reset));
    assert_eq!(world.muxer.stream_count(), 0);
}

#[test]
fn the_guests_half_close_comes_after_its_bytes_and_leaves_the_other_half() {
    let mut world = World::new();
    let mut host = world.connect();
    // More than the socket's buffer holds, so that the end must wait for the rest.
    let mut sent = 0;
    let mut told = 0;
    for _ in 0..100 {
        let len = (BUF_ALLOC - (sent - told)).min(30_000);
        if len == 0 {
            break;
        }
        world.give(Header { len, ..packet(Op::Data) });
        sent += len;
        told = world.take_all().last().map_or(told, |(header, _)| header.fwd_cnt);
    }
    assert!(sent > told, "the socket takes everything: the test tests nothing");
    world.give(Header { flags: SHUTDOWN_SEND, ..packet(Op::Shutdown) });
    let mut received = 0;
    let mut buffer = vec![0; 5000];
    loop {
        match host.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => received += count,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        world.poll();
    }
    assert_eq!(received, sent as usize);
    host.write_all(b"still here").unwrap();
    let packets = world.take_all();
    assert_eq!(packets.iter().find(|(header, _)| header.op == Op::Data as u16).unwrap().1, b"still here");
}

#[test]
fn a_guest_that_closes_is_answered_at_once_and_its_bytes_are_not_lost() {
    let mut world = World::new();
    let mut host = world.connect();
    world.give(Header { len: 1000, ..packet(Op::Data) });
    world.give(Header { flags: SHUTDOWN_BOTH, ..packet(Op::Shutdown) });
    assert_eq!(world.take_one(), packet(Op::Reset).reset());
    let mut received = vec![];
    host.read_to_end(&mut received).unwrap();
    assert_eq!(received, [7; 1000]);
    assert_eq!(world.muxer.stream_count(), 0);
}

#[test]
fn a_guest_that_closes_early_leaves_the_host_all_it_sent_and_the_name_free() {
    let mut world = World::new();
    let mut host = world.connect();
    let mut sent = 0;
    let mut told = 0;
    while sent - told < BUF_ALLOC {
        let len = (BUF_ALLOC - (sent - told)).min(60_000);
        world.give(Header { len, ..packet(Op::Data) });
        sent += len;
        told = world.take_all().last().map_or(told, |(header, _)| header.fwd_cnt);
    }
    world.give(packet(Op::Reset));
    assert!(world.take_all().is_empty(), "a reset is not answered");
    assert_eq!(world.muxer.stream_count(), 1);
    // The same name, while the former bearer still drains.
    let _second = world.connect();
    assert_eq!(world.muxer.stream_count(), 2);
    let mut received = 0;
    let mut buffer = vec![0; 5000];
    loop {
        match host.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => received += count,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        world.poll();
    }
    assert_eq!(received, sent as usize);
    assert_eq!(world.muxer.stream_count(), 1);
}

#[test]
fn a_host_that_dies_is_heard_to_its_last_byte() {
    let mut world = World::new();
    world.listen();
    world.give(Header { buf_alloc: 100, ..packet(Op::Request) });
    world.take_all();
    let mut host = world.accept();
    host.write_all(&[9; 250]).unwrap();
    drop(host);
    let mut received = 0;
    let mut requests = 0;
    loop {
        let packets = world.take_all();
        let Some((last, _)) = packets.last() else { panic!("it went silent after {received} bytes") };
        received += packets.iter().map(|(_, payload)| payload.len()).sum::<usize>();
        requests += packets.iter().filter(|(header, _)| header.op == Op::CreditRequest as u16).count();
        if last.op == Op::Shutdown as u16 && last.flags == SHUTDOWN_BOTH {
            break;
        }
        world.give(Header { buf_alloc: 100, fwd_cnt: received as u32, ..packet(Op::CreditUpdate) });
    }
    assert_eq!(received, 250);
    assert!(requests > 0, "a guest without credit must be asked");
    // The guest's reset ends it; without one, ours does.
    assert_eq!(world.muxer.stream_count(), 1);
    world.now += CLOSE_TIMEOUT;
    assert_eq!(world.take_one().op, Op::Reset as u16);
    assert_eq!(world.muxer.stream_count(), 0);
}

#[test]
fn a_deaf_guest_makes_the_host_hear_of_it() {
    let mut world = World::new();
    let mut host = world.connect();
    world.give(Header { flags: SHUTDOWN_RECEIVE, ..packet(Op::Shutdown) });
    assert_eq!(host.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    world.give(Header { len: 4, ..packet(Op::Data) });
    let mut data = [0; 4];
    host.read_exact(&mut data).unwrap();
}

#[test]
fn megabytes_echo() {
    let mut world = World::new();
    let mut host = world.connect();
    let total = 5_000_000usize;
    let pattern = |at: usize| (at % 253) as u8;
    let (mut sent, mut told, mut received) = (0usize, 0usize, 0usize);
    let mut echo: Vec<u8> = vec![];
    while received < total {
        let credit = BUF_ALLOC as usize - (sent - told);
        let len = credit.min(total - sent).min(MAX_PAYLOAD);
        if len > 0 {
            let payload: Vec<u8> = (sent..sent + len).map(pattern).collect();
            let header = Header { len: len as u32, fwd_cnt: received as u32, ..packet(Op::Data) };
            world.muxer.from_guest(&header, &payload);
            sent += len;
        } else {
            world.give(Header { fwd_cnt: received as u32, ..packet(Op::CreditUpdate) });
        }
        let mut buffer = vec![0; 70_000];
        if let Ok(count) = host.read(&mut buffer) {
            echo.extend(&buffer[..count]);
        }
        if let Ok(count) = host.write(&echo) {
            echo.drain(..count);
        }
        for (header, payload) in world.take_all() {
            told = header.fwd_cnt as usize;
            for (offset, got) in payload.iter().enumerate() {
                assert_eq!(*got, pattern(received + offset));
            }
            received += payload.len();
        }
    }
}

#[test]
fn streams_and_resets_are_bounded() {
    let mut world = World::new();
    world.listen();
    let mut hosts = vec![];
    for port in 0..MAX_STREAMS as u32 + 50 {
        world.give(Header { src_port: port, ..packet(Op::Request) });
        if world.muxer.counters().refused == 0 {
            hosts.push(world.accept());
        }
    }
    assert_eq!(world.muxer.stream_count(), MAX_STREAMS);
    let answers = world.take_all();
    assert_eq!(answers.iter().filter(|(header, _)| header.op == Op::Reset as u16).count(), 50);

    for port in 0..3 * MAX_RESETS as u32 {
        world.give(Header { src_port: 100_000 + port, ..packet(Op::Data) });
    }
    assert_eq!(world.take_all().len(), MAX_RESETS);
    assert_eq!(world.muxer.counters().resets_lost, 2 * MAX_RESETS as u64);

    // A host client has no place either, and is told so.
    let mut client = UnixStream::connect(world.path()).unwrap();
    client.write_all(b"CONNECT 808\n").unwrap();
    client.set_nonblocking(true).unwrap();
    world.poll();
    assert!(is_eof(&mut client));
    world.muxer.reset();
    assert_eq!(world.muxer.stream_count(), 0);
    assert!(hosts.iter_mut().all(is_eof));
}

#[test]
fn one_busy_stream_does_not_starve_the_others() {
    let mut world = World::new();
    world.listen();
    let mut hosts = vec![];
    for port in 0..10 {
        world.give(Header { src_port: port, ..packet(Op::Request) });
        hosts.push(world.accept());
    }
    world.take_all();
    for host in &mut hosts {
        host.write_all(&[1; 20_000]).unwrap();
    }
    world.poll();
    let mut room = vec![0; 1000];
    let mut turns: HashMap<u32, u32> = HashMap::new();
    for _ in 0..50 {
        let header = world.muxer.to_guest(&mut room, world.now).unwrap();
        *turns.entry(header.dst_port).or_default() += 1;
    }
    assert_eq!(turns.len(), 10);
    assert!(turns.values().all(|turns| *turns == 5), "{turns:?}");
}

#[test]
fn packets_that_are_not_as_they_should_be() {
    let mut world = World::new();
    let mut host = world.connect();
    // Not from this guest: not even answered.
    world.give(Header { src_cid: 4, ..packet(Op::Data) });
    assert!(world.take_all().is_empty());
    // Another destination, another type, an operation that does not exist: refused, and the stream is not concerned.
    for wrong in [
        Header { dst_cid: 9, ..packet(Op::Request) },
        Header { kind: 2, ..packet(Op::Request) },
        Header { src_port: 5, op: 77, ..packet(Op::Request) },
        Header { src_port: 5, ..packet(Op::Shutdown) },
    ] {
        world.give(wrong);
        assert_eq!(world.take_one(), wrong.reset());
    }
    assert_eq!(world.muxer.stream_count(), 1);
    // A payload shorter than announced: the stream has a hole, so it ends.
    world.muxer.from_guest(&Header { len: 10, ..packet(Op::Data) }, &[]);
    assert_eq!(world.take_one(), packet(Op::Reset).reset());
    assert!(is_eof(&mut host));
    assert_eq!(world.muxer.stream_count(), 0);
}

#[derive(Debug, Clone)]
enum Act {
    Guest(Header, bool),
    Client(Vec<u8>),
    HostWrites(usize, usize),
    HostReads(usize, usize),
    HostEnds(usize),
    HostDies(usize),
    Takes(usize, usize),
    Waits(u64),
}

fn act() -> impl Strategy<Value = Act> {
    let header = (
        prop_oneof![20 => Just(CID), 1 => any::<u64>()],
        prop_oneof![20 => Just(HOST_CID), 1 => any::<u64>()],
        // Few ports, so that packets meet their streams; the host's own ports among them.
        0..6u32,
        prop_oneof![3 => 806..809u32, 1 => Just(900u32), 1 => (1u32 << 30)..(1 << 30) + 4],
        prop_oneof![8 => 0..2000u32, 2 => 0..70_000u32, 1 => any::<u32>()],
        prop_oneof![20 => Just(TYPE_STREAM), 1 => any::<u16>()],
        prop_oneof![20 => 1..8u16, 4 => Just(1u16), 6 => Just(5u16), 1 => any::<u16>()],
        prop_oneof![8 => 0..4u32, 1 => any::<u32>()],
        prop_oneof![4 => Just(65536u32), 1 => 0..100u32, 1 => any::<u32>()],
        prop_oneof![4 => Just(0u32), 1 => 0..100_000u32, 1 => any::<u32>()],
    )
        .prop_map(|(src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt)| {
            Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt }
        });
    prop_oneof![
        20 => (header, prop::bool::weighted(0.95)).prop_map(|(header, whole)| Act::Guest(header, whole)),
        2 => (0..6u32).prop_map(|port| Act::Client(format!("CONNECT {port}\nhello").into_bytes())),
        1 => prop::collection::vec(any::<u8>(), 0..50).prop_map(Act::Client),
        4 => (any::<usize>(), 0..9000usize).prop_map(|(which, count)| Act::HostWrites(which, count)),
        4 => (any::<usize>(), 0..90_000usize).prop_map(|(which, count)| Act::HostReads(which, count)),
        1 => any::<usize>().prop_map(Act::HostEnds),
        1 => any::<usize>().prop_map(Act::HostDies),
        6 => (0..20usize, 1..5000usize).prop_map(|(count, room)| Act::Takes(count, room)),
        1 => (0..4u64).prop_map(Act::Waits),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn nothing_a_guest_or_host_does_breaks_it(acts in prop::collection::vec(act(), 0..300)) {
        let mut world = World::new();
        world.listen();
        let mut hosts: Vec<UnixStream> = vec![];
        let payload = vec![7; MAX_PAYLOAD];
        for act in acts {
            match act {
                Act::Guest(header, whole) => {
                    let payload = payload.get(..header.len as usize).filter(|_| whole).unwrap_or_default();
                    world.muxer.from_guest(&header, payload);
                }
                Act::Client(request) => {
                    let mut client = UnixStream::connect(world.path()).unwrap();
                    client.set_nonblocking(true).unwrap();
                    let _ = client.write(&request);
                    hosts.push(client);
                }
                Act::HostWrites(which, count) if !hosts.is_empty() => {
                    let which = which % hosts.len();
                    let _ = hosts[which].write(&payload[..count]);
                }
                Act::HostReads(which, count) if !hosts.is_empty() => {
                    let which = which % hosts.len();
                    let _ = hosts[which].read(&mut vec![0; count]);
                }
                Act::HostEnds(which) if !hosts.is_empty() => {
                    let which = which % hosts.len();
                    let _ = hosts[which].shutdown(std::net::Shutdown::Write);
                }
                Act::HostDies(which) if !hosts.is_empty() => drop(hosts.swap_remove(which % hosts.len())),
                Act::Takes(count, room) => {
                    let mut room = vec![0; room];
                    for _ in 0..count {
                        let Some(header) = world.muxer.to_guest(&mut room, world.now) else { break };
                        prop_assert!(header.len as usize <= room.len());
                        prop_assert_eq!(header.dst_cid, CID);
                        prop_assert!(Op::from_number(header.op).is_some());
                    }
                }
                Act::Waits(seconds) => world.now += Duration::from_secs(seconds),
                Act::HostWrites(..) | Act::HostReads(..) | Act::HostEnds(_) | Act::HostDies(_) => {}
            }
            world.poll();
            for (_, host) in std::mem::take(&mut *world.accepted.lock().unwrap()) {
                host.set_nonblocking(true).unwrap();
                hosts.push(host);
            }
            prop_assert!(world.muxer.stream_count() <= MAX_STREAMS);
        }
        // When every host is gone and the guest gives credit without end or answers by reset, nothing remains.
        hosts.clear();
        for _ in 0..100_000 {
            if world.muxer.stream_count() == 0 {
                break;
            }
            let packets = world.take_all();
            if packets.is_empty() {
                world.now += CLOSE_TIMEOUT;
            }
            for (header, _) in packets {
                if header.op != Op::Reset as u16 {
                    world.give(answer(&header, Op::Reset));
                }
            }
            // Streams that wait for credit have asked for it long ago: end them from the guest's side.
            for guest_port in 0..6 {
                for host_port in (806..809).chain((1 << 30)..(1 << 30) + 64) {
                    let header = Header { src_port: guest_port, dst_port: host_port, ..packet(Op::Reset) };
                    world.give(header);
                }
            }
        }
        prop_assert_eq!(world.muxer.stream_count(), 0);
    }
}
