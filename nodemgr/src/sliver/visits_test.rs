//! A machine that hands over its guest's connections, honestly and otherwise.

use std::io::{IoSlice, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream as Std;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::*;

struct Guest {
    _dir: tempfile::TempDir,
    listener: UnixListener,
    path: PathBuf,
}

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        Self { listener: UnixListener::bind(&path).unwrap(), path, _dir: dir }
    }

    async fn subscribed(&self) -> UnixStream {
        let mut stream = BufReader::new(self.listener.accept().await.unwrap().0);
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        assert_eq!(line, "{\"request\":\"accept\"}\n");
        stream.into_inner()
    }
}

fn hand_over(stream: &UnixStream, port: u32, fds: &[BorrowedFd<'_>]) {
    let line = format!("{{\"response\":\"connection\",\"port\":{port}}}\n");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    rustix::net::sendmsg(stream, &[IoSlice::new(line.as_bytes())], &mut control, SendFlags::NOSIGNAL)
        .unwrap();
}

/// A connection to `port` whose guest has said `said` and hung up.
fn connection(stream: &UnixStream, port: u32, said: &[u8]) {
    let (mut guest, host) = Std::pair().unwrap();
    guest.write_all(said).unwrap();
    hand_over(stream, port, &[host.as_fd()]);
}

#[tokio::test]
async fn calls_are_passed_on_in_order_and_other_ports_closed() {
    let guest = Guest::new();
    let (sender, mut calls) = mpsc::channel(4);
    let (visits, stream) =
        tokio::join!(Visits::receive(guest.path.clone(), Some(sender), None), guest.subscribed());
    connection(&stream, PORT, b"first");
    connection(&stream, 4711, b"no such service");
    connection(&stream, CONTROL_PORT, b"{\"type\":\"waiting\"}\n");
    // What is no socket is skipped.
    let null = std::fs::File::open("/dev/null").unwrap();
    hand_over(&stream, PORT, &[null.as_fd()]);
    connection(&stream, PORT, b"second");
    for wanted in ["first", "second"] {
        let mut said = String::new();
        calls.recv().await.unwrap().read_to_string(&mut said).await.unwrap();
        assert_eq!(said, wanted);
    }
    drop(visits);
    assert!(calls.recv().await.is_none());
}

#[tokio::test]
async fn only_a_knock_is_a_knock() {
    let guest = Guest::new();
    let (knock, knocked) = oneshot::channel();
    let receive = Visits::receive(guest.path.clone(), None, Some(knock));
    let (visits, stream) = tokio::join!(receive, guest.subscribed());
    connection(&stream, PORT, b"GET / HTTP/1.1\r\n");
    connection(&stream, CONTROL_PORT, b"");
    connection(&stream, CONTROL_PORT, b"nonsense\n");
    connection(&stream, CONTROL_PORT, &[b' '; 4096]);
    connection(&stream, CONTROL_PORT, b"{\"type\":\"waiting\"}\n");
    knocked.await.unwrap();
    drop(visits);
}

#[tokio::test]
async fn a_machine_that_lies_is_subscribed_at_anew_and_leaks_nothing() {
    let guest = Guest::new();
    let (sender, mut calls) = mpsc::channel(4);
    let (_visits, stream) =
        tokio::join!(Visits::receive(guest.path.clone(), Some(sender), None), guest.subscribed());
    // A connection without its descriptor.
    hand_over(&stream, PORT, &[]);
    let mut rest = Vec::new();
    let mut stream = stream;
    assert_eq!(stream.read_to_end(&mut rest).await.unwrap(), 0, "the host hangs up");
    let stream = guest.subscribed().await;
    // Descriptors without end that no line speaks of.
    let (_a, b) = Std::pair().unwrap();
    let mut sent = 0;
    while sent < 1000 && stream.writable().await.is_ok() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [b.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match rustix::net::sendmsg(&stream, &[IoSlice::new(b" ")], &mut control, flags) {
            Ok(_) => sent += 1,
            Err(rustix::io::Errno::AGAIN) => tokio::task::yield_now().await,
            Err(_) => break,
        }
    }
    assert!(sent < 1000, "it takes them all");
    let mut stream = guest.subscribed().await;
    connection(&stream, PORT, b"still served");
    let mut said = String::new();
    calls.recv().await.unwrap().read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "still served");
    stream.shutdown().await.unwrap();
}
