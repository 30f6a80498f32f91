//! The DHCP machine against a scripted server, and against anything at all.

use proptest::prelude::*;

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn sent(outputs: &[Output]) -> (Ipv4Addr, Message) {
    match outputs {
        [Output::Send { to, bytes }] => {
            assert!(bytes.len() >= 300);
            (*to, Message::decode(bytes).unwrap())
        }
        other => panic!("{other:?}"),
    }
}

fn reply(to: &Message, kind: u8, lease_s: u32) -> Message {
    let options = [
        (option::MESSAGE_TYPE, vec![kind]),
        (option::SERVER_IDENTIFIER, SERVER.octets().into()),
        (option::SUBNET_MASK, vec![255, 255, 255, 0]),
        (option::ROUTER, SERVER.octets().into()),
        (option::DOMAIN_NAME_SERVER, vec![10, 0, 2, 3]),
        (option::LEASE_TIME, lease_s.to_be_bytes().into()),
    ];
    let (transaction, mac) = (to.transaction, to.mac);
    Message {
        reply: true,
        transaction,
        yours: Some(ADDRESS),
        mac,
        options: options.into(),
        ..Message::default()
    }
}

fn bytes(message: &Message) -> Vec<u8> {
    message.encode()
}

/// Up to the lease at time 0 for 1,000 s.
fn bound() -> (Machine, Message) {
    let mut machine = Machine::new(MAC, 7, at(0));
    let (to, discover) = sent(&machine.on_time(at(0)));
    assert_eq!(to, Ipv4Addr::BROADCAST);
    assert!(discover.broadcast && discover.kind() == kind::DISCOVER);
    let offer = reply(&discover, kind::OFFER, 1_000);
    let (to, request) = sent(&machine.on_datagram(at(0), &bytes(&offer)));
    assert_eq!(to, Ipv4Addr::BROADCAST);
    assert!(request.kind() == kind::REQUEST);
    assert_eq!(request.address(option::REQUESTED_ADDRESS), Some(ADDRESS));
    let ack = reply(&request, kind::ACK, 1_000);
    let outputs = machine.on_datagram(at(1), &bytes(&ack));
    let [Output::Bound(lease)] = &outputs[..] else { panic!("{outputs:?}") };
    assert_eq!((lease.address, lease.prefix_len, lease.gateway), (ADDRESS, 24, Some(SERVER)));
    assert_eq!((lease.duration, lease.renew, lease.rebind), (at(1_000), at(500), at(875)));
    assert_eq!(lease.dns, [Ipv4Addr::new(10, 0, 2, 3)]);
    // The lease counts from the request, not from its answer.
    assert_eq!(machine.deadline(), at(500));
    (machine, request)
}

#[test]
fn discovers_with_doubling_pauses() {
    let mut machine = Machine::new(MAC, 99, at(0));
    let mut now = at(0);
    let mut transactions = Vec::new();
    for expected in [4, 8, 16, 32, 64, 64] {
        let (_, discover) = sent(&machine.on_time(now));
        transactions.push(discover.transaction);
        assert!(machine.on_time(now).is_empty());
        let pause = machine.deadline() - now;
        assert!(pause >= at(expected - 1) && pause <= at(expected + 1), "{pause:?}");
        now = machine.deadline();
    }
    assert!(transactions.iter().all(|t| *t == transactions[0] && *t != 0));
}

#[test]
fn gives_an_offer_up_after_four_requests() {
    let mut machine = Machine::new(MAC, 3, at(0));
    let (_, discover) = sent(&machine.on_time(at(0)));
    let offer = reply(&discover, kind::OFFER, 1_000);
    sent(&machine.on_datagram(at(0), &bytes(&offer)));
    for _ in 0..3 {
        let (_, again) = sent(&machine.on_time(machine.deadline()));
        assert!(again.kind() == kind::REQUEST);
    }
    assert!(machine.on_time(machine.deadline()).is_empty());
    let (_, again) = sent(&machine.on_time(machine.deadline()));
    assert!(again.kind() == kind::DISCOVER);
    assert_ne!(again.transaction, discover.transaction);
}

#[test]
fn renews_silently_then_from_anyone_then_loses() {
    let (mut machine, first) = bound();
    let (to, renewal) = sent(&machine.on_time(at(500)));
    assert_eq!((to, renewal.client), (SERVER, Some(ADDRESS)));
    assert_ne!(renewal.transaction, first.transaction);
    assert!(renewal.address(option::REQUESTED_ADDRESS).is_none());
    let mut renewed = machine.clone();
    let ack = reply(&renewal, kind::ACK, 1_000);
    assert_eq!(renewed.on_datagram(at(501), &bytes(&ack)), []);
    assert_eq!(renewed.deadline(), at(1_000));

    // Half of what is left: 375 / 2 s.
    assert_eq!(machine.deadline(), Duration::from_millis(687_500));
    let mut now = at(500);
    while now < at(875) {
        now = machine.deadline();
        sent(&machine.on_time(now));
    }
    assert_eq!(now, at(875));
    assert!(matches!(machine.state, State::Rebinding { .. }));
    loop {
        now = machine.deadline();
        let outputs = machine.on_time(now);
        if outputs == [Output::Lost] {
            break;
        }
        assert_eq!(sent(&outputs).0, Ipv4Addr::BROADCAST);
    }
    assert_eq!(now, at(1_000));
    assert!(machine.lease().is_none());
}

#[test]
fn a_changed_gateway_is_told_and_a_refusal_loses_the_lease() {
    let (mut machine, _) = bound();
    let (_, renewal) = sent(&machine.on_time(at(500)));
    let mut ack = reply(&renewal, kind::ACK, 1_000);
    ack.options.insert(option::ROUTER, vec![10, 0, 2, 9]);
    let mut changed = machine.clone();
    assert!(matches!(&changed.on_datagram(at(501), &bytes(&ack))[..], [Output::Bound(_)]));
    let nak = reply(&renewal, kind::NAK, 1_000);
    assert_eq!(machine.on_datagram(at(501), &bytes(&nak)), [Output::Lost]);
}

#[test]
fn ignores_what_is_not_for_it() {
    let mut machine = Machine::new(MAC, 7, at(0));
    let (_, discover) = sent(&machine.on_time(at(0)));
    let offer = reply(&discover, kind::OFFER, 1_000);
    let mut others = vec![];
    let mut change = |f: &dyn Fn(&mut Message)| {
        let mut message = offer.clone();
        f(&mut message);
        others.push(bytes(&message));
    };
    change(&|m| m.transaction ^= 1);
    change(&|m| m.mac = [2, 0, 0, 9, 9, 9]);
    change(&|m| m.reply = false);
    change(&|m| m.yours = Some(Ipv4Addr::LOCALHOST));
    change(&|m| m.yours = Some(Ipv4Addr::BROADCAST));
    change(&|m| drop(m.options.remove(&option::SERVER_IDENTIFIER)));
    change(&|m| drop(m.options.remove(&option::LEASE_TIME)));
    change(&|m| drop(m.options.insert(option::SUBNET_MASK, vec![255, 0, 255, 0])));
    change(&|m| drop(m.options.insert(option::SUBNET_MASK, vec![0; 4])));
    change(&|m| drop(m.options.insert(option::MESSAGE_TYPE, vec![kind::ACK])));
    // A length of the hardware address that is longer than its field.
    let mut long = bytes(&offer);
    long[2] = 200;
    others.push(long);
    for other in others {
        assert_eq!(machine.on_datagram(at(0), &other), []);
    }
    sent(&machine.on_datagram(at(0), &bytes(&offer)));
}

#[test]
fn infinite_and_silly_times_are_bounded() {
    for (lease_s, expected) in [(u32::MAX, LONGEST_LEASE), (0, LEAST_LEASE)] {
        let mut machine = Machine::new(MAC, 7, at(0));
        let (_, discover) = sent(&machine.on_time(at(0)));
        let mut offer = reply(&discover, kind::OFFER, lease_s);
        offer.options.insert(option::RENEWAL_TIME, vec![255; 4]);
        offer.options.insert(option::REBINDING_TIME, vec![0; 4]);
        let lease = lease(&offer).unwrap();
        assert_eq!(lease.duration, expected);
        assert!(lease.renew <= lease.rebind && lease.rebind < lease.duration);
        sent(&machine.on_datagram(at(0), &bytes(&offer)));
    }
}

/// Options as they are on the wire: any code with any contents.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let option = (any::<u8>(), proptest::collection::vec(any::<u8>(), 0..40), -2_i16..3);
    let option = option.prop_map(|(code, data, lie)| {
        let length = (data.len() as i16 + lie).clamp(0, 255) as u8;
        [vec![code, length], data].concat()
    });
    proptest::collection::vec(option, 0..12).prop_map(|options| options.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn survives_anything(random in proptest::collection::vec(any::<u8>(), 0..600), options in options(), hlen: u8) {
        let mut machine = Machine::new(MAC, 7, at(0));
        let (_, discover) = sent(&machine.on_time(at(0)));
        machine.on_datagram(at(1), &random);
        let mut offer = bytes(&reply(&discover, kind::OFFER, 1_000));
        offer.truncate(240);
        offer[2] = hlen;
        offer.extend(&options);
        machine.on_datagram(at(1), &offer);
        offer[2] = 6;
        machine.on_datagram(at(1), &offer);
    }

    /// Time only moves forward: the next deadline is never before now, so the loop never spins.
    #[test]
    fn never_spins(steps in proptest::collection::vec((0_u64..2_000, any::<bool>()), 1..40)) {
        let (mut machine, _) = bound();
        let mut now = at(1);
        for (seconds, answer) in steps {
            now = now.max(machine.deadline()).min(now + at(seconds));
            for output in machine.on_time(now) {
                if let (Output::Send { bytes: request, .. }, true) = (output, answer) {
                    let request = Message::decode(&request).unwrap();
                    let kind = match request.kind() {
                        kind::DISCOVER => kind::OFFER,
                        _ => kind::ACK,
                    };
                    machine.on_datagram(now, &bytes(&reply(&request, kind, 300)));
                }
            }
            prop_assert!(machine.deadline() > now);
        }
    }
}
