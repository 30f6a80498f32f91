//! The control socket, spoken to by clients over real sockets, with a guest's vsock played packet by packet.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;

use commonage_net_demux_api::ring::{Endpoint, Ring};
use commonage_vmm_api::{RunState, VsockConfig};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::devices::console::Console;
use crate::devices::serial::{Line, SerialPort};
use crate::reactor::Reactor;
use crate::virtio::VirtioDevice;
use crate::virtio::mmio::Transport;
use crate::virtio::testing::{BUFFERS, Driver};
use crate::virtio::vsock::packet::{HOST_CID, Header, Op, TYPE_STREAM};

const STATUS: Response = Response::Status { pid: 1, uptime_ms: 2, state: RunState::Running };
const LINE_STATUS: u16 = crate::layout::COM1 + 5;

struct Rig {
    control: Control,
    reactor: Reactor,
    path: std::path::PathBuf,
    bus: Arc<Bus>,
    guest: Driver,
    _directory: tempfile::TempDir,
}

impl Rig {
    fn new(ring: Option<RingFds>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let guest = Driver::new(&[64, 64, 4]);
        let vsock = Vsock::new(&VsockConfig { cid: 3, path: at("vsock.sock") }).unwrap();
        let vsock = Transport::new(Box::new(vsock), guest.memory.clone(), guest.reactor.poller(1)).unwrap();
        let serial = SerialPort::new(
            Line::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            Console::file(&at("log")).unwrap(),
        );
        let bus = Bus::new(serial, vec![vsock]);
        let reactor = Reactor::new().unwrap();
        let path = at("control.sock");
        let control =
            Control::new(listen(&path).unwrap(), ring, Arc::clone(&bus), reactor.poller(0)).unwrap();
        Self { control, reactor, path, bus, guest, _directory: directory }
    }

    /// One round of the event loop; the commands that came of it, status answered.
    fn turn(&mut self) -> Vec<Command> {
        let events: Vec<_> = self.reactor.wait().unwrap().collect();
        events.into_iter().for_each(|event| self.control.event(event.token));
        let mut commands = Vec::new();
        while let Some((client, command)) = self.control.next() {
            match command {
                Command::Status => self.control.answer(client, &STATUS),
                command => commands.push(command),
            }
        }
        commands
    }

    fn client(&mut self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        self.turn();
        stream
    }

    /// A client that has asked for something.
    fn asks(&mut self, request: &Request) -> UnixStream {
        let client = self.client();
        channel::send(&client, request, &[], Patience::Yes).unwrap();
        assert!(self.turn().is_empty());
        client
    }

    /// The guest's vsock driver comes up.
    fn guest_comes_up(&mut self) {
        let (active, _) = self.guest.activate();
        self.bus.with_device(|vsock: &mut Vsock| vsock.activate(active).unwrap()).unwrap();
    }

    /// The guest sends a packet without payload.
    fn guest_sends(&mut self, header: Header) {
        self.guest.write(BUFFERS, &header.encode());
        self.guest.chain(1, &[(BUFFERS, Header::SIZE as u32, false)]);
        self.bus.with_device(|vsock: &mut Vsock| vsock.queue_event(1).unwrap()).unwrap();
    }

    /// What the guest gets, if anything.
    fn guest_receives(&mut self) -> Header {
        self.guest.write(BUFFERS + 0x100, &[0; Header::SIZE]);
        self.guest.chain(0, &[(BUFFERS + 0x100, 4096, true)]);
        self.bus.with_device(|vsock: &mut Vsock| vsock.queue_event(0).unwrap()).unwrap();
        Header::parse(&self.guest.read(BUFFERS + 0x100, Header::SIZE).try_into().unwrap())
    }
}

fn request(port: u32) -> Header {
    Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: 1000,
        dst_port: port,
        kind: TYPE_STREAM,
        op: Op::Request as u16,
        buf_alloc: 1 << 16,
        ..Header::default()
    }
}

fn response(stream: &UnixStream) -> Response {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

/// A response with the descriptors beside it.
fn response_with(stream: &UnixStream) -> (Response, Vec<OwnedFd>) {
    let (mut line, mut descriptors) = ([0; 256], Vec::new());
    let count = channel::receive(stream, &mut line, &mut descriptors).unwrap();
    (serde_json::from_slice(&line[..count]).unwrap(), descriptors)
}

/// A descriptor to be sent, and the other end, which tells when the last copy of it is closed.
fn traced() -> (UnixStream, UnixStream) {
    UnixStream::pair().unwrap()
}

fn is_closed(mut stream: &UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0))
}

#[test]
fn status_stop_and_nonsense_are_answered() {
    let mut rig = Rig::new(None);
    let mut client = rig.client();
    client.write_all(b"{\"request\":\"status\"}\n").unwrap();
    assert!(rig.turn().is_empty());
    assert_eq!(response(&client), STATUS);
    for request in [&b"{\"request\":\"ring\"}\n"[..], b"\xff\n", b"{\"request\":\"fly\"}\n"] {
        client.write_all(request).unwrap();
        assert!(rig.turn().is_empty());
        assert!(matches!(response(&client), Response::Error { .. }));
    }
    client.write_all(b"{\"request\":\"st").unwrap();
    assert!(rig.turn().is_empty());
    client.write_all(b"op\"}\n").unwrap();
    assert!(matches!(rig.turn()[..], [Command::Stop { grace: Duration::ZERO }]));
    assert_eq!(response(&client), Response::Stopping);
}

#[test]
fn the_ring_arrives_as_three_descriptors_as_often_as_asked() {
    let (mut ours, fds) = Ring::create().unwrap();
    let mut rig = Rig::new(Some(fds));
    for round in 0..2 {
        let mut client = rig.client();
        client.write_all(b"{\"request\":\"ring\"}\n").unwrap();
        rig.turn();
        let (answer, fds) = response_with(&client);
        assert_eq!(answer, Response::Ring);
        let mut demux = Endpoint::open(RingFds::from_vec(fds).unwrap()).unwrap();
        ours.send(&[round; 60]).unwrap();
        let mut frame = [0; 1514];
        assert_eq!(demux.recv(&mut frame), Some(60));
        assert_eq!(frame[0], round);
    }
}

#[test]
fn those_who_wait_are_told_of_the_end_and_those_who_left_are_forgotten() {
    let mut rig = Rig::new(None);
    let mut waiting = rig.client();
    let gone = rig.client();
    waiting.write_all(b"{\"request\":\"wait\"}\n").unwrap();
    rig.turn();
    drop(gone);
    rig.turn();
    assert_eq!(rig.control.clients.len(), 1);
    rig.bus.console().clone().write_all(b"last words").unwrap();
    rig.control.finish(&ExitReason::TripleFault);
    let console = "last words".to_owned();
    assert_eq!(response(&waiting), Response::Exited { reason: ExitReason::TripleFault, console });
}

#[test]
fn endless_lines_and_crowds_are_bounded() {
    let mut rig = Rig::new(None);
    let mut client = rig.client();
    client.write_all(&[b'x'; MAX_LINE + 1]).unwrap();
    while !rig.control.clients.is_empty() {
        rig.turn();
    }
    let crowd: Vec<_> = (0..MAX_CLIENTS + 5).map(|_| rig.client()).collect();
    assert_eq!(rig.control.clients.len(), MAX_CLIENTS);
    drop(crowd);
}

#[test]
fn the_socket_is_for_its_owner_only_and_replaces_an_old_one() {
    let rig = Rig::new(None);
    let mode = std::fs::metadata(&rig.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    Control::new(listen(&rig.path).unwrap(), None, Arc::clone(&rig.bus), rig.reactor.poller(1)).unwrap();
}

#[test]
fn descriptors_belong_to_their_request_and_are_closed_when_none_wants_them() {
    let mut rig = Rig::new(None);
    let client = rig.client();
    let ((state, state_end), (memory, memory_end)) = (traced(), traced());
    let inode = |file: &dyn AsFd| rustix::fs::fstat(file.as_fd()).unwrap().st_ino;
    let (state_inode, memory_inode) = (inode(&state), inode(&memory));
    // In one go with another request, and the last in two pieces.
    (&client).write_all(b"{\"request\":\"status\"}\n").unwrap();
    let both = [state.as_fd(), memory.as_fd()];
    channel::send(&client, &Request::Snapshot, &both, Patience::Yes).unwrap();
    (&client).write_all(b"{\"request\":").unwrap();
    let mut commands = Vec::new();
    while commands.is_empty() {
        commands = rig.turn();
    }
    let [Command::Snapshot { state: got, memory: got_memory }] = &commands[..] else {
        panic!("{commands:?}")
    };
    assert_eq!((inode(got), inode(got_memory)), (state_inode, memory_inode));
    drop(commands);
    assert_eq!(response(&client), STATUS);
    (&client).write_all(b"\"status\"}\n").unwrap();
    assert!(rig.turn().is_empty());
    assert_eq!(response(&client), STATUS);

    channel::send(&client, &Request::Touched, &[state.as_fd()], Patience::Yes).unwrap();
    let commands = rig.turn();
    assert!(matches!(&commands[..], [Command::Touched { file }] if inode(file) == state_inode));
    drop(commands);

    // Too few, too many, none, unwanted.
    for (request, files) in
        [(Request::Snapshot, &both[..1]), (Request::Touched, &both[..]), (Request::Snapshot, &[])]
    {
        channel::send(&client, &request, files, Patience::Yes).unwrap();
        assert!(rig.turn().is_empty());
        assert!(matches!(response(&client), Response::Error { .. }));
    }
    channel::send(&client, &Request::Status, &both, Patience::Yes).unwrap();
    assert!(rig.turn().is_empty());
    assert_eq!(response(&client), STATUS);
    drop((state, memory));
    assert!(is_closed(&state_end) && is_closed(&memory_end), "no copy is left");
}

#[test]
fn a_hoard_of_descriptors_costs_the_client_its_connection() {
    let mut rig = Rig::new(None);
    let client = rig.client();
    let (hoarded, end) = traced();
    for _ in 0..2 {
        // Never a whole line.
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        let three = [hoarded.as_fd(); 3];
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&three)));
        let part = [io::IoSlice::new(b"{")];
        rustix::net::sendmsg(&client, &part, &mut control, rustix::net::SendFlags::empty()).unwrap();
        rig.turn();
    }
    assert!(rig.control.clients.is_empty());
    drop(hoarded);
    assert!(is_closed(&client) && is_closed(&end));
}

#[test]
fn a_client_that_does_not_read_its_answers_is_dropped() {
    let mut rig = Rig::new(None);
    let mut client = rig.client();
    client.set_nonblocking(true).unwrap();
    while !rig.control.clients.is_empty() {
        let _ = client.write(b"{\"request\":\"status\"}\n");
        rig.turn();
    }
}

#[test]
fn the_guests_connections_go_to_the_client_that_accepts() {
    let mut rig = Rig::new(None);
    rig.guest_comes_up();
    rig.guest_sends(request(806));
    assert_eq!(rig.guest_receives(), request(806).reset(), "nobody accepts");

    let first = rig.asks(&Request::Accept);
    rig.guest_sends(request(806));
    assert_eq!(rig.guest_receives().op, Op::Response as u16);
    let (connection, mut descriptors) = response_with(&first);
    assert_eq!(connection, Response::Connection { port: 806 });
    let mut host = UnixStream::from(descriptors.pop().unwrap());
    assert!(descriptors.is_empty());
    host.write_all(b"hello").unwrap();
    rig.bus.with_device(|vsock: &mut Vsock| vsock.event(0, Readiness::READ).unwrap()).unwrap();
    let data = rig.guest_receives();
    assert_eq!((data.op, data.len), (Op::Data as u16, 5));

    // Another takes over; the first hears of it, and keeps the connection that it has.
    let second = rig.asks(&Request::Accept);
    assert!(is_closed(&first));
    rig.guest_sends(Header { src_port: 1001, ..request(807) });
    assert_eq!(rig.guest_receives().op, Op::Response as u16);
    let (connection, descriptors) = response_with(&second);
    assert_eq!((connection, descriptors.len()), (Response::Connection { port: 807 }, 1));
    host.write_all(b"still there").unwrap();

    // It is not a client that may ask for more.
    (&second).write_all(b"{\"request\":\"status\"}\n").unwrap();
    rig.turn();
    assert!(is_closed(&second));
    rig.guest_sends(Header { src_port: 1002, ..request(808) });
    while rig.guest_receives().dst_port != 1002 {}
    assert_eq!(rig.bus.with_device(|vsock: &mut Vsock| vsock.connections()), Some(2));
}

#[test]
fn the_console_is_heard_and_typed_on() {
    let mut rig = Rig::new(None);
    rig.bus.console().clone().write_all(b"login: ").unwrap();
    let mut client = rig.client();
    // What follows the request is typed already.
    client.write_all(b"{\"request\":\"console\"}\nroot\n").unwrap();
    assert!(rig.turn().is_empty());
    let mut heard = vec![0; 256];
    let count = client.read(&mut heard).unwrap();
    heard.truncate(count);
    let rest = heard.split_off(heard.iter().position(|byte| *byte == b'\n').unwrap() + 1);
    assert_eq!(serde_json::from_slice::<Response>(&heard).unwrap(), Response::Console);
    assert_eq!(rest, b"login: ");
    client.write_all(b"{}\n").unwrap();
    rig.turn();
    let mut typed = Vec::new();
    let mut byte = [0];
    while {
        rig.bus.read_port(LINE_STATUS, &mut byte);
        byte[0] & 1 == 1
    } {
        rig.bus.read_port(crate::layout::COM1, &mut byte);
        typed.push(byte[0]);
    }
    assert_eq!(typed, b"root\n{}\n");
    drop(client);
    rig.turn();
    assert!(rig.control.clients.is_empty());
}

#[test]
fn a_guest_that_listens_has_its_grace_and_one_that_does_not_has_none() {
    let mut rig = Rig::new(None);
    let grace = Duration::from_secs(3600);
    assert!(!rig.control.ask_guest(grace), "its driver is not up");
    rig.guest_comes_up();
    let client = rig.client();
    channel::send(&client, &Request::Stop { grace_ms: 3_600_000 }, &[], Patience::Yes).unwrap();
    assert!(matches!(rig.turn()[..], [Command::Stop { grace: asked }] if asked == grace));
    assert_eq!(response(&client), Response::Stopping);
    assert!(rig.control.ask_guest(grace));
    let asked = rig.guest_receives();
    assert_eq!((asked.op, asked.dst_port), (Op::Request as u16, POWER_PORT));
    let answer = |op: Op| Header { op: op as u16, buf_alloc: 1 << 16, ..asked.reset() };
    rig.guest_sends(answer(Op::Response));
    assert!(rig.turn().is_empty(), "it is on its way");
    // The guest ends the connection without ending itself: it still has its grace.
    rig.guest_sends(answer(Op::Reset));
    assert!(rig.turn().is_empty());
    // A second request with less patience.
    assert!(rig.control.ask_guest(Duration::from_millis(1)));
    assert!(matches!(rig.turn()[..], [Command::Stop { grace: Duration::ZERO }]));

    let mut rig = Rig::new(None);
    rig.guest_comes_up();
    assert!(rig.control.ask_guest(grace));
    let asked = rig.guest_receives();
    rig.guest_sends(asked.reset());
    assert!(matches!(rig.turn()[..], [Command::Stop { grace: Duration::ZERO }]), "nobody listens");
}

#[test]
fn without_a_vsock_nobody_accepts() {
    let mut rig = Rig::new(None);
    let console = rig.bus.console().clone();
    let serial = SerialPort::new(Line::new(EventFd::new(EFD_NONBLOCK).unwrap()), console);
    rig.control.bus = Bus::new(serial, Vec::new());
    let client = rig.asks(&Request::Accept);
    assert!(matches!(response(&client), Response::Error { .. }));
    assert!(!rig.control.ask_guest(Duration::from_secs(1)));
}
