//! The control protocol over a real socket, and what a machine that lies gets.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::*;

/// Takes one connection and answers each request on it with a line and some descriptors.
async fn answer(listener: &UnixListener, answers: &[(&[u8], usize)]) -> Vec<String> {
    let (stream, _) = listener.accept().await.unwrap();
    let mut stream: BufReader<UnixStream> = BufReader::new(stream);
    let mut asked = Vec::new();
    for (line, fds) in answers {
        let mut request = String::new();
        stream.read_line(&mut request).await.unwrap();
        asked.push(request.trim_end().to_owned());
        let null = File::open("/dev/null").unwrap();
        let fds = vec![null.as_fd(); *fds];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(stream.get_ref(), &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)
            .unwrap();
    }
    asked
}

#[tokio::test]
async fn a_ring_is_exactly_three_descriptors() {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control.sock");
    let listener = UnixListener::bind(&control).unwrap();
    let machine = Machine { control, ended: None };
    let good = b"{\"response\":\"ring\"}\n";
    let answers = [(&good[..], 3)];
    let (ring, asked) = tokio::join!(machine.ring(), answer(&listener, &answers));
    ring.unwrap();
    assert_eq!(asked, [r#"{"request":"ring"}"#]);
    for (line, fds) in
        [(&good[..], 2), (good, 4), (b"{\"response\":\"stopping\"}\n", 3), (b"nonsense\n", 3), (b"{", 3)]
    {
        let answers = [(line, fds)];
        let (ring, _) = tokio::join!(machine.ring(), answer(&listener, &answers));
        assert!(ring.is_err(), "{line:?} with {fds}");
    }
}

#[tokio::test]
async fn files_go_beside_a_request_and_refusals_come_back_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control.sock");
    let listener = UnixListener::bind(&control).unwrap();
    let machine = Machine { control, ended: None };
    let file = |name: &str| File::create(dir.path().join(name)).unwrap();
    let (state, memory) = (file("state"), file("memory"));
    let taken = async {
        let (stream, _) = listener.accept().await.unwrap();
        let stream = stream.into_std().unwrap();
        stream.set_nonblocking(false).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let mut line = [0; 64];
        let mut iov = [io::IoSliceMut::new(&mut line)];
        // Blocks the one thread, so the request must have been sent already.
        tokio::task::yield_now().await;
        rustix::net::recvmsg(&stream, &mut iov, &mut control, rustix::net::RecvFlags::empty()).unwrap();
        let count: usize = control
            .drain()
            .map(|m| match m {
                rustix::net::RecvAncillaryMessage::ScmRights(fds) => fds.count(),
                _ => 0,
            })
            .sum();
        io::Write::write_all(&mut &stream, b"{\"response\":\"error\",\"message\":\"it runs\"}\n").unwrap();
        count
    };
    let (refused, count) = tokio::join!(machine.snapshot(&state, &memory, 64), taken);
    assert_eq!((refused.unwrap_err().to_string().as_str(), count), ("it runs", 2));
}

#[tokio::test]
async fn each_end_is_told_from_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control.sock");
    let listener = UnixListener::bind(&control).unwrap();
    let status = b"{\"response\":\"status\",\"pid\":1,\"uptime_ms\":1,\"state\":\"paused\"}\n";
    for (reason, kind, wanted) in [
        (r#"{"kind":"reboot"}"#, EndKind::Reboot, "rebooted"),
        (r#"{"kind":"halt"}"#, EndKind::Halt, "halted"),
        (r#"{"kind":"stopped"}"#, EndKind::Halt, "stopped"),
        (r#"{"kind":"panic"}"#, EndKind::Failure, "panicked"),
        (r#"{"kind":"triple-fault"}"#, EndKind::Failure, "triple fault"),
        (r#"{"kind":"failed","message":"no memory"}"#, EndKind::Failure, "no memory"),
        ("nonsense", EndKind::Failure, "process was ended"),
    ] {
        let last = format!(
            "{{\"response\":\"exited\",\"reason\":{reason},\"console\":\"one\\r\\n\\u001btwo\\n\"}}\n"
        );
        let adopted = async {
            let (mut machine, state) = Machine::adopt(&control).await.unwrap();
            assert_eq!(state, RunState::Paused);
            (machine.ended().await, machine.ended().await)
        };
        let answers = [(&status[..], 0), (last.as_bytes(), 0)];
        let ((ended, again), asked) = tokio::join!(adopted, answer(&listener, &answers));
        assert_eq!(asked, [r#"{"request":"status"}"#, r#"{"request":"wait"}"#]);
        assert_eq!(ended.kind(), kind);
        assert!(ended.to_string().contains(wanted), "{ended}");
        assert_eq!(ended.console, if reason == "nonsense" { "" } else { "one\ntwo" });
        assert_eq!(again.kind(), EndKind::Failure, "said once");
    }
    drop(listener);
    assert!(Machine::adopt(&control).await.is_err());
}
