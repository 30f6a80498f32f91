//! The client against a net-demux that dies and comes back, over a real socket.

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, acceptfrom, bind, listen};
use std::io::IoSliceMut;
use std::net::Ipv4Addr;

use super::*;

/// The server's side, blocking, in the test's own hands.
struct Server(OwnedFd);

fn server(path: &Path) -> Server {
    std::fs::remove_file(path).ok();
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&socket, 8).unwrap();
    Server(socket)
}

/// Answers `count` requests of one client and returns them with the number of descriptors each brought.
async fn serve(server: Server, answers: Vec<Response>) -> (Server, OwnedFd, Vec<(Request, usize)>) {
    tokio::task::spawn_blocking(move || {
        let client = acceptfrom(&server.0).unwrap().0;
        let mut seen = Vec::new();
        for answer in answers {
            let mut packet = vec![0; MAX_PACKET];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let iov = &mut [IoSliceMut::new(&mut packet)];
            let len = rustix::net::recvmsg(&client, iov, &mut control, RecvFlags::empty()).unwrap().bytes;
            let fds = control
                .drain()
                .map(|m| if let RecvAncillaryMessage::ScmRights(fds) = m { fds.count() } else { 0 });
            let fds = fds.sum();
            seen.push((serde_json::from_slice(&packet[..len]).unwrap(), fds));
            rustix::net::send(&client, &serde_json::to_vec(&answer).unwrap(), SendFlags::empty()).unwrap();
        }
        (server, client, seen)
    })
    .await
    .unwrap()
}

fn attachment(id: u32) -> Attachment {
    let fd = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    Attachment {
        sliver: SliverId(id),
        slice: "a_b".into(),
        mac: [2, 0, 0, 0, 0, 1],
        ports: PortGrant { first: 20_000, last: 20_063, tcp: BTreeSet::new(), udp: BTreeSet::new() },
        ring: Arc::new([fd(), fd(), fd()]),
    }
}

fn list(ids: &[u32]) -> Response {
    let status = |id: &u32| commonage_net_demux_api::control::SliverStatus {
        sliver: SliverId(*id),
        slice: "a_b".into(),
        ports: attachment(*id).ports,
        tx_frames: 0,
        tx_bytes: 0,
        rx_frames: 0,
        rx_bytes: 0,
        drops: BTreeMap::new(),
    };
    Response::List {
        instance: 1,
        address: None,
        slivers: ids.iter().map(status).collect(),
        drops: BTreeMap::new(),
    }
}

#[tokio::test]
async fn everything_is_told_again_after_net_demux_died() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("demux.sock");
    let host = Host { address: Ipv4Addr::new(10, 0, 2, 15), prefix_len: 24, gateway: None, dns: vec![] };
    let (_host, receiver) = watch::channel(Some(host));

    // net-demux is away: attaching is noted.
    let demux = Demux::start(path.clone(), receiver, BTreeSet::from([SliverId(9)]));
    demux.attach(attachment(7)).await.unwrap();

    // It comes up and has 8 and 9 from before: 9 is expected back, 8 is nobody's.
    let ok = || Response::Ok;
    let (server, client, seen) = serve(server(&path), vec![ok(), list(&[8, 9]), ok(), list(&[]), ok()]).await;
    assert!(matches!(seen[0], (Request::SetAddress { prefix_len: 24, .. }, 0)));
    assert!(matches!(seen[2], (Request::Detach { sliver: SliverId(8) }, 0)));
    assert!(matches!(seen[3], (Request::ListAfter { sliver: SliverId(9) }, 0)));
    assert!(matches!(seen[4], (Request::Attach { sliver: SliverId(7), .. }, 3)));

    // It dies: all is told again, without being asked.
    drop(client);
    let (server, client, seen) = serve(server, vec![ok(), list(&[]), ok()]).await;
    assert!(matches!(seen[2], (Request::Attach { sliver: SliverId(7), .. }, 3)));

    // What was detached stays so; a detach that cannot be told now is not forgotten either.
    drop((client, server));
    demux.detach(SliverId(7)).await;
    let (_server, client, seen) = serve(self::server(&path), vec![ok(), list(&[7]), ok()]).await;
    assert!(matches!(seen[2], (Request::Detach { sliver: SliverId(7) }, 0)));
    drop(client);
}
