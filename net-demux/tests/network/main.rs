//! The real net-demux between real IP stacks: a peer on a wire, the node's own stack behind the TAP, and two slivers behind rings.
//! Run as root: `cargo test -p commonage-net-demux --test network -- --ignored`.
// A test panics to fail.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod world;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use commonage_net_demux_api::control::{Request, Response, SliverStatus};
use world::{NODE, Namespace, PEER, World, attach_request};

const PATIENCE: Duration = Duration::from_secs(10);

fn listen(space: &Namespace, port: u16) -> TcpListener {
    space.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap())
}

fn connect(space: &Namespace, to: Ipv4Addr, port: u16) -> std::io::Result<TcpStream> {
    space.run(|| {
        let stream = TcpStream::connect_timeout(&(to, port).into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    })
}

fn udp(space: &Namespace, port: u16) -> UdpSocket {
    space.run(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    })
}

/// Connects and sends a megabyte each way; returns both ends and the client as the server sees it.
fn talk(client: &Namespace, server: &TcpListener, to: Ipv4Addr) -> (TcpStream, TcpStream, SocketAddr) {
    let port = server.local_addr().unwrap().port();
    let mut near = connect(client, to, port).unwrap();
    let (mut far, from) = server.accept().unwrap();
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    far.set_write_timeout(Some(PATIENCE)).unwrap();
    exchange(&mut near, &mut far, 1 << 20);
    exchange(&mut far, &mut near, 1 << 20);
    (near, far, from)
}

fn exchange(from: &mut TcpStream, to: &mut TcpStream, length: usize) {
    let sent: Vec<u8> = (0..length).map(|i| (i ^ (i >> 8)) as u8).collect();
    let mut received = vec![0; length];
    std::thread::scope(|scope| {
        scope.spawn(|| from.write_all(&sent).unwrap());
        to.read_exact(&mut received).unwrap();
    });
    assert!(sent == received, "bytes were changed on the way");
}

/// Sends each way over UDP; `length` above 1472 makes fragments.
fn datagrams(near: &UdpSocket, far: &UdpSocket, to: Ipv4Addr, length: usize) {
    let sent = vec![0xa5; length];
    let mut buf = vec![0; 65536];
    near.send_to(&sent, (to, far.local_addr().unwrap().port())).unwrap();
    let (received, from) = far.recv_from(&mut buf).unwrap();
    assert_eq!(
        (&buf[..received], from),
        (&sent[..], SocketAddr::from((NODE, near.local_addr().unwrap().port())))
    );
    far.send_to(&sent, from).unwrap();
    let (received, _) = near.recv_from(&mut buf).unwrap();
    assert_eq!(&buf[..received], &sent[..]);
}

/// Sends an echo request with this identifier and waits for its reply.
fn ping(space: &Namespace, to: Ipv4Addr, id: u16) -> bool {
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, sockopt};
    space.run(|| {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).unwrap();
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(Duration::from_secs(2))).unwrap();
        let [a, b] = id.to_be_bytes();
        let sum = !(0x0800_u16 + id + 1);
        let [c, d] = sum.to_be_bytes();
        rustix::net::sendto(
            &socket,
            &[8, 0, c, d, a, b, 0, 1],
            SendFlags::empty(),
            &SocketAddrV4::new(to, 0),
        )
        .unwrap();
        let mut buf = [0; 1500];
        while let Ok((length, _)) = rustix::net::recv(&socket, &mut buf[..], RecvFlags::empty()) {
            if buf[..length].get(20) == Some(&0) && buf[24..26] == [a, b] {
                return true;
            }
        }
        false
    })
}

fn statuses(world: &World) -> Vec<SliverStatus> {
    match world.call(&Request::List, None) {
        Response::List { slivers, drops, .. } => {
            assert_eq!(drops.get("host-port-owned"), None, "the host's stack answers for slivers");
            slivers
        }
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "needs root"]
fn one_address_many_slivers() {
    let mut world = World::new();
    world.start();
    world.configure_host();

    // Before anybody told it the address, the host speaks.
    let peers = listen(&world.peer, 443);
    talk(&world.node, &peers, PEER);

    world.set_address();
    world.attach();
    let (a, b) = (&world.a.space, &world.b.space);

    // The host, in and out.
    let (_, _, from) = talk(&world.node, &peers, PEER);
    assert_eq!(from.ip(), NODE);
    assert!(from.port() >= 61000);
    let hosts = listen(&world.node, 22);
    talk(&world.peer, &hosts, NODE);

    // A sliver, in and out, by the same address. The host's stack must not interfere.
    let of_a = listen(a, 20_110);
    let (mut near, mut far, _) = talk(&world.peer, &of_a, NODE);
    let (_, _, from) = talk(a, &peers, PEER);
    assert_eq!(from.ip(), NODE);
    assert!((20_100..20_164).contains(&from.port()));

    // Each other; the host by the shared address; the host to them.
    let of_b = listen(b, 20_170);
    talk(a, &of_b, NODE);
    talk(b, &of_a, NODE);
    talk(a, &hosts, NODE);
    talk(&world.node, &of_b, NODE);
    let exactly_a = listen(a, 10_100);
    talk(b, &exactly_a, NODE);
    talk(&world.node, &exactly_a, NODE);
    talk(&world.peer, &exactly_a, NODE);

    // UDP, also in fragments.
    let (udp_a, udp_b, udp_peer) = (udp(a, 20_111), udp(b, 20_171), udp(&world.peer, 5000));
    for length in [1, 1472, 1473, 8000] {
        datagrams(&udp_a, &udp_peer, PEER, length);
        datagrams(&udp_a, &udp_b, NODE, length);
    }

    // Ping.
    assert!(ping(a, PEER, 7));
    assert!(ping(&world.node, PEER, 8));
    assert!(ping(&world.peer, NODE, 9));
    assert!(!ping(b, PEER, 7), "the identifier is the other sliver's");

    // ICMP errors, both ways.
    for (socket, to, port) in [(udp(a, 20_112), PEER, 5001), (udp(&world.peer, 5002), NODE, 20_120)] {
        socket.connect((to, port)).unwrap();
        socket.send(b"anybody?").unwrap();
        assert_eq!(socket.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }

    // Another's port is not to be had, neither by name nor by force.
    let stolen = world.a.space.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 20_200)).unwrap());
    stolen.send_to(b"I am B", (PEER, 5000)).unwrap();
    assert!(ping(a, PEER, 7), "and so it was handled before");
    udp_peer.set_nonblocking(true).unwrap();
    assert_eq!(udp_peer.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
    let status = statuses(&world);
    assert_eq!(status[0].drops.get("port-not-owned"), Some(&1), "{status:?}");
    assert_eq!(status[1].drops.get("icmp-id-taken"), Some(&1), "{status:?}");
    let mut request = attach_request(&world.a);
    if let Request::Attach { sliver, .. } = &mut request {
        sliver.0 += 7;
    }
    let (_machine, fds) = commonage_net_demux_api::ring::Ring::create().unwrap();
    let Response::Error { message } = world.call(&request, Some(&fds)) else {
        panic!("the ports were granted twice")
    };
    assert!(message.contains("TCP port 20100 belongs to sliver 100001"), "{message}");

    // A crash ends no connection.
    exchange(&mut near, &mut far, 1000);
    world.kill();
    world.start();
    world.set_address();
    world.attach();
    exchange(&mut near, &mut far, 1 << 20);
    exchange(&mut far, &mut near, 1 << 20);

    // Detached, its ports are the host's again, who has nobody there.
    assert_eq!(world.call(&Request::Detach { sliver: world.a.id }, None), Response::Ok);
    assert_eq!(connect(&world.peer, NODE, 20_110).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(statuses(&world).len(), 1);
}
