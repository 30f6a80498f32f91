//! The engine against a naive model, packet by packet; and against noise.
//!
//! The model knows each sliver's ports as plain sets and re-reads each sent frame on its own, without the engine's parser.

use std::collections::HashSet;

use proptest::prelude::*;

use super::craft::*;
use super::*;

const SLIVERS: u32 = 4;

/// A packet as a test thinks of it.
#[derive(Debug, Clone)]
struct Spec {
    foreign_source: bool,
    to_node: bool,
    body: Body,
}

#[derive(Debug, Clone)]
enum Body {
    Tcp(u16, u16),
    Udp(u16, u16),
    Echo { reply: bool, id: u16 },
    Error { about_ours: bool, tcp: bool, source: u16, destination: u16 },
    ErrorAboutEcho { id: u16 },
    Other(u8),
}

#[derive(Debug, Clone)]
enum Step {
    FromNic(Spec),
    FromSliver(u32, Spec),
    Attach(u32),
    Detach(u32),
    Wait(u64),
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![8 => 20_090u16..20_510, 2 => 8000u16..8006, 1 => any::<u16>()]
}

fn body() -> impl Strategy<Value = Body> {
    prop_oneof![
        4 => (port(), port()).prop_map(|(s, d)| Body::Tcp(s, d)),
        4 => (port(), port()).prop_map(|(s, d)| Body::Udp(s, d)),
        3 => (any::<bool>(), 0u16..6).prop_map(|(reply, id)| Body::Echo { reply, id }),
        3 => (any::<bool>(), any::<bool>(), port(), port())
            .prop_map(|(about_ours, tcp, source, destination)| Body::Error { about_ours, tcp, source, destination }),
        1 => (0u16..6).prop_map(|id| Body::ErrorAboutEcho { id }),
        1 => any::<u8>().prop_filter("known protocols", |p| ![1, 6, 17].contains(p)).prop_map(Body::Other),
    ]
}

fn spec() -> impl Strategy<Value = Spec> {
    (prop::bool::weighted(0.1), any::<bool>(), body()).prop_map(|(foreign_source, to_node, body)| Spec {
        foreign_source,
        to_node,
        body,
    })
}

fn step() -> impl Strategy<Value = Step> {
    let who = 1..=SLIVERS;
    prop_oneof![
        10 => spec().prop_map(Step::FromNic),
        10 => (who.clone(), spec()).prop_map(|(n, spec)| Step::FromSliver(n, spec)),
        1 => who.clone().prop_map(Step::Attach),
        1 => who.prop_map(Step::Detach),
        1 => (0u64..90).prop_map(Step::Wait),
    ]
}

impl Spec {
    fn packet(&self, inbound: bool) -> Vec<u8> {
        let (source, destination) = match (inbound, self.foreign_source, self.to_node) {
            (true, _, true) => (FAR, NODE),
            (true, _, false) => (FAR, Ipv4Addr::BROADCAST),
            (false, false, true) => (NODE, NODE),
            (false, false, false) => (NODE, FAR),
            (false, true, true) => (FAR, NODE),
            (false, true, false) => (ROUTER_IP, FAR),
        };
        match self.body {
            Body::Tcp(s, d) => ip(source, destination, 6, 0, &l4(s, d)),
            Body::Udp(s, d) => ip(source, destination, 17, 0, &l4(s, d)),
            Body::Echo { reply, id } => {
                ip(source, destination, 1, 0, &icmp(if reply { 0 } else { 8 }, id, &[]))
            }
            Body::Error { about_ours, tcp, source: s, destination: d } => {
                let remote = if inbound { FAR } else { destination };
                let (from, to) = if about_ours { (NODE, remote) } else { (remote, NODE) };
                let about = ip(from, to, if tcp { 6 } else { 17 }, 0, &l4(s, d)[..8]);
                ip(source, destination, 1, 0, &icmp(11, 0, &about))
            }
            Body::ErrorAboutEcho { id } => {
                ip(source, destination, 1, 0, &icmp(11, 0, &ip(NODE, destination, 1, 0, &icmp(8, id, &[]))))
            }
            Body::Other(protocol) => ip(source, destination, protocol, 0, &[0; 40]),
        }
    }
}

/// Slivers as plain sets.
#[derive(Debug, Default)]
struct Model {
    attached: HashSet<u32>,
    /// (identifier, owner, last use)
    ids: Vec<(u16, u32, Time)>,
}

impl Model {
    fn owns(&self, n: u32, tcp: bool, port: u16) -> bool {
        let grant = ports(n);
        self.attached.contains(&n)
            && ((grant.first..=grant.last).contains(&port)
                || if tcp { grant.tcp.contains(&port) } else { grant.udp.contains(&port) })
    }

    fn owner(&self, tcp: bool, port: u16) -> Option<u32> {
        (1..=SLIVERS).find(|&n| self.owns(n, tcp, port))
    }

    fn id_owner(&self, id: u16) -> Option<u32> {
        self.ids.iter().find(|claim| claim.0 == id).map(|claim| claim.1)
    }

    fn detach(&mut self, n: u32) {
        self.attached.remove(&n);
        self.ids.retain(|claim| claim.1 != n);
    }

    /// Whose a packet to the node's address is.
    fn receiver(&self, body: &Body, from_node: bool) -> Option<u32> {
        match *body {
            Body::Tcp(_, d) => self.owner(true, d),
            Body::Udp(_, d) => self.owner(false, d),
            Body::Echo { reply: true, id } | Body::ErrorAboutEcho { id } => self.id_owner(id),
            Body::Echo { reply: false, .. } | Body::Other(_) => None,
            // From the node to the node, both addresses in the embedded packet are the node's.
            Body::Error { about_ours, tcp, source, .. } if about_ours || from_node => self.owner(tcp, source),
            Body::Error { .. } => None,
        }
    }

    fn may_send(&mut self, now: Time, n: u32, spec: &Spec) -> bool {
        if spec.foreign_source || !self.attached.contains(&n) {
            return false;
        }
        match spec.body {
            Body::Tcp(s, _) => self.owns(n, true, s),
            Body::Udp(s, _) => self.owns(n, false, s),
            Body::Echo { reply: false, id } => {
                let taken = |c: &&(u16, u32, Time)| c.0 == id && c.1 != n && now < c.2 + owners::ID_IDLE;
                if self.ids.iter().any(|claim| taken(&claim)) {
                    return false;
                }
                self.ids.retain(|claim| claim.0 != id);
                self.ids.push((id, n, now));
                true
            }
            // The embedded packet must have come to the node, from where the error goes.
            Body::Error { about_ours, tcp, destination, .. } => {
                (!about_ours || spec.to_node) && self.owns(n, tcp, destination)
            }
            _ => false,
        }
    }
}

/// Every frame that leaves on the NIC has the node's MAC address and, if it is no ARP, the node's IP address.
fn leaves_properly(frame: &[u8]) -> bool {
    frame[6..12] == NIC && (frame[12..14] == [8, 6] || frame[26..30] == NODE.octets())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_packet_goes_to_exactly_its_owner(steps in prop::collection::vec(step(), 1..120)) {
        let (mut engine, mut wires) = node();
        let mut model = Model { attached: [1, 2].into(), ids: Vec::new() };
        let mut now = Time::ZERO;
        for step in steps {
            // The router keeps answering.
            engine.nic_frame(now, &mut arp(ROUTER, (ROUTER, ROUTER_IP), NODE), &mut wires);
            wires.take();
            match step {
                Step::Attach(n) => {
                    engine.attach(sliver(n), format!("site_{n}"), mac(n), ports(n)).unwrap();
                    // Attached again, it is the same sliver: it keeps its identifiers.
                    model.attached.insert(n);
                }
                Step::Detach(n) => {
                    engine.detach(sliver(n));
                    model.detach(n);
                }
                Step::Wait(seconds) => now += Time::from_secs(seconds),
                Step::FromNic(spec) => {
                    let packet = spec.packet(true);
                    engine.nic_frame(now, &mut inbound(&packet), &mut wires);
                    let owner = if spec.to_node { model.receiver(&spec.body, false) } else { None };
                    let expected = match owner {
                        Some(n) => Sent::Sliver(sliver(n), ethernet(mac(n), GATEWAY_MAC, 0x0800, &packet)),
                        None => Sent::Host(inbound(&packet)),
                    };
                    prop_assert_eq!(wires.take(), [expected]);
                }
                Step::FromSliver(n, spec) => {
                    let packet = spec.packet(false);
                    engine.sliver_frame(now, sliver(n), &mut outbound(n, &packet), &mut wires);
                    let sent = wires.take();
                    let expected = model.may_send(now, n, &spec).then(|| match (spec.to_node, model.receiver(&spec.body, true)) {
                        (false, _) => Sent::Nic(ethernet(ROUTER, NIC, 0x0800, &packet)),
                        (true, Some(to)) => Sent::Sliver(sliver(to), ethernet(mac(to), GATEWAY_MAC, 0x0800, &packet)),
                        (true, None) => Sent::Host(ethernet(NIC, GATEWAY_MAC, 0x0800, &packet)),
                    });
                    prop_assert_eq!(sent, expected.into_iter().collect::<Vec<_>>());
                }
            }
        }
    }

    /// Noise, and real packets with noise in them: no panic, and nothing leaves that must not.
    #[test]
    fn noise_is_survived(
        frames in prop::collection::vec((0u8..4, spec(), prop::collection::vec((0usize..80, any::<u8>()), 0..4), 0usize..120, any::<bool>()), 1..60),
    ) {
        let (mut engine, mut wires) = node();
        let mut noise = 0x9e37_79b9_u32;
        for (from, spec, edits, cut, random) in frames {
            let mut frame = match from {
                0 => inbound(&spec.packet(true)),
                1 => ethernet(ROUTER, NIC, 0x0800, &spec.packet(false)),
                _ => outbound(1, &spec.packet(false)),
            };
            if random {
                for byte in frame.iter_mut().skip(12) {
                    noise = noise.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
                    *byte = (noise >> 24) as u8;
                }
            }
            for (at, value) in edits {
                if let Some(byte) = frame.get_mut(at) { *byte = value; }
            }
            if cut < 60 { frame.truncate(cut); }
            packet::complete_checksum(&mut frame.clone());
            match from {
                0 => engine.nic_frame(Time::ZERO, &mut frame, &mut wires),
                1 => engine.host_frame(Time::ZERO, &mut frame, &mut wires),
                _ => engine.sliver_frame(Time::ZERO, sliver(1), &mut frame, &mut wires),
            }
            for sent in wires.take() {
                if let (2.., Sent::Nic(frame)) = (from, sent) {
                    prop_assert!(leaves_properly(&frame));
                }
            }
        }
        engine.tick(Time::from_secs(10), &mut wires);
    }
}
