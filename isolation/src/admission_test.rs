//! Admission against a naive model that looks at every minute, and examples of what people are told.

use std::collections::BTreeSet;

use commonage_isolation_api::{Limits, Link, Ports, Protocol};
use proptest::prelude::*;

use super::*;

const CAPACITY: Capacity = Capacity {
    memory_mib: 256,
    disk_mib: 300,
    link_bps: 1000,
    pids: 100,
    ports: PortRange { first: 20_000, last: 20_079 },
};

fn minute(n: i64) -> Timestamp {
    Timestamp::from_second(1_000_000_000 + n * 60).unwrap()
}

fn modest(start: i64, end: i64) -> Rspec {
    let mut rspec = Rspec::modest(Interval { start: minute(start), end: minute(end) });
    (rspec.memory_mib, rspec.disk_mib, rspec.limits.pids, rspec.ports.block) = (64, 64, 16, 16);
    rspec
}

fn commitments(granted: &[Admitted<Rspec>]) -> Vec<Commitment<'_>> {
    granted.iter().map(|a| Commitment { holder: "slice x_y", rspec: a.rspec(), ports: a.ports() }).collect()
}

#[test]
fn a_refusal_says_what_is_short_and_when() {
    let mut first = modest(10, 20);
    first.memory_mib = 200;
    let first = admit(&CAPACITY, &[], first, minute(0)).unwrap();
    let refused = admit(&CAPACITY, &commitments(&[first]), modest(0, 60), minute(0)).unwrap_err();
    let wanted = Refused::Short {
        resource: Resource::Memory,
        asked: 64,
        free: 56,
        at: minute(10),
        frees_at: Some(minute(20)),
    };
    assert_eq!(refused, wanted);
    assert_eq!(
        refused.to_string(),
        "rspec.memory_mib: 64 MiB asked, 56 free at 2001-09-09T01:56:40Z, when least is; ask for at most 56, or for a later \
         interval: some is given back at 2001-09-09T02:06:40Z"
    );
}

#[test]
fn ports_say_who_has_them_and_how_long() {
    let mut first = modest(0, 20);
    first.ports.tcp = BTreeSet::from([5000]);
    let first = admit(&CAPACITY, &[], first, minute(0)).unwrap();
    let mut second = modest(10, 30);
    second.ports.tcp = BTreeSet::from([5000]);
    let refused =
        admit(&CAPACITY, &commitments(std::slice::from_ref(&first)), second.clone(), minute(0)).unwrap_err();
    assert!(
        refused.to_string().contains("port 5000/tcp is taken by slice x_y until 2001-09-09T02:06:40Z"),
        "{refused}"
    );
    second.ports = Ports { block: 16, tcp: BTreeSet::new(), udp: BTreeSet::from([5000]) };
    admit(&CAPACITY, &commitments(std::slice::from_ref(&first)), second.clone(), minute(0)).unwrap();
    second.ports.udp = BTreeSet::from([20_080]);
    let refused = admit(&CAPACITY, &[], second, minute(0)).unwrap_err();
    assert!(refused.to_string().contains("20080/udp is out of range"), "{refused}");
}

#[test]
fn what_is_over_is_refused_and_an_end_frees_its_own_moment() {
    assert_eq!(
        admit(&CAPACITY, &[], modest(0, 10), minute(10)).unwrap_err(),
        Refused::Past { end: minute(10), now: minute(10) }
    );
    let mut all = modest(0, 10);
    all.memory_mib = 256;
    let before = admit(&CAPACITY, &[], all.clone(), minute(0)).unwrap();
    all.interval = Interval { start: minute(10), end: minute(20) };
    admit(&CAPACITY, &commitments(&[before]), all, minute(0)).unwrap();
}

#[test]
fn a_renewal_keeps_its_ports_or_says_who_has_them() {
    let mine = admit(&CAPACITY, &[], modest(0, 10), minute(0)).unwrap();
    let next = admit(&CAPACITY, &[], modest(10, 20), minute(0)).unwrap();
    assert_eq!(mine.ports(), next.ports());
    let (mut rspec, ports) = mine.into_parts();
    rspec.interval.end = minute(15);
    let refused =
        readmit(&CAPACITY, &commitments(&[next]), rspec.clone(), ports.clone(), minute(5)).unwrap_err();
    assert!(refused.to_string().contains("port 20000/tcp is taken by slice x_y"), "{refused}");
    readmit(&CAPACITY, &[], rspec, ports, minute(5)).unwrap();
}

fn any_rspec() -> impl Strategy<Value = Rspec> {
    let exact = || prop::collection::btree_set(prop_oneof![5000u16..5004, 20_000u16..20_080], 0..2);
    let amounts = (32u32..140, 16u32..140, 0u64..600, 8u32..50);
    ((0i64..40, 1i64..30), amounts, (16u16..40, exact(), exact())).prop_map(
        |((start, len), (memory_mib, disk_mib, guaranteed_bps, pids), (block, tcp, udp))| Rspec {
            memory_mib,
            disk_mib,
            link: Link { guaranteed_bps, cap_bps: 1000 },
            limits: Limits { pids },
            ports: Ports { block, tcp, udp },
            ..modest(start, start + len)
        },
    )
}

/// The model: what stands at minute `t`.
fn at(granted: &[Admitted<Rspec>], t: i64) -> impl Iterator<Item = &Admitted<Rspec>> {
    granted.iter().filter(move |a| a.rspec().interval.contains(minute(t)))
}

fn minutes(i: Interval) -> impl Iterator<Item = i64> {
    (0..80).filter(move |t| i.contains(minute(*t)))
}

fn model_free(granted: &[Admitted<Rspec>], interval: Interval, r: Resource) -> u64 {
    let used = |t| at(granted, t).map(|a| r.of(a.rspec())).sum::<u64>();
    minutes(interval).map(|t| r.capacity(&CAPACITY) - used(t)).min().unwrap()
}

fn model_owned(granted: &[Admitted<Rspec>], interval: Interval, protocol: Protocol, port: u16) -> bool {
    minutes(interval).any(|t| at(granted, t).any(|a| a.ports().owns(protocol, port)))
}

proptest! {
    #[test]
    fn admission_agrees_with_looking_at_every_minute(asked in prop::collection::vec(any_rspec(), 1..24)) {
        let mut granted: Vec<Admitted<Rspec>> = Vec::new();
        for rspec in asked {
            let interval = rspec.interval;
            let short = Resource::ALL.into_iter().find(|r| r.of(&rspec) > model_free(&granted, interval, *r));
            let taken = |protocol, port| model_owned(&granted, interval, protocol, port);
            let exact_taken = rspec.ports.tcp.iter().any(|p| taken(Protocol::Tcp, *p))
                || rspec.ports.udp.iter().any(|p| taken(Protocol::Udp, *p));
            let usable = |port: u16| {
                Protocol::ALL.iter().all(|p| !taken(*p, port)) && !rspec.ports.tcp.contains(&port) && !rspec.ports.udp.contains(&port)
            };
            let block = rspec.ports.block;
            let has_block = (20_000..=20_080 - block).any(|first| (first..first + block).all(usable));
            let free_now = free(&CAPACITY, &commitments(&granted), interval);
            prop_assert_eq!(free_now.memory_mib, model_free(&granted, interval, Resource::Memory));
            match admit(&CAPACITY, &commitments(&granted), rspec.clone(), minute(0)) {
                Ok(a) => {
                    prop_assert!(short.is_none() && !exact_taken && has_block);
                    prop_assert_eq!(a.ports().last - a.ports().first + 1, block);
                    prop_assert!((a.ports().first..=a.ports().last).all(usable));
                    prop_assert!(a.ports().first >= 20_000 && a.ports().last <= 20_079);
                    granted.push(a);
                }
                Err(Refused::Short { resource, free, at: when, .. }) => {
                    prop_assert_eq!(Some(resource), short);
                    prop_assert_eq!(free, model_free(&granted, interval, resource));
                    prop_assert!(interval.contains(when));
                }
                Err(Refused::Ports(PortError::Taken { .. })) => prop_assert!(short.is_none() && exact_taken),
                Err(Refused::Ports(PortError::NoBlock { .. })) => prop_assert!(short.is_none() && !exact_taken && !has_block),
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }

    #[test]
    fn what_was_granted_is_readmitted_beside_the_others(asked in prop::collection::vec(any_rspec(), 1..24)) {
        let mut granted: Vec<Admitted<Rspec>> = Vec::new();
        for rspec in asked {
            if let Ok(a) = admit(&CAPACITY, &commitments(&granted), rspec, minute(0)) {
                granted.push(a);
            }
        }
        for i in 0..granted.len() {
            let mut others = granted.clone();
            let (rspec, ports) = others.remove(i).into_parts();
            prop_assert!(readmit(&CAPACITY, &commitments(&others), rspec, ports, minute(0)).is_ok());
        }
    }
}
