//! Frames for tests, and wires that remember what was sent over them.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use super::*;

pub const NIC: Mac = [0x52, 0x54, 0, 0, 0, 1];
pub const ROUTER: Mac = [0x52, 0x54, 0, 0, 0, 2];
pub const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 5);
pub const ROUTER_IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub const FAR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub const ALL: Mac = [0xff; 6];

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sent {
    Nic(Vec<u8>),
    Host(Vec<u8>),
    Sliver(SliverId, Vec<u8>),
}

/// Takes everything, or nothing of some.
#[derive(Debug, Default)]
pub struct Wires {
    pub sent: Vec<Sent>,
    pub full: bool,
}

impl Wires {
    pub fn take(&mut self) -> Vec<Sent> {
        std::mem::take(&mut self.sent)
    }

    fn push(&mut self, sent: Sent) -> bool {
        if !self.full {
            self.sent.push(sent);
        }
        !self.full
    }
}

impl Ports for Wires {
    fn to_nic(&mut self, frame: &[u8]) -> bool {
        self.push(Sent::Nic(frame.to_vec()))
    }
    fn to_host(&mut self, frame: &[u8]) -> bool {
        self.push(Sent::Host(frame.to_vec()))
    }
    fn to_sliver(&mut self, sliver: SliverId, frame: &[u8]) -> bool {
        self.push(Sent::Sliver(sliver, frame.to_vec()))
    }
}

pub fn sliver(n: u32) -> SliverId {
    SliverId(100_000 + n)
}

pub fn mac(n: u32) -> Mac {
    let [a, b, c, d] = sliver(n).0.to_be_bytes();
    [2, 0, a, b, c, d]
}

/// Sliver n has the 100 ports from 20000 + 100 n, and TCP port 8000 + n.
pub fn ports(n: u32) -> PortGrant {
    let first = 20_000 + 100 * n as u16;
    PortGrant { first, last: first + 99, tcp: [8000 + n as u16].into(), udp: BTreeSet::new() }
}

/// A node with slivers 1 and 2, whose router has answered.
pub fn node() -> (Engine, Wires) {
    let (mut engine, mut wires) = (Engine::new(NIC), Wires::default());
    engine.set_place(Place { address: NODE, prefix_len: 24, gateway: Some(ROUTER_IP) });
    for n in 1..=2 {
        engine.attach(sliver(n), format!("site_{n}"), mac(n), ports(n)).unwrap();
    }
    engine.nic_frame(Time::ZERO, &mut arp(ROUTER, (ROUTER, ROUTER_IP), NODE), &mut wires);
    wires.take();
    (engine, wires)
}

pub fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from[..], &kind.to_be_bytes(), payload].concat()
}

pub fn arp(from: Mac, sender: (Mac, Ipv4Addr), target: Ipv4Addr) -> Vec<u8> {
    let mut frame = arp_frame(ArpOperation::Request, sender, ([0; 6], target), ALL).to_vec();
    frame[6..12].copy_from_slice(&from);
    frame
}

/// An IPv4 header and payload. `fragment` is the flags and offset field.
pub fn ip(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let mut header = [0u8; 20];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    header[4..6].copy_from_slice(&77u16.to_be_bytes());
    header[6..8].copy_from_slice(&fragment.to_be_bytes());
    header[8] = 64;
    header[9] = protocol;
    header[12..16].copy_from_slice(&source.octets());
    header[16..20].copy_from_slice(&destination.octets());
    [&header[..], payload].concat()
}

pub fn l4(source: u16, destination: u16) -> Vec<u8> {
    [&source.to_be_bytes()[..], &destination.to_be_bytes(), &[0; 16]].concat()
}

pub fn icmp(kind: u8, id: u16, rest: &[u8]) -> Vec<u8> {
    let [a, b] = id.to_be_bytes();
    [&[kind, 0, 0, 0, a, b, 0, 1], rest].concat()
}

/// A frame from the router to the node.
pub fn inbound(packet: &[u8]) -> Vec<u8> {
    ethernet(NIC, ROUTER, 0x0800, packet)
}

/// A frame from sliver n.
pub fn outbound(n: u32, packet: &[u8]) -> Vec<u8> {
    ethernet(GATEWAY_MAC, mac(n), 0x0800, packet)
}
