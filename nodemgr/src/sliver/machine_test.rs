//! Rings over a real socket, and what a machine that lies gets.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::os::fd::AsFd as _;
use tokio::net::UnixListener;

use super::*;

/// Answers one request with `line` and `fds` descriptors.
async fn answer(listener: &UnixListener, line: &[u8], fds: usize) {
    let (stream, _) = listener.accept().await.unwrap();
    let mut request = BufReader::new(stream);
    request.read_line(&mut String::new()).await.unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let fds = vec![null.as_fd(); fds];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let iov = [io::IoSlice::new(line)];
    rustix::net::sendmsg(request.get_ref(), &iov, &mut control, SendFlags::NOSIGNAL).unwrap();
}

#[tokio::test]
async fn a_ring_is_exactly_three_descriptors() {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control.sock");
    let listener = UnixListener::bind(&control).unwrap();
    let machine = Machine { control, ended: oneshot::channel().1 };
    let good = b"{\"response\":\"ring\"}\n";
    let (ring, ()) = tokio::join!(machine.ring(), answer(&listener, good, 3));
    ring.unwrap();
    for (line, fds) in
        [(&good[..], 2), (good, 4), (b"{\"response\":\"stopping\"}\n", 3), (b"nonsense\n", 3), (b"{", 3)]
    {
        let (ring, ()) = tokio::join!(machine.ring(), answer(&listener, line, fds));
        assert!(ring.is_err(), "{line:?} with {fds}");
    }
}

#[tokio::test]
async fn a_killed_machine_is_noticed_and_an_orderly_end_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control.sock");
    let listener = UnixListener::bind(&control).unwrap();
    let status = b"{\"response\":\"status\",\"pid\":1,\"uptime_ms\":1}\n";
    for (last, wanted) in [
        (&b"{\"response\":\"exited\",\"reason\":{\"kind\":\"triple-fault\"}}\n"[..], "triple fault"),
        (b"x", "process was ended"),
    ] {
        let adopted = async { Machine::adopt(&control).await.unwrap().ended().await };
        let machine = async {
            answer(&listener, status, 0).await;
            answer(&listener, last, 0).await;
        };
        let (why, ()) = tokio::join!(adopted, machine);
        assert!(why.contains(wanted), "{why}");
    }
    drop(listener);
    assert!(Machine::adopt(&control).await.is_err());
}
