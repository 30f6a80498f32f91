//! What each kind of frame does, and each reason for dropping one.

use super::craft::*;
use super::*;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;

/// Feeds a frame from the link to a fresh node.
fn arrives(mut frame: Vec<u8>) -> Vec<Sent> {
    let (mut engine, mut wires) = node();
    engine.nic_frame(Time::ZERO, &mut frame, &mut wires);
    wires.take()
}

fn arrives_dropped(mut frame: Vec<u8>, reason: Reason) {
    let (mut engine, mut wires) = node();
    engine.nic_frame(Time::ZERO, &mut frame, &mut wires);
    assert_eq!(wires.take(), [], "expected {reason:?}");
    assert_eq!(engine.drops.get(reason), 1, "{:?}", engine.drops());
}

/// Sliver 1 sends.
fn sends(mut frame: Vec<u8>) -> Vec<Sent> {
    let (mut engine, mut wires) = node();
    engine.sliver_frame(Time::ZERO, sliver(1), &mut frame, &mut wires);
    wires.take()
}

fn sends_dropped(mut frame: Vec<u8>, reason: Reason) {
    let (mut engine, mut wires) = node();
    engine.sliver_frame(Time::ZERO, sliver(1), &mut frame, &mut wires);
    assert_eq!(wires.take(), [], "expected {reason:?}");
    let status = &engine.list(SliverId(0))[0];
    assert_eq!(status.drops, BTreeMap::from([(reason.name().to_owned(), 1)]));
    assert_eq!(status.tx_frames, 0);
}

fn to_sliver(n: u32, packet: &[u8]) -> Vec<Sent> {
    vec![Sent::Sliver(sliver(n), ethernet(mac(n), GATEWAY_MAC, 0x0800, packet))]
}

fn to_router(packet: &[u8]) -> Vec<Sent> {
    vec![Sent::Nic(ethernet(ROUTER, NIC, 0x0800, packet))]
}

#[test]
fn incoming_packets_go_to_the_owner_of_their_port() {
    let packet = ip(FAR, NODE, TCP, 0, &l4(443, 20_150));
    assert_eq!(arrives(inbound(&packet)), to_sliver(1, &packet));
    let packet = ip(FAR, NODE, UDP, 0, &l4(53, 20_299));
    assert_eq!(arrives(inbound(&packet)), to_sliver(2, &packet));
    let packet = ip(FAR, NODE, TCP, 0, &l4(443, 8002));
    assert_eq!(arrives(inbound(&packet)), to_sliver(2, &packet));
    // The exact reservation is TCP's only.
    for packet in [ip(FAR, NODE, UDP, 0, &l4(443, 8002)), ip(FAR, NODE, TCP, 0, &l4(443, 22))] {
        assert_eq!(arrives(inbound(&packet)), [Sent::Host(inbound(&packet))]);
    }
}

#[test]
fn what_nobody_owns_is_the_hosts() {
    for packet in [
        ip(FAR, NODE, ICMP, 0, &icmp(8, 20_150, &[])),
        ip(FAR, NODE, ICMP, 0, &icmp(0, 20_150, &[])),
        ip(FAR, NODE, ICMP, 0, &icmp(13, 1, &[0; 12])),
        ip(FAR, NODE, 47, 0, &[0; 30]),
        ip(FAR, Ipv4Addr::BROADCAST, UDP, 0, &l4(67, 20_150)),
    ] {
        assert_eq!(arrives(inbound(&packet)), [Sent::Host(inbound(&packet))]);
    }
    let ipv6 = ethernet(NIC, ROUTER, 0x86dd, &[0x60; 40]);
    assert_eq!(arrives(ipv6.clone()), [Sent::Host(ipv6)]);
    let question = arp(ROUTER, (ROUTER, ROUTER_IP), NODE);
    assert_eq!(arrives(question.clone()), [Sent::Host(question)]);
}

#[test]
fn padding_of_short_frames_is_cut() {
    let packet = ip(FAR, NODE, UDP, 0, &l4(53, 20_150)[..8]);
    let mut frame = inbound(&packet);
    frame.resize(60, 0xee);
    assert_eq!(arrives(frame), to_sliver(1, &packet));
}

#[test]
fn incoming_frames_that_are_dropped() {
    let packet = ip(FAR, NODE, TCP, 0, &l4(443, 20_150));
    arrives_dropped(ethernet(mac(1), ROUTER, 0x0800, &packet), Reason::NotForUs);
    arrives_dropped(ethernet(ALL, ROUTER, 0x0800, &packet), Reason::LinkBroadcast);
    arrives_dropped(inbound(&ip(NODE, NODE, TCP, 0, &l4(443, 20_150))), Reason::Martian);
    arrives_dropped(inbound(&packet[..19]), Reason::Malformed);
    arrives_dropped(vec![0; 13], Reason::Malformed);
    for (at, value) in [(0, 0x44), (0, 0x65), (2, 0xff)] {
        let mut packet = packet.clone();
        packet[at] = value;
        arrives_dropped(inbound(&packet), Reason::Malformed);
    }
    arrives_dropped(inbound(&ip(FAR, NODE, TCP, 0, &[0; 3])), Reason::Malformed);
    arrives_dropped(inbound(&ip(FAR, NODE, ICMP, 0, &[3, 0, 0, 0, 0, 0, 0, 0, 0x45])), Reason::Malformed);
    arrives_dropped(inbound(&ip(FAR, NODE, UDP, 8, &[0; 40])), Reason::FragmentWithoutFirst);

    let (mut engine, mut wires) = node();
    engine.nic_frame(Time::ZERO, &mut inbound(&ip(FAR, NODE, TCP, 0, &[78; 1481])), &mut wires);
    assert_eq!(engine.list(SliverId(0))[0].drops, BTreeMap::new());
    let mut long = l4(443, 20_150);
    long.resize(1481, 0);
    engine.nic_frame(Time::ZERO, &mut inbound(&ip(FAR, NODE, TCP, 0, &long)), &mut wires);
    assert_eq!(engine.list(SliverId(0))[0].drops, BTreeMap::from([("oversize".to_owned(), 1)]));
    wires.full = true;
    engine.nic_frame(Time::ZERO, &mut inbound(&packet), &mut wires);
    assert_eq!(engine.list(SliverId(0))[0].drops["ring-full"], 1);
}

#[test]
fn icmp_errors_go_to_whoever_sent_what_they_are_about() {
    let error = |protocol, eight: &[u8]| {
        ip(FAR, NODE, ICMP, 0, &icmp(3, 0, &ip(NODE, FAR, protocol, 0, &eight[..8])))
    };
    for protocol in [TCP, UDP] {
        let packet = error(protocol, &l4(20_205, 80));
        assert_eq!(arrives(inbound(&packet)), to_sliver(2, &packet));
    }
    let packet = error(TCP, &l4(50_000, 80));
    assert_eq!(arrives(inbound(&packet)), [Sent::Host(inbound(&packet))]);
    // An embedded echo request has an identifier, not ports: its checksum, 20205, must not be taken for a source port.
    let mut echo = icmp(8, 7, &[]);
    echo[0..4].copy_from_slice(&[8, 0, 0x4e, 0xed]);
    let packet = error(ICMP, &echo);
    assert_eq!(arrives(inbound(&packet)), [Sent::Host(inbound(&packet))]);
    let (mut engine, mut wires) = node();
    engine.sliver_frame(
        Time::ZERO,
        sliver(2),
        &mut outbound(2, &ip(NODE, FAR, ICMP, 0, &icmp(8, 7, &[]))),
        &mut wires,
    );
    wires.take();
    engine.nic_frame(Time::ZERO, &mut inbound(&packet), &mut wires);
    assert_eq!(wires.take(), to_sliver(2, &packet));
    // Not about a packet of ours, and a redirect: the host's stack knows what to think of them.
    for packet in [
        ip(FAR, NODE, ICMP, 0, &icmp(3, 0, &ip(FAR, NODE, TCP, 0, &l4(20_205, 80)))),
        ip(FAR, NODE, ICMP, 0, &icmp(5, 0, &ip(NODE, FAR, TCP, 0, &l4(20_205, 80)))),
    ] {
        assert_eq!(arrives(inbound(&packet)), [Sent::Host(inbound(&packet))]);
    }
}

#[test]
fn fragments_follow_their_first() {
    let (mut engine, mut wires) = node();
    let first = ip(FAR, NODE, UDP, 0x2000, &l4(53, 20_250)[..16]);
    let later = ip(FAR, NODE, UDP, 0x2, &[1; 40]);
    engine.nic_frame(Time::ZERO, &mut inbound(&first), &mut wires);
    engine.nic_frame(Time::from_secs(29), &mut inbound(&later), &mut wires);
    assert_eq!(wires.take(), [to_sliver(2, &first), to_sliver(2, &later)].concat());
    engine.nic_frame(Time::from_secs(30), &mut inbound(&later), &mut wires);
    engine.nic_frame(Time::ZERO, &mut inbound(&ip(ROUTER_IP, NODE, UDP, 0x2, &[1; 40])), &mut wires);
    assert_eq!(wires.take(), []);
    assert_eq!(engine.drops.get(Reason::FragmentWithoutFirst), 2);
    // A sliver that comes later gets nothing of what was its predecessor's.
    engine.nic_frame(Time::from_secs(40), &mut inbound(&first), &mut wires);
    wires.take();
    engine.detach(sliver(2));
    engine.attach(sliver(3), "site_3".into(), mac(3), ports(2)).unwrap();
    engine.nic_frame(Time::from_secs(41), &mut inbound(&later), &mut wires);
    assert_eq!(wires.take(), []);
}

#[test]
fn the_fragment_table_is_bounded() {
    let (mut engine, mut wires) = node();
    for n in 0..3 * FRAGMENTED_INGRESS as u32 {
        let first = ip(Ipv4Addr::from(n), NODE, UDP, 0x2000, &l4(53, 20_250)[..16]);
        engine.nic_frame(Time::ZERO, &mut inbound(&first), &mut wires);
    }
    wires.take();
    engine.nic_frame(Time::ZERO, &mut inbound(&ip(Ipv4Addr::from(5), NODE, UDP, 0x2, &[1; 40])), &mut wires);
    assert_eq!(wires.take(), []);
    let last = ip(Ipv4Addr::from(3 * FRAGMENTED_INGRESS as u32 - 1), NODE, UDP, 0x2, &[1; 40]);
    engine.nic_frame(Time::ZERO, &mut inbound(&last), &mut wires);
    assert_eq!(wires.take(), to_sliver(2, &last));
}

#[test]
fn slivers_send_from_their_own_ports() {
    for packet in [
        ip(NODE, FAR, TCP, 0, &l4(20_100, 443)),
        ip(NODE, FAR, TCP, 0, &l4(8001, 443)),
        ip(NODE, FAR, UDP, 0, &l4(20_199, 53)),
        ip(NODE, FAR, ICMP, 0, &icmp(8, 20_500, &[])),
        ip(NODE, FAR, ICMP, 0, &icmp(3, 3, &ip(FAR, NODE, UDP, 0, &l4(53, 20_100)[..8]))),
    ] {
        assert_eq!(sends(outbound(1, &packet)), to_router(&packet));
    }
}

#[test]
fn frames_slivers_may_not_send() {
    let tcp = ip(NODE, FAR, TCP, 0, &l4(20_100, 443));
    sends_dropped(vec![0; 13], Reason::Malformed);
    sends_dropped(outbound(1, &tcp[..30]), Reason::Malformed);
    sends_dropped(outbound(2, &tcp), Reason::ForeignMac);
    sends_dropped(ethernet(GATEWAY_MAC, mac(1), 0x86dd, &[0x60; 40]), Reason::Ipv6);
    sends_dropped(ethernet(GATEWAY_MAC, mac(1), 0x88cc, &[0; 40]), Reason::EtherType);
    sends_dropped(outbound(1, &[tcp.clone(), vec![0; 1500]].concat()), Reason::Oversize);
    sends_dropped(outbound(1, &ip(FAR, FAR, TCP, 0, &l4(20_100, 443))), Reason::ForeignSource);
    sends_dropped(outbound(1, &ip(NODE, FAR, TCP, 0, &l4(20_200, 443))), Reason::PortNotOwned);
    sends_dropped(outbound(1, &ip(NODE, FAR, TCP, 0, &l4(22, 443))), Reason::PortNotOwned);
    sends_dropped(outbound(1, &ip(NODE, FAR, UDP, 0, &l4(8001, 53))), Reason::PortNotOwned);
    sends_dropped(outbound(1, &ip(NODE, FAR, 47, 0, &[0; 30])), Reason::Protocol);
    sends_dropped(outbound(1, &ip(NODE, FAR, ICMP, 0, &icmp(0, 1, &[]))), Reason::IcmpType);
    sends_dropped(outbound(1, &ip(NODE, FAR, ICMP, 0, &icmp(5, 1, &[0; 28]))), Reason::IcmpType);
    sends_dropped(outbound(1, &ip(NODE, FAR, UDP, 8, &[0; 40])), Reason::FragmentWithoutFirst);
    for about in [
        ip(FAR, NODE, UDP, 0, &l4(53, 20_200)[..8]),
        ip(ROUTER_IP, NODE, UDP, 0, &l4(53, 20_100)[..8]),
        ip(NODE, FAR, UDP, 0, &l4(20_100, 53)[..8]),
        ip(FAR, NODE, ICMP, 0, &icmp(8, 1, &[])),
    ] {
        sends_dropped(outbound(1, &ip(NODE, FAR, ICMP, 0, &icmp(3, 0, &about))), Reason::IcmpErrorNotOwned);
    }
    let nowhere = [
        "0.0.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.2.255",
        "192.0.2.0",
    ];
    for destination in nowhere {
        let packet = ip(NODE, destination.parse().unwrap(), UDP, 0, &l4(20_100, 53));
        sends_dropped(outbound(1, &packet), Reason::Destination);
    }
}

#[test]
fn source_routes_are_refused() {
    let with_options = |options: [u8; 4]| {
        let mut packet = ip(NODE, FAR, UDP, 0, &[&options[..], &l4(20_100, 53)].concat());
        packet[0] = 0x46;
        outbound(1, &packet)
    };
    sends_dropped(with_options([131, 3, 4, 0]), Reason::SourceRoute);
    sends_dropped(with_options([1, 137, 3, 4]), Reason::SourceRoute);
    sends_dropped(with_options([7, 1, 0, 0]), Reason::SourceRoute);
    sends_dropped(with_options([7, 9, 0, 0]), Reason::SourceRoute);
    assert_eq!(sends(with_options([148, 4, 0, 0])).len(), 1);
    assert_eq!(sends(with_options([0, 131, 0, 0])).len(), 1);
}

#[test]
fn a_slivers_fragments_follow_its_own_first() {
    let (mut engine, mut wires) = node();
    let first = ip(NODE, FAR, UDP, 0x2000, &l4(20_100, 53)[..16]);
    let later = ip(NODE, FAR, UDP, 0x2, &[1; 40]);
    engine.sliver_frame(Time::ZERO, sliver(1), &mut outbound(1, &first), &mut wires);
    engine.sliver_frame(Time::ZERO, sliver(1), &mut outbound(1, &later), &mut wires);
    assert_eq!(wires.take(), [to_router(&first), to_router(&later)].concat());
    engine.sliver_frame(Time::ZERO, sliver(2), &mut outbound(2, &later), &mut wires);
    assert_eq!(wires.take(), []);
    // To another sliver, too: where the first went.
    let first = ip(NODE, NODE, UDP, 0x2000, &l4(20_100, 20_200)[..16]);
    let later = ip(NODE, NODE, UDP, 0x2, &[1; 40]);
    engine.sliver_frame(Time::ZERO, sliver(1), &mut outbound(1, &first), &mut wires);
    engine.sliver_frame(Time::ZERO, sliver(1), &mut outbound(1, &later), &mut wires);
    assert_eq!(wires.take(), [to_sliver(2, &first), to_sliver(2, &later)].concat());
}

#[test]
fn slivers_reach_each_other_and_the_host_by_the_shared_address() {
    let packet = ip(NODE, NODE, TCP, 0, &l4(20_100, 20_250));
    assert_eq!(sends(outbound(1, &packet)), to_sliver(2, &packet));
    let packet = ip(NODE, NODE, TCP, 0, &l4(20_100, 22));
    assert_eq!(sends(outbound(1, &packet)), [Sent::Host(ethernet(NIC, GATEWAY_MAC, 0x0800, &packet))]);
    let (mut engine, mut wires) = node();
    let answer = ip(NODE, NODE, TCP, 0, &l4(22, 20_100));
    engine.host_frame(Time::ZERO, &mut ethernet(GATEWAY_MAC, NIC, 0x0800, &answer), &mut wires);
    assert_eq!(wires.take(), to_sliver(1, &answer));
}

#[test]
fn an_echo_identifier_belongs_to_who_used_it_first() {
    let (mut engine, mut wires) = node();
    let ping = ip(NODE, FAR, ICMP, 0, &icmp(8, 9, &[]));
    let pong = ip(FAR, NODE, ICMP, 0, &icmp(0, 9, &[]));
    engine.sliver_frame(Time::ZERO, sliver(2), &mut outbound(2, &ping), &mut wires);
    assert_eq!(wires.take(), to_router(&ping));
    engine.nic_frame(Time::ZERO, &mut inbound(&pong), &mut wires);
    assert_eq!(wires.take(), to_sliver(2, &pong));
    engine.sliver_frame(Time::ZERO, sliver(1), &mut outbound(1, &ping), &mut wires);
    assert_eq!(wires.take(), []);
    assert_eq!(engine.list(SliverId(0))[0].drops["icmp-id-taken"], 1);
    for id in 100..100 + owners::IDS_PER_SLIVER as u16 + 1 {
        let mut frame = outbound(1, &ip(NODE, FAR, ICMP, 0, &icmp(8, id, &[])));
        engine.sliver_frame(Time::ZERO, sliver(1), &mut frame, &mut wires);
    }
    assert_eq!(engine.list(SliverId(0))[0].drops["icmp-ids-exhausted"], 1);
    // The host may not use a sliver's.
    wires.take();
    engine.host_frame(Time::ZERO, &mut ethernet(ROUTER, NIC, 0x0800, &ping), &mut wires);
    assert_eq!(wires.take(), []);
    assert_eq!(engine.drops.get(Reason::HostPortOwned), 1);
    engine.detach(sliver(2));
    engine.host_frame(Time::ZERO, &mut ethernet(ROUTER, NIC, 0x0800, &ping), &mut wires);
    assert_eq!(wires.take().len(), 1);
}

#[test]
fn slivers_find_their_gateway_and_nobody_else_by_arp() {
    let question = arp(mac(1), (mac(1), NODE), GATEWAY);
    let answer = arp_frame(ArpOperation::Reply, (GATEWAY_MAC, GATEWAY), (mac(1), NODE), mac(1));
    assert_eq!(sends(question), [Sent::Sliver(sliver(1), answer.to_vec())]);
    sends_dropped(arp(mac(1), (mac(1), NODE), ROUTER_IP), Reason::ArpNotGateway);
    sends_dropped(ethernet(ALL, mac(1), 0x0806, &[0; 28]), Reason::Malformed);
    sends_dropped(
        arp_frame(ArpOperation::Reply, (mac(1), GATEWAY), (NIC, GATEWAY), NIC).to_vec(),
        Reason::ArpNotGateway,
    );
}

#[test]
fn next_hops_are_asked_for_and_frames_wait() {
    let (mut engine, mut wires) = node();
    let near: Ipv4Addr = "192.0.2.77".parse().unwrap();
    let near_mac = [2, 7, 7, 7, 7, 7];
    let packet = ip(NODE, near, UDP, 0, &l4(20_100, 53));
    let question = Sent::Nic(arp_frame(ArpOperation::Request, (NIC, NODE), ([0; 6], near), ALL).to_vec());
    engine.sliver_frame(Time::ZERO, sliver(1), &mut outbound(1, &packet), &mut wires);
    assert_eq!(wires.take(), std::slice::from_ref(&question));
    let next = engine.deadline().unwrap();
    engine.tick(next, &mut wires);
    assert_eq!(wires.take(), [question]);
    // The answer comes with the host's copy; what waited goes out.
    let answer = arp_frame(ArpOperation::Reply, (near_mac, near), (NIC, NODE), NIC).to_vec();
    engine.nic_frame(next, &mut answer.clone(), &mut wires);
    assert_eq!(wires.take(), [Sent::Nic(ethernet(near_mac, NIC, 0x0800, &packet)), Sent::Host(answer)]);
    assert_eq!(engine.list(SliverId(0))[0].tx_frames, 1);
    // Nobody answers for this one.
    let silent = ip(NODE, "192.0.2.78".parse().unwrap(), UDP, 0, &l4(20_100, 53));
    engine.sliver_frame(next, sliver(1), &mut outbound(1, &silent), &mut wires);
    for second in 1..=4 {
        engine.tick(next + Time::from_secs(second), &mut wires);
    }
    assert_eq!(engine.list(SliverId(0))[0].drops["neighbour-unreachable"], 1);
    // A full queue.
    for _ in 0..=neighbours::QUEUE {
        engine.sliver_frame(next, sliver(1), &mut outbound(1, &silent), &mut wires);
    }
    assert_eq!(engine.list(SliverId(0))[0].drops["neighbour-queue-full"], 1);
}

#[test]
fn without_a_gateway_there_is_no_way_out_of_the_prefix() {
    let (mut engine, mut wires) = node();
    engine.set_place(Place { address: NODE, prefix_len: 24, gateway: None });
    engine.sliver_frame(
        Time::ZERO,
        sliver(1),
        &mut outbound(1, &ip(NODE, FAR, UDP, 0, &l4(20_100, 53))),
        &mut wires,
    );
    assert_eq!(wires.take(), []);
    assert_eq!(engine.list(SliverId(0))[0].drops["no-route"], 1);
}

#[test]
fn before_the_address_is_known_only_the_host_speaks() {
    let (mut engine, mut wires) = (Engine::new(NIC), Wires::default());
    engine.attach(sliver(1), "site_1".into(), mac(1), ports(1)).unwrap();
    let offer = inbound(&ip(ROUTER_IP, NODE, UDP, 0, &l4(67, 20_100)));
    engine.nic_frame(Time::ZERO, &mut offer.clone(), &mut wires);
    let discover =
        ethernet(ALL, NIC, 0x0800, &ip(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, UDP, 0, &l4(68, 67)));
    engine.host_frame(Time::ZERO, &mut discover.clone(), &mut wires);
    assert_eq!(wires.take(), [Sent::Host(offer), Sent::Nic(discover)]);
    engine.sliver_frame(
        Time::ZERO,
        sliver(1),
        &mut outbound(1, &ip(NODE, FAR, TCP, 0, &l4(20_100, 443))),
        &mut wires,
    );
    assert_eq!(wires.take(), []);
    assert_eq!(engine.list(SliverId(0))[0].drops["no-address"], 1);
}

#[test]
fn the_host_speaks_for_itself_only() {
    let (mut engine, mut wires) = node();
    let own = ethernet(ROUTER, NIC, 0x0800, &ip(NODE, FAR, TCP, 0, &l4(61_000, 443)));
    engine.host_frame(Time::ZERO, &mut own.clone(), &mut wires);
    assert_eq!(wires.take(), [Sent::Nic(own)]);
    let refusal = |port| ip(NODE, FAR, ICMP, 0, &icmp(3, 3, &ip(FAR, NODE, UDP, 0, &l4(53, port)[..8])));
    let own = ethernet(ROUTER, NIC, 0x0800, &refusal(61_000));
    engine.host_frame(Time::ZERO, &mut own.clone(), &mut wires);
    assert_eq!(wires.take(), [Sent::Nic(own)]);
    let foreign =
        [ip(NODE, FAR, TCP, 0, &l4(20_100, 443)), ip(NODE, FAR, UDP, 0, &l4(20_250, 53)), refusal(20_100)];
    for packet in foreign {
        engine.host_frame(Time::ZERO, &mut ethernet(ROUTER, NIC, 0x0800, &packet), &mut wires);
    }
    engine.host_frame(
        Time::ZERO,
        &mut ethernet(NIC, NIC, 0x0800, &ip(NODE, NODE, TCP, 0, &l4(61_000, 22))),
        &mut wires,
    );
    assert_eq!(wires.take(), []);
    assert_eq!(engine.drops.get(Reason::HostPortOwned), 3);
    assert_eq!(engine.drops.get(Reason::Destination), 1);
}

#[test]
fn attaching_replaces_refuses_and_lists() {
    let (mut engine, mut wires) = node();
    assert_eq!(engine.attach(SliverId(0), "x".into(), mac(0), ports(9)), Err(AttachError::IsHost));
    for bad in [ALL, NIC, GATEWAY_MAC] {
        assert_eq!(engine.attach(sliver(9), "x".into(), bad, ports(9)), Err(AttachError::Mac));
    }
    let error = engine.attach(sliver(3), "x".into(), mac(3), ports(2)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "TCP port 20200 belongs to sliver 100002: detach it first or grant another port"
    );
    engine.attach(sliver(2), "site_2".into(), mac(2), ports(5)).unwrap();
    engine.attach(sliver(3), "site_3".into(), mac(3), ports(2)).unwrap();
    let packet = ip(FAR, NODE, TCP, 0, &l4(443, 20_250));
    engine.nic_frame(Time::ZERO, &mut inbound(&packet), &mut wires);
    assert_eq!(wires.take(), to_sliver(3, &packet));
    let list = engine.list(sliver(1));
    assert_eq!(
        list.iter().map(|s| (s.sliver, s.rx_frames)).collect::<Vec<_>>(),
        [(sliver(2), 0), (sliver(3), 1)]
    );
    assert_eq!(list[1].rx_bytes, 14 + 40);
}

#[test]
fn partial_checksums_are_completed() {
    use smoltcp::wire::{IpAddress, UdpPacket};
    let mut payload = l4(53, 20_150);
    payload[4..6].copy_from_slice(&20u16.to_be_bytes());
    payload[6..8].copy_from_slice(&0xbeefu16.to_be_bytes());
    let mut frame = inbound(&ip(FAR, NODE, UDP, 0, &payload));
    packet::complete_checksum(&mut frame);
    let datagram = UdpPacket::new_checked(&frame[34..]).unwrap();
    assert!(datagram.verify_checksum(&IpAddress::Ipv4(FAR), &IpAddress::Ipv4(NODE)));
    packet::complete_checksum(&mut [0; 20]);
}
