//! The engine: decides for each frame who gets it, and whether its sender may send it. Values and time in, frames out; no I/O.
//!
//! Every sliver has the node's one address; ports and echo identifiers say whose a packet is, and nothing in a packet is rewritten but
//! its Ethernet header. Invariants:
//! - A frame from outside goes to exactly one: the owner of what it is addressed to, else the host, else nobody, counted.
//! - No sliver ever sends with a MAC address, IP address, port or identifier that is not its own. Nobody's bytes are trusted: not the
//!   slivers', not the link's.
//! - Before the address is known only the host's traffic passes (it is how the node gets its address).
//! - State that packets can create is bounded, for each sliver on its own.
//!
//! A sliver reaches another, or the host, by the shared address: such a packet is handed to the destination's owner directly. The host
//! reaches slivers, and answers them, only if it routes packets for their ports at its own address to [`GATEWAY`] through its TAP, as
//! guests do (policy routing; else its kernel takes its own address for local).

pub mod counters;
mod fragments;
mod neighbours;
pub mod owners;
pub mod packet;

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::time::Duration;

use commonage_net_demux_api::control::{PortGrant, SliverId, SliverStatus};
use commonage_net_demux_api::ring::MAX_FRAME;
use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress};

use counters::{Drops, Reason};
use fragments::Fragments;
use neighbours::{Neighbours, Resolution};
use owners::{ClaimError, GrantError, HOST, Owners, Table};
use packet::{About, AboutTransport, ETHERNET, Ethernet, Fragment, Kind, Mac, Packet, Transport};

/// Time since some fixed moment, never going back.
pub type Time = Duration;

/// The gateway slivers know, on their own imaginary link.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// Its MAC address.
pub const GATEWAY_MAC: Mac = [0x02, 0xff, 0xff, 0xff, 0xff, 0xff];

/// Datagrams in fragments remembered at once: from outside, and for each sliver and the host.
const FRAGMENTED_INGRESS: usize = 1024;
const FRAGMENTED_EGRESS: usize = 64;

/// Where the engine's frames go. Each answers whether the frame was taken.
pub trait Ports {
    /// To the link.
    fn to_nic(&mut self, frame: &[u8]) -> bool;
    /// To the host's IP stack.
    fn to_host(&mut self, frame: &[u8]) -> bool;
    /// To a sliver.
    fn to_sliver(&mut self, sliver: SliverId, frame: &[u8]) -> bool;
}

/// Why a sliver was not attached.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// 0 is the host.
    #[error("sliver 0 is the host: give the sliver's user id")]
    IsHost,
    /// A group address cannot be a sender's.
    #[error("the MAC address is a group's, the node's or the gateway's: give the sliver one of its own")]
    Mac,
    /// Ports could not be granted.
    #[error(transparent)]
    Ports(#[from] GrantError),
}

/// The node's place on its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub address: Ipv4Addr,
    /// Bits, 0 to 32.
    pub prefix_len: u8,
    pub gateway: Option<Ipv4Addr>,
}

impl Place {
    fn next_hop(&self, destination: Ipv4Addr) -> Option<Ipv4Addr> {
        self.on_link(destination).then_some(destination).or(self.gateway)
    }

    fn on_link(&self, address: Ipv4Addr) -> bool {
        let mask = self.mask();
        address.to_bits() & mask == self.address.to_bits() & mask
    }

    fn mask(&self) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(self.prefix_len.min(32))).unwrap_or(0)
    }

    /// Slivers send to single machines only, and not to addresses whose meaning ends with the link or the machine: on many
    /// sites 169.254.169.254 hands out the machine's secrets.
    fn may_be_sent_to(&self, destination: Ipv4Addr) -> bool {
        let edge = self.prefix_len < 31 && self.on_link(destination) && {
            let host = destination.to_bits() & !self.mask();
            host == 0 || host == !self.mask()
        };
        let [first, ..] = destination.octets();
        !edge && first != 0 && first < 224 && !destination.is_loopback() && !destination.is_link_local()
    }
}

#[derive(Debug)]
struct Sliver {
    slice: String,
    mac: Mac,
    ports: PortGrant,
    fragments: Fragments<Route>,
    tx: (u64, u64),
    rx: (u64, u64),
    drops: Drops,
}

/// Where a sliver's or the host's packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    Out,
    To(SliverId),
}

/// The engine.
#[derive(Debug)]
pub struct Engine {
    /// Of the NIC, and of the host's TAP.
    mac: Mac,
    place: Option<Place>,
    owners: Owners,
    slivers: HashMap<SliverId, Sliver>,
    neighbours: Neighbours,
    incoming: Fragments<SliverId>,
    from_host: Fragments<Route>,
    drops: Drops,
}

impl Engine {
    /// An engine for a NIC with this MAC address.
    pub fn new(mac: Mac) -> Self {
        Self {
            mac,
            place: None,
            owners: Owners::default(),
            slivers: HashMap::new(),
            neighbours: Neighbours::default(),
            incoming: Fragments::new(FRAGMENTED_INGRESS),
            from_host: Fragments::new(FRAGMENTED_EGRESS),
            drops: Drops::default(),
        }
    }

    /// The node's address is known, or changed.
    pub fn set_place(&mut self, place: Place) {
        if self.place != Some(place) {
            self.place = Some(place);
            self.neighbours.reset(place.gateway);
        }
    }

    /// The node's address.
    pub fn address(&self) -> Option<Ipv4Addr> {
        self.place.map(|place| place.address)
    }

    /// Connects a sliver, or the same sliver anew: it keeps its echo identifiers, not its counters. On error nothing changes.
    pub fn attach(
        &mut self,
        id: SliverId,
        slice: String,
        mac: Mac,
        ports: PortGrant,
    ) -> Result<(), AttachError> {
        if id == HOST {
            return Err(AttachError::IsHost);
        }
        if packet::is_multicast(mac) || mac == self.mac || mac == GATEWAY_MAC {
            return Err(AttachError::Mac);
        }
        self.owners.grant(id, self.slivers.get(&id).map(|old| &old.ports), &ports)?;
        self.forget(id);
        let fragments = Fragments::new(FRAGMENTED_EGRESS);
        let sliver = Sliver { slice, mac, ports, fragments, tx: (0, 0), rx: (0, 0), drops: Drops::default() };
        self.slivers.insert(id, sliver);
        Ok(())
    }

    /// Disconnects a sliver and frees its ports.
    pub fn detach(&mut self, id: SliverId) {
        if let Some(old) = self.slivers.remove(&id) {
            self.owners.release(id, &old.ports);
            self.forget(id);
        }
    }

    /// The attached slivers with ids above `after`, ascending.
    pub fn list(&self, after: SliverId) -> Vec<SliverStatus> {
        let mut list: Vec<_> =
            self.slivers.iter().filter(|(id, _)| **id > after).map(|(id, s)| s.status(*id)).collect();
        list.sort_by_key(|status| status.sliver);
        list
    }

    /// Frames dropped that belong to no sliver.
    pub fn drops(&self) -> BTreeMap<String, u64> {
        self.drops.named()
    }

    /// Counts a frame that the shell had to drop, on its way from or to a sliver or the host.
    pub fn count(&mut self, id: SliverId, reason: Reason) {
        match self.slivers.get_mut(&id) {
            Some(sliver) => sliver.drops.count(reason),
            None => self.drops.count(reason),
        }
    }

    /// When [`tick`](Self::tick) may have something to do.
    pub fn deadline(&self) -> Option<Time> {
        self.neighbours.deadline()
    }

    /// Does what is due: asks neighbours again, gives up.
    pub fn tick(&mut self, now: Time, out: &mut impl Ports) {
        let due = self.neighbours.tick(now);
        for hop in due.ask {
            self.ask(hop, out);
        }
        for sliver in due.lost {
            self.count(sliver, Reason::NeighbourUnreachable);
        }
    }

    /// A frame from the link. Its Ethernet header is rewritten if it goes to a sliver.
    pub fn nic_frame(&mut self, now: Time, frame: &mut [u8], out: &mut impl Ports) {
        match self.incoming_owner(now, frame, out) {
            Err(reason) => self.drops.count(reason),
            Ok((HOST, _)) => self.deliver_to_host(frame, out),
            Ok((owner, length)) => self.deliver(owner, frame, length, out),
        }
    }

    /// A frame from the host's IP stack.
    pub fn host_frame(&mut self, now: Time, frame: &mut [u8], out: &mut impl Ports) {
        match self.host_route(now, frame) {
            Err(reason) => self.drops.count(reason),
            Ok((Route::Out, _)) => {
                if !out.to_nic(frame) {
                    self.drops.count(Reason::NicFull);
                }
            }
            Ok((Route::To(owner), length)) => self.deliver(owner, frame, length, out),
        }
    }

    /// A frame from a sliver. Frames from slivers that are not attached are nobody's, and dropped.
    pub fn sliver_frame(&mut self, now: Time, id: SliverId, frame: &mut [u8], out: &mut impl Ports) {
        if let Err(reason) = self.forward(now, id, frame, out) {
            self.count(id, reason);
        }
    }

    /// Who gets a frame from the link, and how much of it without padding.
    fn incoming_owner(
        &mut self,
        now: Time,
        frame: &[u8],
        out: &mut impl Ports,
    ) -> Result<(SliverId, usize), Reason> {
        let ethernet = Ethernet::parse(frame).map_err(malformed)?;
        let to_all = packet::is_multicast(ethernet.destination);
        if ethernet.destination != self.mac && !to_all {
            return Err(Reason::NotForUs);
        }
        let payload = frame.get(ETHERNET..).unwrap_or(&[]);
        let Some(place) = self.place else { return Ok((HOST, frame.len())) };
        match ethernet.kind {
            Kind::Ipv4 => {}
            Kind::Arp => {
                self.learn(now, place, payload, out);
                return Ok((HOST, frame.len()));
            }
            Kind::Ipv6 | Kind::Other => return Ok((HOST, frame.len())),
        }
        let packet = Packet::parse(payload).map_err(malformed)?;
        if packet.source == place.address {
            return Err(Reason::Martian);
        }
        if packet.destination != place.address {
            return Ok((HOST, frame.len()));
        }
        let owner = match packet.fragment {
            Fragment::Later => self.incoming.decision(now, &packet).ok_or(Reason::FragmentWithoutFirst)?,
            _ => destination_owner(&self.owners, place, &packet),
        };
        // The owner may have left since the first fragment.
        let owner = if self.slivers.contains_key(&owner) { owner } else { HOST };
        if packet.fragment == Fragment::First {
            self.incoming.decided(now, &packet, owner);
        }
        if owner == HOST {
            return Ok((HOST, frame.len()));
        }
        // RFC 1122 3.3.6: a link-layer broadcast to a unicast address is discarded.
        if to_all {
            return Err(Reason::LinkBroadcast);
        }
        Ok((owner, ETHERNET + packet.total_len))
    }

    fn host_route(&mut self, now: Time, frame: &[u8]) -> Result<(Route, usize), Reason> {
        let ethernet = Ethernet::parse(frame).map_err(malformed)?;
        let out = (Route::Out, frame.len());
        let (Some(place), Kind::Ipv4) = (self.place, ethernet.kind) else { return Ok(out) };
        let packet = Packet::parse(frame.get(ETHERNET..).unwrap_or(&[])).map_err(malformed)?;
        if packet.source == place.address {
            let owner = match packet.transport {
                Transport::Tcp { source, .. } => self.owners.get(Table::Tcp, source),
                Transport::Udp { source, .. } => self.owners.get(Table::Udp, source),
                Transport::EchoRequest { id } => self.owners.get(Table::Icmp, id),
                // "Nobody listens", about a sliver's port.
                Transport::IcmpError { about } if about.destination == place.address => match about.transport
                {
                    AboutTransport::Tcp { destination, .. } => self.owners.get(Table::Tcp, destination),
                    AboutTransport::Udp { destination, .. } => self.owners.get(Table::Udp, destination),
                    AboutTransport::EchoRequest { .. } | AboutTransport::Other => HOST,
                },
                _ => HOST,
            };
            if owner != HOST {
                return Err(Reason::HostPortOwned);
            }
        }
        if packet.destination != place.address {
            return Ok(out);
        }
        let route = match packet.fragment {
            Fragment::Later => self.from_host.decision(now, &packet).ok_or(Reason::FragmentWithoutFirst)?,
            _ => Route::To(destination_owner(&self.owners, place, &packet)),
        };
        if packet.fragment == Fragment::First {
            self.from_host.decided(now, &packet, route);
        }
        match route {
            // What the host sends to itself never comes here; if it did, it would come again and again.
            Route::To(HOST) => Err(Reason::Destination),
            route => Ok((route, ETHERNET + packet.total_len)),
        }
    }

    fn forward(
        &mut self,
        now: Time,
        id: SliverId,
        frame: &mut [u8],
        out: &mut impl Ports,
    ) -> Result<(), Reason> {
        let ethernet = Ethernet::parse(frame).map_err(malformed)?;
        let sliver = self.slivers.get_mut(&id).ok_or(Reason::PortNotOwned)?;
        if ethernet.source != sliver.mac {
            return Err(Reason::ForeignMac);
        }
        if frame.len() > MAX_FRAME {
            return Err(Reason::Oversize);
        }
        let payload = frame.get(ETHERNET..).unwrap_or(&[]);
        match ethernet.kind {
            Kind::Arp => return self.answer_arp(id, payload, out),
            Kind::Ipv4 => {}
            Kind::Ipv6 => return Err(Reason::Ipv6),
            Kind::Other => return Err(Reason::EtherType),
        }
        let place = self.place.ok_or(Reason::NoAddress)?;
        let packet = Packet::parse(payload).map_err(malformed)?;
        let route = self.sliver_route(now, place, id, &packet)?;
        // Padding is cut: it could carry what nobody checks.
        let length = ETHERNET + packet.total_len;
        let frame = frame.get_mut(..length).ok_or(Reason::Malformed)?;
        match route {
            Route::To(HOST) => {
                set_macs(frame, self.mac, GATEWAY_MAC);
                self.deliver_to_host(frame, out);
            }
            Route::To(owner) => self.deliver(owner, frame, length, out),
            Route::Out => {
                let hop = place.next_hop(packet.destination).ok_or(Reason::NoRoute)?;
                set_macs(frame, [0; 6], self.mac);
                match self.neighbours.resolve(now, hop, id, frame) {
                    Resolution::Refused(reason) => return Err(reason),
                    Resolution::Waits { ask } => {
                        if ask {
                            self.ask(hop, out);
                        }
                        // Counted as sent when the answer comes.
                        return Ok(());
                    }
                    Resolution::Send { mac, ask } => {
                        if ask {
                            self.ask(hop, out);
                        }
                        set_macs(frame, mac, self.mac);
                        if !out.to_nic(frame) {
                            return Err(Reason::NicFull);
                        }
                    }
                }
            }
        }
        self.sent(id, length);
        Ok(())
    }

    /// Checks that the packet may be sent by this sliver, and decides where it goes.
    fn sliver_route(
        &mut self,
        now: Time,
        place: Place,
        id: SliverId,
        packet: &Packet,
    ) -> Result<Route, Reason> {
        if packet.source != place.address {
            return Err(Reason::ForeignSource);
        }
        if packet.source_route {
            return Err(Reason::SourceRoute);
        }
        if packet.destination != place.address && !place.may_be_sent_to(packet.destination) {
            return Err(Reason::Destination);
        }
        let owned =
            |table, port| if self.owners.get(table, port) == id { Ok(()) } else { Err(Reason::PortNotOwned) };
        match packet.transport {
            Transport::Tcp { source, .. } => owned(Table::Tcp, source)?,
            Transport::Udp { source, .. } => owned(Table::Udp, source)?,
            Transport::EchoRequest { id: echo } => {
                self.owners.claim(now, id, echo).map_err(|error| match error {
                    ClaimError::Taken => Reason::IcmpIdTaken,
                    ClaimError::Exhausted => Reason::IcmpIdsExhausted,
                })?
            }
            Transport::IcmpError { about } => {
                if !self.may_report(place, id, packet.destination, &about) {
                    return Err(Reason::IcmpErrorNotOwned);
                }
            }
            // Echo requests from outside are the host's, so slivers have nothing to reply to.
            Transport::EchoReply { .. } | Transport::OtherIcmp => return Err(Reason::IcmpType),
            Transport::Other => return Err(Reason::Protocol),
            Transport::Unseen => {}
        }
        let sliver = self.slivers.get_mut(&id).ok_or(Reason::PortNotOwned)?;
        if packet.fragment == Fragment::Later {
            return sliver.fragments.decision(now, packet).ok_or(Reason::FragmentWithoutFirst);
        }
        let route = if packet.destination == place.address {
            Route::To(destination_owner(&self.owners, place, packet))
        } else {
            Route::Out
        };
        if packet.fragment == Fragment::First {
            sliver.fragments.decided(now, packet, route);
        }
        Ok(route)
    }

    /// An ICMP error may be sent about a packet to one of the sliver's own ports, and only to that packet's sender: errors
    /// end other people's connections.
    fn may_report(&self, place: Place, id: SliverId, to: Ipv4Addr, about: &About) -> bool {
        let owner = match about.transport {
            AboutTransport::Tcp { destination, .. } => self.owners.get(Table::Tcp, destination),
            AboutTransport::Udp { destination, .. } => self.owners.get(Table::Udp, destination),
            // Never about an ICMP message: echo replies alone reach slivers, and nobody reports those.
            AboutTransport::EchoRequest { .. } | AboutTransport::Other => return false,
        };
        owner == id && about.destination == place.address && about.source == to
    }

    fn answer_arp(&mut self, id: SliverId, payload: &[u8], out: &mut impl Ports) -> Result<(), Reason> {
        let ArpRepr::EthernetIpv4 { operation, source_protocol_addr, target_protocol_addr, .. } =
            ArpPacket::new_checked(payload)
                .and_then(|p| ArpRepr::parse(&p))
                .map_err(|_| Reason::Malformed)?
        else {
            return Err(Reason::ArpNotGateway);
        };
        if operation != ArpOperation::Request || target_protocol_addr != GATEWAY {
            return Err(Reason::ArpNotGateway);
        }
        let Some(mac) = self.slivers.get(&id).map(|sliver| sliver.mac) else { return Ok(()) };
        let reply = arp_frame(ArpOperation::Reply, (GATEWAY_MAC, GATEWAY), (mac, source_protocol_addr), mac);
        if out.to_sliver(id, &reply) { Ok(()) } else { Err(Reason::RingFull) }
    }

    fn learn(&mut self, now: Time, place: Place, payload: &[u8], out: &mut impl Ports) {
        let Ok(ArpRepr::EthernetIpv4 {
            source_hardware_addr: EthernetAddress(mac),
            source_protocol_addr: address,
            target_protocol_addr: target,
            ..
        }) = ArpPacket::new_checked(payload).and_then(|p| ArpRepr::parse(&p))
        else {
            return;
        };
        let neighbour = place.on_link(address) || place.gateway == Some(address);
        if !neighbour
            || address == place.address
            || packet::is_multicast(mac)
            || mac == [0; 6]
            || mac == self.mac
        {
            return;
        }
        // RFC 826: an entry is made for who asks us, updated for who merely speaks.
        for (sliver, mut frame) in self.neighbours.learn(now, address, mac, target == place.address) {
            set_macs(&mut frame, mac, self.mac);
            if out.to_nic(&frame) {
                self.sent(sliver, frame.len());
            } else {
                self.count(sliver, Reason::NicFull);
            }
        }
    }

    fn ask(&mut self, hop: Ipv4Addr, out: &mut impl Ports) {
        let Some(place) = self.place else { return };
        let frame = arp_frame(ArpOperation::Request, (self.mac, place.address), ([0; 6], hop), [0xff; 6]);
        if !out.to_nic(&frame) {
            self.drops.count(Reason::NicFull);
        }
    }

    fn deliver_to_host(&mut self, frame: &[u8], out: &mut impl Ports) {
        if !out.to_host(frame) {
            self.drops.count(Reason::HostFull);
        }
    }

    /// Gives a sliver the first `length` bytes of a frame, with an Ethernet header of its own imaginary link.
    fn deliver(&mut self, owner: SliverId, frame: &mut [u8], length: usize, out: &mut impl Ports) {
        let Some(sliver) = self.slivers.get_mut(&owner) else { return self.drops.count(Reason::Destination) };
        let Some(frame) = frame.get_mut(..length) else { return sliver.drops.count(Reason::Malformed) };
        if length > MAX_FRAME {
            return sliver.drops.count(Reason::Oversize);
        }
        set_macs(frame, sliver.mac, GATEWAY_MAC);
        if out.to_sliver(owner, frame) {
            sliver.rx.0 += 1;
            sliver.rx.1 += length as u64;
        } else {
            sliver.drops.count(Reason::RingFull);
        }
    }

    fn sent(&mut self, id: SliverId, length: usize) {
        if let Some(sliver) = self.slivers.get_mut(&id) {
            sliver.tx.0 += 1;
            sliver.tx.1 += length as u64;
        }
    }

    /// Drops what was decided about or waits for a sliver that is gone or new.
    fn forget(&mut self, id: SliverId) {
        self.neighbours.forget(id);
        self.incoming.retain(|owner| owner != id);
        self.from_host.retain(|route| route != Route::To(id));
        for sliver in self.slivers.values_mut() {
            sliver.fragments.retain(|route| route != Route::To(id));
        }
    }
}

impl Sliver {
    fn status(&self, sliver: SliverId) -> SliverStatus {
        SliverStatus {
            sliver,
            slice: self.slice.clone(),
            ports: self.ports.clone(),
            tx_frames: self.tx.0,
            tx_bytes: self.tx.1,
            rx_frames: self.rx.0,
            rx_bytes: self.rx.1,
            drops: self.drops.named(),
        }
    }
}

/// Who owns what a packet to the node's address is addressed to.
fn destination_owner(owners: &Owners, place: Place, packet: &Packet) -> SliverId {
    match packet.transport {
        Transport::Tcp { destination, .. } => owners.get(Table::Tcp, destination),
        Transport::Udp { destination, .. } => owners.get(Table::Udp, destination),
        Transport::EchoReply { id } => owners.get(Table::Icmp, id),
        // The error concerns whoever sent what it is about.
        Transport::IcmpError { about } if about.source == place.address => match about.transport {
            AboutTransport::Tcp { source, .. } => owners.get(Table::Tcp, source),
            AboutTransport::Udp { source, .. } => owners.get(Table::Udp, source),
            AboutTransport::EchoRequest { id } => owners.get(Table::Icmp, id),
            AboutTransport::Other => HOST,
        },
        _ => HOST,
    }
}

fn malformed(_: packet::Malformed) -> Reason {
    Reason::Malformed
}

/// Sets destination and source; a frame that has no room for them is left alone.
fn set_macs(frame: &mut [u8], destination: Mac, source: Mac) {
    if let Some(macs) = frame.first_chunk_mut::<12>() {
        macs[..6].copy_from_slice(&destination);
        macs[6..].copy_from_slice(&source);
    }
}

fn arp_frame(operation: ArpOperation, source: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr), to: Mac) -> [u8; 42] {
    let mut frame = [0; 42];
    set_macs(&mut frame, to, source.0);
    frame[12..14].copy_from_slice(&[0x08, 0x06]);
    let repr = ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: EthernetAddress(source.0),
        source_protocol_addr: source.1,
        target_hardware_addr: EthernetAddress(target.0),
        target_protocol_addr: target.1,
    };
    repr.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET..]));
    frame
}

#[cfg(test)]
mod craft;
#[cfg(test)]
mod model_test;
#[cfg(test)]
mod test;
