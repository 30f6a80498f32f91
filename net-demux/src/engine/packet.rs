//! What the engine needs to know about a packet, read from bytes that anybody may have written. Pure; never panics.
//!
//! A [`Packet`] that exists is a well-formed IPv4 header whose lengths lie within the frame. Lengths are bytes.

use std::net::Ipv4Addr;

use smoltcp::wire::{IpAddress, IpProtocol, Ipv4Packet, TcpPacket, UdpPacket};

/// Length of an Ethernet header.
pub const ETHERNET: usize = 14;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The packet cannot be what it says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// An Ethernet header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ethernet {
    pub destination: Mac,
    pub source: Mac,
    pub kind: Kind,
}

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Arp,
    Ipv4,
    Ipv6,
    Other,
}

impl Ethernet {
    /// Reads the header of a frame.
    pub fn parse(frame: &[u8]) -> Result<Self, Malformed> {
        let header: &[u8; ETHERNET] = frame.first_chunk().ok_or(Malformed)?;
        let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, k0, k1] = *header;
        let kind = match u16::from_be_bytes([k0, k1]) {
            0x0806 => Kind::Arp,
            0x0800 => Kind::Ipv4,
            0x86dd => Kind::Ipv6,
            _ => Kind::Other,
        };
        Ok(Self { destination: [d0, d1, d2, d3, d4, d5], source: [s0, s1, s2, s3, s4, s5], kind })
    }
}

/// True for group addresses, the broadcast address among them.
pub fn is_multicast(mac: Mac) -> bool {
    mac[0] & 1 != 0
}

/// An IPv4 packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub protocol: u8,
    /// Identifies the fragments of one datagram.
    pub id: u16,
    /// Header and payload, without Ethernet's padding.
    pub total_len: usize,
    pub fragment: Fragment,
    /// Carries an option that lets the sender choose the way.
    pub source_route: bool,
    pub transport: Transport,
}

/// Whether it is part of a larger datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    Whole,
    First,
    Later,
}

/// Who it concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Tcp {
        source: u16,
        destination: u16,
    },
    Udp {
        source: u16,
        destination: u16,
    },
    EchoRequest {
        id: u16,
    },
    EchoReply {
        id: u16,
    },
    IcmpError {
        about: About,
    },
    /// Any other ICMP message, redirects among them.
    OtherIcmp,
    Other,
    /// Not the first fragment: nothing of the transport's header is in it.
    Unseen,
}

/// The packet that an ICMP error is about, from its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct About {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub transport: AboutTransport,
}

/// Who the embedded packet concerned. RFC 792 guarantees 8 bytes after its IP header, no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AboutTransport {
    Tcp {
        source: u16,
        destination: u16,
    },
    Udp {
        source: u16,
        destination: u16,
    },
    /// Has an identifier, not ports.
    EchoRequest {
        id: u16,
    },
    /// Other protocols, other ICMP, and later fragments.
    Other,
}

impl Packet {
    /// Reads what follows a frame's Ethernet header.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        // smoltcp checks all lengths against the buffer, but not the version.
        let header = Ipv4Packet::new_checked(bytes).map_err(|_| Malformed)?;
        if header.version() != 4 {
            return Err(Malformed);
        }
        let fragment = match (header.frag_offset(), header.more_frags()) {
            (0, false) => Fragment::Whole,
            (0, true) => Fragment::First,
            _ => Fragment::Later,
        };
        let payload = header.payload();
        let transport = if fragment == Fragment::Later {
            Transport::Unseen
        } else {
            match header.next_header() {
                IpProtocol::Tcp => {
                    ports(payload).map(|(source, destination)| Transport::Tcp { source, destination })
                }
                IpProtocol::Udp => {
                    ports(payload).map(|(source, destination)| Transport::Udp { source, destination })
                }
                IpProtocol::Icmp => icmp(payload),
                _ => Ok(Transport::Other),
            }?
        };
        Ok(Self {
            source: header.src_addr(),
            destination: header.dst_addr(),
            protocol: header.next_header().into(),
            id: header.ident(),
            total_len: header.total_len().into(),
            fragment,
            source_route: source_route(bytes.get(20..header.header_len().into()).unwrap_or(&[])),
            transport,
        })
    }
}

fn be16(bytes: &[u8], at: usize) -> Result<u16, Malformed> {
    let pair = bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or(Malformed)?;
    Ok(u16::from_be_bytes(*pair))
}

fn ports(payload: &[u8]) -> Result<(u16, u16), Malformed> {
    Ok((be16(payload, 0)?, be16(payload, 2)?))
}

fn icmp(payload: &[u8]) -> Result<Transport, Malformed> {
    if payload.len() < 8 {
        return Err(Malformed);
    }
    Ok(match payload[0] {
        0 => Transport::EchoReply { id: be16(payload, 4)? },
        8 => Transport::EchoRequest { id: be16(payload, 4)? },
        // Destination unreachable, source quench, time exceeded, parameter problem. Not redirect: that one gives orders.
        3 | 4 | 11 | 12 => Transport::IcmpError { about: About::parse(&payload[8..])? },
        _ => Transport::OtherIcmp,
    })
}

impl About {
    /// Reads an embedded packet, of which only the IP header and 8 bytes need be there.
    fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let header: &[u8; 20] = bytes.first_chunk().ok_or(Malformed)?;
        let header_len = usize::from(header[0] & 0xf) * 4;
        if header[0] >> 4 != 4 || header_len < 20 {
            return Err(Malformed);
        }
        let offset = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
        let payload = bytes.get(header_len..).ok_or(Malformed)?;
        let transport =
            if offset != 0 {
                AboutTransport::Other
            } else {
                match header[9] {
                    6 => ports(payload)
                        .map(|(source, destination)| AboutTransport::Tcp { source, destination })?,
                    17 => ports(payload)
                        .map(|(source, destination)| AboutTransport::Udp { source, destination })?,
                    1 if payload.first() == Some(&8) => AboutTransport::EchoRequest { id: be16(payload, 4)? },
                    _ => AboutTransport::Other,
                }
            };
        let address = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
        Ok(Self { source: address(12), destination: address(16), transport })
    }
}

/// Looks for loose (131) and strict (137) source routes among the options. Options that make no sense count as one.
fn source_route(mut options: &[u8]) -> bool {
    while let Some((&kind, rest)) = options.split_first() {
        match kind {
            0 => return false,
            1 => options = rest,
            131 | 137 => return true,
            _ => match options
                .get(1)
                .map(|&len| usize::from(len))
                .filter(|&len| len >= 2)
                .and_then(|len| options.get(len..))
            {
                Some(next) => options = next,
                None => return true,
            },
        }
    }
    false
}

/// Fills in the TCP or UDP checksum of a frame that the kernel handed over with a partial one.
pub fn complete_checksum(frame: &mut [u8]) {
    let Some(bytes) = frame.get_mut(ETHERNET..) else { return };
    let Ok(mut packet) = Ipv4Packet::new_checked(bytes) else { return };
    if packet.frag_offset() != 0 || packet.more_frags() {
        return;
    }
    let (source, destination) = (IpAddress::Ipv4(packet.src_addr()), IpAddress::Ipv4(packet.dst_addr()));
    match packet.next_header() {
        IpProtocol::Tcp => {
            if let Ok(mut segment) = TcpPacket::new_checked(packet.payload_mut()) {
                segment.fill_checksum(&source, &destination);
            }
        }
        IpProtocol::Udp => {
            if let Ok(mut datagram) = UdpPacket::new_checked(packet.payload_mut()) {
                datagram.fill_checksum(&source, &destination);
            }
        }
        _ => {}
    }
}
