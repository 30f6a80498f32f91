//! A node, a peer on its link, and slivers, each in a network namespace of its own; the slivers' rings are pumped by the test, as a
//! virtual machine would. Everything is gone when the [`World`] is dropped.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, IoSlice};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use commonage_net_demux_api::control::{MAX_PACKET, PortGrant, Request, Response, SliverId};
use commonage_net_demux_api::ring::{Endpoint, Ring, RingFds};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};

pub const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 5);
pub const PEER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

fn ip(arguments: &str) {
    let output =
        Command::new("ip").args(arguments.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A network namespace.
#[derive(Debug)]
pub struct Namespace(String);

impl Namespace {
    fn new(role: &str) -> Self {
        let name = format!("demux-{role}-{}", std::process::id());
        ip(&format!("netns add {name}"));
        let namespace = Self(name);
        namespace.ip("link set lo up");
        namespace
    }

    pub fn ip(&self, arguments: &str) {
        ip(&format!("-n {} {arguments}", self.0));
    }

    pub fn sysctl(&self, key: &str, value: &str) {
        let path = format!("/proc/sys/net/ipv4/{key}");
        self.run(move || std::fs::write(path, value)).unwrap();
    }

    /// Runs something inside, and waits for it. Sockets made there stay there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{}", self.0)).unwrap();
        let inside = move || {
            let kind = rustix::thread::LinkNameSpaceType::Network;
            rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind)).unwrap();
            work()
        };
        std::thread::scope(|scope| scope.spawn(inside).join().unwrap())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn ifreq(name: &str) -> libc::ifreq {
    // SAFETY: plain data, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as libc::c_char);
    request
}

/// Makes the kernel cut TCP streams into packets itself, as a real wire would have them. Checksums stay offloaded on purpose.
fn cut_segments(interface: &str) {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    for command in [0x1f_u32, 0x24] {
        let mut value = [command, 0];
        let mut request = ifreq(interface);
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        // SAFETY: SIOCETHTOOL takes an ifreq whose pointer leads to an ethtool_value.
        assert_eq!(unsafe { libc::ioctl(socket.as_raw_fd(), 0x8946, &raw mut request) }, 0);
    }
}

fn open_tap(interface: &str) -> File {
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .unwrap();
    let mut request = ifreq(interface);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
    // SAFETY: TUNSETIFF takes an ifreq.
    assert_eq!(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }, 0);
    tap
}

/// A sliver: a namespace with the guest's network set-up, joined to a ring.
#[derive(Debug)]
pub struct Sliver {
    pub space: Namespace,
    pub id: SliverId,
    pub mac: [u8; 6],
    pub ports: PortGrant,
    /// For each time it is attached.
    spare: Vec<RingFds>,
    stop: OwnedFd,
    pump: Option<JoinHandle<()>>,
}

impl Sliver {
    pub fn new(role: &str, n: u32, first: u16) -> Self {
        let id = SliverId(100_000 + n);
        let [a, b, c, d] = id.0.to_be_bytes();
        let mac = [2, 0, a, b, c, d];
        let last = first + 63;
        let space = Namespace::new(role);
        let (endpoint, fds) = Ring::create().unwrap();
        let mut spare = vec![fds];
        spare.extend((0..3).map(|_| endpoint.fds().unwrap()));
        let tap = space.run(|| open_tap("eth0"));
        for key in ["conf/all/accept_local", "conf/eth0/accept_local"] {
            space.sysctl(key, "1");
        }
        for key in ["conf/all/rp_filter", "conf/eth0/rp_filter"] {
            space.sysctl(key, "0");
        }
        space.sysctl("ip_local_port_range", &format!("{first} {last}"));
        space.ip(&format!("link set eth0 address 02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x} up"));
        space.ip(&format!("addr add {NODE}/32 dev eth0"));
        space.ip("neigh add 169.254.1.1 lladdr 02:ff:ff:ff:ff:ff dev eth0 nud permanent");
        space.ip("route add 169.254.1.1 dev eth0 scope link");
        space.ip("route add default via 169.254.1.1 dev eth0 onlink");
        for protocol in ["tcp", "udp"] {
            space.ip(&format!(
                "rule add pref 10 to {NODE} ipproto {protocol} dport {first}-{last} lookup local"
            ));
        }
        let exact = first - 10_000;
        space.ip(&format!("rule add pref 11 to {NODE} ipproto tcp dport {exact} lookup local"));
        space.ip(&format!("rule add pref 12 to {NODE} ipproto icmp lookup local"));
        space.ip(&format!("rule add pref 20 to {NODE} iif lo lookup 100"));
        space.ip("route add default via 169.254.1.1 dev eth0 onlink table 100");
        space.ip("rule add pref 30 lookup local");
        space.ip("rule del pref 0");
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let stopped = stop.try_clone().unwrap();
        let pump = Some(std::thread::spawn(move || pump(&tap, endpoint, &stopped)));
        let ports = PortGrant { first, last, tcp: [exact].into(), udp: Default::default() };
        Self { space, id, mac, ports, spare, stop, pump }
    }
}

impl Drop for Sliver {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(pump) = self.pump.take() {
            let _ = pump.join();
        }
    }
}

/// Carries frames between a TAP and a ring until told to stop, as a virtual machine's network device does.
fn pump(tap: &File, mut ring: Endpoint, stop: &OwnedFd) {
    let mut buf = [0; 2048];
    let mut held: Option<usize> = None;
    loop {
        // The guest's frames, unless one waits for room.
        loop {
            let length = match held.take() {
                Some(length) => length,
                None => match rustix::io::read(tap, &mut buf) {
                    Ok(length) => length,
                    Err(_) => break,
                },
            };
            if ring.send(&buf[..length]).is_err() {
                held = Some(length);
                break;
            }
        }
        let mut incoming = [0; 2048];
        while let Some(length) = ring.recv(&mut incoming) {
            let _ = rustix::io::write(tap, &incoming[..length]);
        }
        let tap_wish = if held.is_some() { PollFlags::empty() } else { PollFlags::IN };
        let mut fds = [
            PollFd::new(tap, tap_wish),
            PollFd::from_borrowed_fd(ring.event(), PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        poll(&mut fds, None).unwrap();
        if !fds[2].revents().is_empty() {
            return;
        }
        ring.drain_event();
    }
}

/// The node and everything around it.
#[derive(Debug)]
pub struct World {
    pub a: Sliver,
    pub b: Sliver,
    pub node: Namespace,
    pub peer: Namespace,
    demux: Option<Child>,
    directory: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        let (node, peer) = (Namespace::new("node"), Namespace::new("peer"));
        peer.ip(&format!("link add wire type veth peer name eth0 netns {}", node.0));
        peer.ip(&format!("addr add {PEER}/24 dev wire"));
        peer.ip("link set wire up");
        peer.run(|| cut_segments("wire"));
        // As node-init does it.
        node.ip("link set eth0 address 52:54:00:00:00:01 up promisc on");
        node.ip("tuntap add dev host0 mode tap");
        node.ip("link set host0 address 52:54:00:00:00:01 up");
        node.sysctl("ip_local_port_range", "61000 65535");
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (Sliver::new("a", 1, 20_100), Sliver::new("b", 2, 20_164));
        Self { a, b, node, peer, demux: None, directory }
    }

    /// The host gets its address and, in order to reach slivers by it, the same policy as a guest.
    pub fn configure_host(&self) {
        self.node.ip(&format!("addr add {NODE}/24 dev host0"));
        self.node.ip(&format!("route add default via {PEER}"));
        self.node.sysctl("conf/host0/accept_local", "1");
        self.node.ip("neigh add 169.254.1.1 lladdr 02:ff:ff:ff:ff:ff dev host0 nud permanent");
        for protocol in ["tcp", "udp"] {
            self.node.ip(&format!(
                "rule add pref 10 to {NODE} iif lo ipproto {protocol} dport 1024-60999 lookup 100"
            ));
        }
        self.node.ip("route add default via 169.254.1.1 dev host0 onlink table 100");
        self.node.ip("rule add pref 30 lookup local");
        self.node.ip("rule del pref 0");
    }

    /// Starts net-demux and waits until it says that it is ready.
    pub fn start(&mut self) {
        let control = self.directory.path().join("net-demux.sock");
        let mut child = self.node.run(|| {
            Command::new(env!("CARGO_BIN_EXE_net-demux"))
                .args(["--nic", "eth0", "--tap", "host0", "--control"])
                .arg(control)
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        });
        let mut log = BufReader::new(child.stderr.take().unwrap());
        self.demux = Some(child);
        let mut line = String::new();
        while !line.starts_with("net-demux: ready") {
            line.clear();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "net-demux ended before it was ready");
            eprint!("{line}");
        }
        std::thread::spawn(move || log.lines().map_while(Result::ok).for_each(|line| eprintln!("{line}")));
    }

    /// Kills it without warning.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.demux.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub fn set_address(&self) {
        let request = Request::SetAddress { address: NODE, prefix_len: 24, gateway: Some(PEER) };
        assert_eq!(self.call(&request, None), Response::Ok);
    }

    pub fn attach(&mut self) {
        let (a, b) = (self.a.spare.pop().unwrap(), self.b.spare.pop().unwrap());
        assert_eq!(self.call(&attach_request(&self.a), Some(&a)), Response::Ok);
        assert_eq!(self.call(&attach_request(&self.b), Some(&b)), Response::Ok);
    }

    /// Asks net-demux.
    pub fn call(&self, request: &Request, ring: Option<&RingFds>) -> Response {
        let path = self.directory.path().join("net-demux.sock");
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        let fds = ring.map(RingFds::as_array);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if let Some(fds) = &fds {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let bytes = serde_json::to_vec(request).unwrap();
        rustix::net::sendmsg(&socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::empty()).unwrap();
        let mut answer = vec![0; MAX_PACKET];
        let (length, _) = rustix::net::recv(&socket, &mut answer[..], RecvFlags::empty()).unwrap();
        serde_json::from_slice(&answer[..length]).unwrap()
    }
}

/// The request that attaches a sliver.
pub fn attach_request(sliver: &Sliver) -> Request {
    let slice = format!("test_{}", sliver.id.0);
    Request::Attach { sliver: sliver.id, slice, mac: sliver.mac, ports: sliver.ports.clone() }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill();
    }
}
