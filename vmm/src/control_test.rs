//! The control socket, spoken to by a client.

use super::*;
use crate::reactor::Reactor;
use commonage_net_demux_api::ring::{Endpoint, Ring};
use commonage_vmm_api::RunState;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;

const STATUS: Response = Response::Status { pid: 1, uptime_ms: 2, state: RunState::Running };

struct Rig {
    control: Control,
    reactor: Reactor,
    path: std::path::PathBuf,
    _directory: tempfile::TempDir,
}

impl Rig {
    fn new(ring: Option<RingFds>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let reactor = Reactor::new().unwrap();
        let control = Control::new(&path, ring, reactor.poller(0)).unwrap();
        Self { control, reactor, path, _directory: directory }
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
}

fn response(stream: &UnixStream) -> Response {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
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
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut line = [0; 64];
        let mut buffers = [io::IoSliceMut::new(&mut line)];
        let received =
            rustix::net::recvmsg(&client, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
        assert_eq!(&line[..received.bytes], b"{\"response\":\"ring\"}\n");
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
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
    rig.control.finish(&ExitReason::TripleFault, "last words");
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
    Control::new(&rig.path, None, rig.reactor.poller(1)).unwrap();
}
