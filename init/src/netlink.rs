//! A synchronous rtnetlink client: links, addresses, neighbours, routes and policy rules, IPv4 only.
//!
//! One request is outstanding at a time, and each is acknowledged before the call returns. Adding what is there already
//! is a success, so that a configuration can be applied again after a crash or a changed lease.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsFd as _,
    time::Instant,
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, IpProtocol, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::{
    error::{Context as _, Error, Result},
    poll,
};

/// Routing table of ordinary routes.
pub const TABLE_MAIN: u32 = 254;
/// Routing table of what is delivered on this host.
pub const TABLE_LOCAL: u32 = 255;

/// An address and the length of its prefix.
pub type Prefix = (Ipv4Addr, u8);

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Its hardware address, if it has one of Ethernet's size.
    pub mac: Option<[u8; 6]>,
    /// Whether it speaks Ethernet.
    pub ethernet: bool,
    /// Whether it is up.
    pub up: bool,
    /// Whether it is up and there is somebody at the other end (a cable with a peer, the reader of a TAP).
    pub running: bool,
}

/// A route to add.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Which table, [`TABLE_MAIN`] mostly.
    pub table: u32,
    /// Where to; `0.0.0.0/0` is the default route.
    pub destination: Prefix,
    /// Through whom, if not directly.
    pub gateway: Option<Ipv4Addr>,
    /// Out of which interface.
    pub index: u32,
    /// The gateway is on the link although no prefix says so.
    pub onlink: bool,
    /// The destination is on the link.
    pub scope_link: bool,
}

/// A policy rule to add: all that is given must match.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rule {
    /// Smaller is asked first. 0 is the rule that looks up the local table, unless it was deleted.
    pub priority: u32,
    /// Where the packet goes.
    pub destination: Option<Prefix>,
    /// Where it came from: an interface's name; `lo` is this host itself.
    pub iif: Option<String>,
    /// IP protocol number.
    pub ip_protocol: Option<u8>,
    /// Destination ports, both ends included.
    pub dport: Option<(u16, u16)>,
    /// The table to look up.
    pub table: u32,
}

/// A connection to the kernel's routing tables.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Connects, in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel has no sockets left.
    pub fn open() -> Result<Self> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        Ok(Self { socket: open().what(|| "open a netlink socket".into())?, sequence: 0 })
    }

    /// All interfaces.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn links(&mut self) -> Result<Vec<Link>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.request(request, NLM_F_DUMP).what(|| "list network interfaces".into())?;
        Ok(answers.iter().filter_map(link).collect())
    }

    /// The index of an interface.
    ///
    /// # Errors
    /// [`Error::NoLink`].
    pub fn link_index(&mut self, name: &str) -> Result<u32> {
        let links = self.links()?;
        links.iter().find(|l| l.name == name).map(|l| l.index).ok_or_else(|| Error::NoLink(name.into()))
    }

    /// Brings an interface up.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_up(&mut self, index: u32) -> Result<()> {
        self.set_flags(index, LinkFlags::Up).what(|| format!("bring interface {index} up"))
    }

    /// Takes an interface down: it sends and receives nothing any more.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_down(&mut self, index: u32) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.change_mask = LinkFlags::Up;
        let done = self.request(RouteNetlinkMessage::SetLink(message), NLM_F_ACK);
        done.map(drop).what(|| format!("take interface {index} down"))
    }

    /// Makes an interface take every frame.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_promiscuous(&mut self, index: u32) -> Result<()> {
        self.set_flags(index, LinkFlags::Promisc).what(|| format!("make interface {index} promiscuous"))
    }

    /// Gives an interface a hardware address. Many must be down for it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_mac(&mut self, index: u32, mac: [u8; 6]) -> Result<()> {
        self.set_link(index, LinkAttribute::Address(mac.to_vec()))
            .what(|| format!("set the MAC address of interface {index}"))
    }

    /// Sets the largest packet, in bytes.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<()> {
        self.set_link(index, LinkAttribute::Mtu(mtu)).what(|| format!("set the MTU of interface {index}"))
    }

    /// Adds an address. The kernel adds the route to its prefix, if that is shorter than 32.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add_address(&mut self, index: u32, address: Ipv4Addr, prefix_len: u8) -> Result<()> {
        let message = address_message(index, address, prefix_len);
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let done = self.request(RouteNetlinkMessage::NewAddress(message), flags);
        unless(done, libc::EEXIST).what(|| format!("add {address}/{prefix_len} to interface {index}"))
    }

    /// Takes all IPv4 addresses off an interface; routes that need them go with them.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn delete_addresses(&mut self, index: u32) -> Result<()> {
        let mut request = AddressMessage::default();
        request.header.family = AddressFamily::Inet;
        let answers = self
            .request(RouteNetlinkMessage::GetAddress(request), NLM_F_DUMP)
            .what(|| "list addresses".into())?;
        for answer in answers {
            let RouteNetlinkMessage::NewAddress(message) = answer else { continue };
            if message.header.index != index || message.header.family != AddressFamily::Inet {
                continue;
            }
            let local = message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Local(IpAddr::V4(address)) => Some(*address),
                _ => None,
            });
            let Some(local) = local else { continue };
            let request = address_message(index, local, message.header.prefix_len);
            let done = self.request(RouteNetlinkMessage::DelAddress(request), NLM_F_ACK);
            // It may have gone with another address, whose secondary it was.
            unless(done, libc::EADDRNOTAVAIL).what(|| format!("take {local} off interface {index}"))?;
        }
        Ok(())
    }

    /// Adds a permanent entry to the neighbour (ARP) table, or changes it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add_neighbour(&mut self, index: u32, address: Ipv4Addr, mac: [u8; 6]) -> Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let done = self.request(RouteNetlinkMessage::NewNeighbour(message), flags);
        done.map(drop).what(|| format!("add neighbour {address} to interface {index}"))
    }

    /// Adds a route, or replaces the one to the same destination in the same table.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add_route(&mut self, route: &Route) -> Result<()> {
        let message = route_message(route);
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let done = self.request(RouteNetlinkMessage::NewRoute(message), flags);
        let (to, length) = route.destination;
        done.map(drop).what(|| format!("add a route to {to}/{length} by interface {}", route.index))
    }

    /// Adds a policy rule.
    ///
    /// # Errors
    /// When the kernel refuses: without `CONFIG_IP_MULTIPLE_TABLES` it always does.
    pub fn add_rule(&mut self, rule: &Rule) -> Result<()> {
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let done = self.request(RouteNetlinkMessage::NewRule(rule_message(rule)), flags);
        unless(done, libc::EEXIST).what(|| format!("add policy rule {}", rule.priority))
    }

    /// Deletes the first policy rule with this priority, if there is one.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn delete_rule(&mut self, priority: u32) -> Result<()> {
        let mut message = RuleMessage::default();
        message.header.family = AddressFamily::Inet;
        message.attributes = vec![RuleAttribute::Priority(priority)];
        let done = self.request(RouteNetlinkMessage::DelRule(message), NLM_F_ACK);
        unless(done, libc::ENOENT).what(|| format!("delete policy rule {priority}"))
    }

    /// Waits until an interface runs: it is up and its other end is there. Says whether it does.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn wait_running(&mut self, index: u32, deadline: Instant) -> Result<bool> {
        let listen = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            // RTMGRP_LINK. Subscribed before looking, so no change is missed between.
            socket.bind(&SocketAddr::new(0, 1))?;
            socket.set_non_blocking(true)?;
            Ok(socket)
        };
        let events = listen().what(|| "listen for changes of interfaces".into())?;
        loop {
            while events.recv_from_full().is_ok() {}
            if self.links()?.iter().any(|l| l.index == index && l.running) {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            poll::wait(&[events.as_fd()], Some(deadline))?;
        }
    }

    fn set_flags(&mut self, index: u32, flags: LinkFlags) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = flags;
        message.header.change_mask = flags;
        self.request(RouteNetlinkMessage::SetLink(message), NLM_F_ACK).map(drop)
    }

    fn set_link(&mut self, index: u32, attribute: LinkAttribute) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![attribute];
        self.request(RouteNetlinkMessage::SetLink(message), NLM_F_ACK).map(drop)
    }

    /// Sends one request and gathers its answers until the acknowledgement or the end of the dump.
    fn request(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let mut answers = Vec::new();
        loop {
            let (datagram, from) = self.socket.recv_from_full()?;
            // Any process may send to a netlink socket; only the kernel has port 0.
            if from.port_number() != 0 {
                continue;
            }
            for bytes in split(&datagram) {
                // Attributes that this version of the crate cannot read must not hide the other messages.
                let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) else { continue };
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(e) if e.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(e) => return Err(e.to_io()),
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
        }
    }
}

/// The messages of a datagram: each starts with its length (`nlmsg_len`) and is padded to four bytes.
fn split(mut datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*datagram.first_chunk()?);
        let length = usize::try_from(length).ok().filter(|l| *l >= 16)?;
        let message = datagram.get(..length)?;
        datagram = datagram.get(length.checked_next_multiple_of(4)?..).unwrap_or_default();
        Some(message)
    })
}

fn unless(done: io::Result<Vec<RouteNetlinkMessage>>, tolerated: i32) -> io::Result<()> {
    match done {
        Err(e) if e.raw_os_error() != Some(tolerated) => Err(e),
        _ => Ok(()),
    }
}

fn link(answer: &RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = answer else { return None };
    let name = message.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })?;
    let mac = message.attributes.iter().find_map(|a| match a {
        LinkAttribute::Address(mac) => mac.as_slice().try_into().ok(),
        _ => None,
    });
    let header = &message.header;
    Some(Link {
        name,
        index: header.index,
        mac,
        ethernet: header.link_layer_type == LinkLayerType::Ether,
        up: header.flags.contains(LinkFlags::Up),
        running: header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
    })
}

fn address_message(index: u32, address: Ipv4Addr, prefix_len: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = prefix_len;
    message.header.scope = if address.is_loopback() { AddressScope::Host } else { AddressScope::Universe };
    message.header.index = index;
    message.attributes =
        vec![AddressAttribute::Local(address.into()), AddressAttribute::Address(address.into())];
    if prefix_len < 31 && !address.is_loopback() {
        let hosts = u32::MAX.checked_shr(prefix_len.into()).unwrap_or(0);
        message.attributes.push(AddressAttribute::Broadcast(Ipv4Addr::from(u32::from(address) | hosts)));
    }
    message
}

fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    let (destination, prefix_len) = route.destination;
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = prefix_len;
    // 0 (unspecified) when the table's number needs the attribute.
    message.header.table = u8::try_from(route.table).unwrap_or(0);
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = if route.scope_link { RouteScope::Link } else { RouteScope::Universe };
    message.header.kind = RouteType::Unicast;
    if route.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    message.attributes = vec![RouteAttribute::Table(route.table), RouteAttribute::Oif(route.index)];
    if prefix_len > 0 {
        message.attributes.push(RouteAttribute::Destination(IpAddr::V4(destination).into()));
    }
    if let Some(gateway) = route.gateway {
        message.attributes.push(RouteAttribute::Gateway(IpAddr::V4(gateway).into()));
    }
    message
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.table = u8::try_from(rule.table).unwrap_or(0);
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![RuleAttribute::Priority(rule.priority), RuleAttribute::Table(rule.table)];
    if let Some((destination, prefix_len)) = rule.destination {
        message.header.dst_len = prefix_len;
        message.attributes.push(RuleAttribute::Destination(destination.into()));
    }
    if let Some(iif) = &rule.iif {
        message.attributes.push(RuleAttribute::Iifname(iif.clone()));
    }
    if let Some(protocol) = rule.ip_protocol {
        message.attributes.push(RuleAttribute::IpProtocol(IpProtocol::from(i32::from(protocol))));
    }
    if let Some((start, end)) = rule.dport {
        message.attributes.push(RuleAttribute::DestinationPortRange(RulePortRange { start, end }));
    }
    message
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_the_loopback_interface() {
        let mut netlink = Netlink::open().unwrap();
        let links = netlink.links().unwrap();
        let lo = links.iter().find(|l| l.name == "lo").unwrap();
        assert!(!lo.ethernet);
        assert_eq!(netlink.link_index("lo").unwrap(), lo.index);
        assert!(
            matches!(netlink.link_index("no-such-link"), Err(Error::NoLink(name)) if name == "no-such-link")
        );
    }

    #[test]
    fn splits_by_length_with_padding() {
        let mut datagram = Vec::new();
        for length in [17u32, 16] {
            let mut message = vec![0; length.next_multiple_of(4) as usize];
            message[..4].copy_from_slice(&length.to_ne_bytes());
            datagram.extend(message);
        }
        assert_eq!(split(&datagram).map(<[u8]>::len).collect::<Vec<_>>(), [17, 16]);
        assert_eq!(split(&datagram[..30]).count(), 1);
    }

    proptest! {
        #[test]
        fn splitting_anything_ends(datagram in proptest::collection::vec(any::<u8>(), 0..512)) {
            prop_assert!(split(&datagram).map(<[u8]>::len).sum::<usize>() <= datagram.len());
        }
    }

    /// Needs root: makes its own user-less network namespace in this thread, so nothing outside is touched.
    #[test]
    #[ignore = "needs root (a network namespace of its own)"]
    fn configures_an_interface_as_a_sliver_does() {
        std::thread::spawn(|| {
            // SAFETY: unshare(CLONE_NEWNET) concerns this thread only, which ends with the test.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            let mut netlink = Netlink::open().unwrap();
            let lo = netlink.link_index("lo").unwrap();
            netlink.set_up(lo).unwrap();
            let node = Ipv4Addr::new(192, 0, 2, 7);
            for _ in 0..2 {
                netlink.add_address(lo, node, 32).unwrap();
                let rule = Rule {
                    priority: 10,
                    destination: Some((node, 32)),
                    iif: Some("lo".into()),
                    ip_protocol: Some(6),
                    dport: Some((20000, 20015)),
                    table: TABLE_LOCAL,
                };
                netlink.add_rule(&rule).unwrap();
                let route = Route {
                    table: 1000,
                    destination: (Ipv4Addr::UNSPECIFIED, 0),
                    gateway: None,
                    index: lo,
                    onlink: false,
                    scope_link: true,
                };
                netlink.add_route(&route).unwrap();
            }
            netlink.delete_rule(10).unwrap();
            netlink.delete_rule(10).unwrap();
            netlink.delete_addresses(lo).unwrap();
            netlink.set_down(lo).unwrap();
            assert!(netlink.links().unwrap().iter().all(|link| !link.up));
            netlink.set_mtu(lo, 1500).unwrap();
        })
        .join()
        .unwrap();
    }
}
