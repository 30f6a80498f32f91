//! The book's verbs: who may, what is promised, what always holds.

use commonage_isolation::PortRange;
use commonage_isolation_api::Limits;
use proptest::prelude::*;

use super::*;

const NOW: i64 = 1_800_000_000;

fn at(s: i64) -> Timestamp {
    Timestamp::from_second(NOW + s).unwrap()
}

fn slice(name: &str) -> SliceName {
    name.parse().unwrap()
}

fn rspec(start: i64, end: i64) -> Rspec {
    let mut rspec = Rspec::modest(Interval { start: at(start), end: at(end) });
    (rspec.memory_mib, rspec.disk_mib, rspec.limits, rspec.ports.block) = (32, 16, Limits { pids: 8 }, 16);
    rspec
}

fn config() -> SliverConfig {
    SliverConfig { base: "mini".into(), ..SliverConfig::default() }
}

/// A book with the agent in it.
fn book() -> Book {
    let ports = PortRange { first: 20_000, last: 20_511 };
    let mut book = Book::new(Capacity { memory_mib: 256, disk_mib: 1000, link_bps: 1000, pids: 1000, ports });
    let mut agent = rspec(-1000, 1_000_000);
    agent.privileges = BTreeSet::from([Privilege::Acquire, Privilege::Sensors]);
    let (changes, ()) = book.keep_agent(agent, config(), Rcap::random().unwrap(), at(0)).unwrap();
    book.apply(changes);
    book
}

fn acquire(book: &mut Book, rspec: Rspec) -> Acquired {
    let (changes, acquired) = book.acquire(&slice(AGENT), rspec, Rcap::random().unwrap(), at(0)).unwrap();
    book.apply(changes);
    acquired
}

fn bind(book: &mut Book, name: &str, rcap: &Rcap) -> SliverRecord {
    let (changes, record) = book.bind(&slice(AGENT), slice(name), rcap, config(), at(0)).unwrap();
    book.apply(changes);
    record
}

#[test]
fn privileges_come_from_the_bound_rspec_and_cannot_be_raised() {
    let mut book = book();
    let mut broker = rspec(0, 100);
    broker.privileges = BTreeSet::from([Privilege::Acquire]);
    let right = acquire(&mut book, broker);
    bind(&mut book, "princeton_broker", &right.rcap);
    let mut more = rspec(0, 100);
    more.privileges = BTreeSet::from([Privilege::Sensors]);
    let rcap = Rcap::random().unwrap();
    let refused = book.acquire(&slice("princeton_broker"), more, rcap.clone(), at(0)).unwrap_err();
    assert!(refused.code == Code::Forbidden && refused.message.contains("sensors"), "{refused}");
    book.acquire(&slice("princeton_broker"), rspec(0, 100), rcap.clone(), at(0)).unwrap();
    let refused = book.acquire(&slice("princeton_codeen"), rspec(0, 100), rcap, at(0)).unwrap_err();
    assert_eq!(refused.code, Code::Forbidden);
}

#[test]
fn uids_are_never_used_again() {
    let mut book = book();
    let mut seen = BTreeSet::from([FIRST_UID]);
    for _ in 0..5 {
        let right = acquire(&mut book, rspec(0, 100));
        let uid = bind(&mut book, "a_b", &right.rcap).uid;
        assert!(seen.insert(uid));
        // What was decided about an earlier sliver of the slice does not touch this one.
        for stale in [book.forget(&slice("a_b"), uid - 1), book.condemn(&slice("a_b"), uid - 1)] {
            assert_eq!(stale, []);
        }
        let changes = book.forget(&slice("a_b"), uid);
        book.apply(changes);
        assert_eq!(book.get(&right.rcap).unwrap_err().code, Code::NotFound);
    }
}

#[test]
fn rights_lapse_only_unbound() {
    let mut book = book();
    let (short, bound, long) = (rspec(0, 10), rspec(0, 10), rspec(0, 20));
    let (short, bound, long) =
        (acquire(&mut book, short), acquire(&mut book, bound), acquire(&mut book, long));
    bind(&mut book, "a_b", &bound.rcap);
    assert_eq!(book.lapsed(at(9)), (vec![], Some(at(10))));
    assert_eq!(book.lapsed(at(10)), (vec![Change::RemoveGrant(short.rcap)], Some(at(20))));
    assert_eq!(book.lapsed(at(20)).0.len(), 2);
    assert!(book.lapsed(at(20)).0.contains(&Change::RemoveGrant(long.rcap)));
}

#[test]
fn the_agent_is_kept_as_it_is() {
    let mut book = book();
    let before = book.bound(&slice(AGENT)).map(|(_, g)| g.clone()).unwrap();
    let mut later = rspec(-1000, 2_000_000);
    later.privileges = before.rspec.privileges.clone();
    let (changes, ()) = book.keep_agent(later, config(), Rcap::random().unwrap(), at(0)).unwrap();
    book.apply(changes);
    let (record, after) = book.bound(&slice(AGENT)).unwrap();
    assert_eq!((&after.rcap, &after.ports, record.uid), (&before.rcap, &before.ports, FIRST_UID));
    assert_eq!(after.rspec.interval.end, at(2_000_000));
    assert_eq!(book.delete(&slice(AGENT), &slice(AGENT)).unwrap_err().code, Code::Forbidden);
    assert_eq!(
        book.renew(&slice(AGENT), &before.rcap, at(50), None, at(0)).unwrap_err().code,
        Code::Forbidden
    );
}

#[test]
fn a_node_that_shrank_starts_its_oldest_slivers() {
    let mut book = book();
    let rights: Vec<Acquired> = (0..4).map(|_| acquire(&mut book, rspec(0, 100))).collect();
    book.capacity.memory_mib = 32 * 3;
    let fits = |a: &Acquired| book.admitted(book.get(&a.rcap).unwrap(), at(1)).is_ok();
    assert_eq!(rights.iter().map(fits).collect::<Vec<_>>(), [true, true, false, false]);
}

#[derive(Debug, Clone)]
enum Verb {
    Acquire { start: i64, len: i64, memory: u32 },
    Bind { right: usize, name: u8 },
    Renew { right: usize, end: i64 },
    Release { right: usize },
    Forget { name: u8 },
}

fn any_verb() -> impl Strategy<Value = Verb> {
    prop_oneof![
        (0i64..50, 1i64..50, 32u32..120).prop_map(|(start, len, memory)| Verb::Acquire {
            start,
            len,
            memory
        }),
        (0usize..20, 0u8..4).prop_map(|(right, name)| Verb::Bind { right, name }),
        (0usize..20, 1i64..120).prop_map(|(right, end)| Verb::Renew { right, end }),
        (0usize..20).prop_map(|right| Verb::Release { right }),
        (0u8..4).prop_map(|name| Verb::Forget { name }),
    ]
}

proptest! {
    #[test]
    fn whatever_is_done_the_node_is_never_promised_twice(verbs in prop::collection::vec(any_verb(), 1..60)) {
        let mut book = book();
        let mut rights: Vec<Rcap> = Vec::new();
        let agent = slice(AGENT);
        for verb in verbs {
            let right = |i: usize| rights.get(i).cloned().unwrap_or_else(|| Rcap::random().unwrap());
            let name = |n: u8| slice(&format!("a_s{n}"));
            let decided = match verb {
                Verb::Acquire { start, len, memory } => {
                    let mut wanted = rspec(start, start + len);
                    wanted.memory_mib = memory;
                    let rcap = Rcap::random().unwrap();
                    let decided = book.acquire(&agent, wanted, rcap.clone(), at(0));
                    if decided.is_ok() { rights.push(rcap); }
                    decided.map(|d| d.0)
                }
                Verb::Bind { right: i, name: n } => book.bind(&agent, name(n), &right(i), config(), at(0)).map(|d| d.0),
                Verb::Renew { right: i, end } => book.renew(&agent, &right(i), at(end), None, at(0)).map(|d| d.0),
                Verb::Release { right: i } => book.release(&right(i)).map(|d| d.0),
                Verb::Forget { name: n } => {
                    let uid = book.sliver(&name(n)).map_or(0, |record| record.uid);
                    Ok(book.forget(&name(n), uid))
                }
            };
            book.apply(decided.unwrap_or_default());
            for t in 0..130 {
                let live: Vec<&Grant> = book.grants.values().filter(|g| g.rspec.interval.contains(at(t))).collect();
                prop_assert!(live.iter().map(|g| g.rspec.memory_mib).sum::<u32>() <= 256);
                let mut blocks: Vec<(u16, u16)> = live.iter().map(|g| (g.ports.first, g.ports.last)).collect();
                blocks.sort_unstable();
                prop_assert!(blocks.windows(2).all(|w| w[0].1 < w[1].0));
            }
            for sliver in book.slivers.values() {
                let grant = book.grants.get(&sliver.rcap);
                prop_assert_eq!(grant.and_then(|g| g.bound_to.as_ref()), Some(&sliver.slice));
            }
            let bound = book.grants.values().filter(|g| g.bound_to.is_some()).count();
            prop_assert_eq!(bound, book.slivers.len());
        }
    }
}

#[test]
fn a_sliver_that_stopped_stays_so_until_it_is_configured() {
    let mut book = book();
    let right = acquire(&mut book, rspec(0, 100));
    let uid = bind(&mut book, "a_b", &right.rcap).uid;
    let name = slice("a_b");
    let changes = book.stop(&name, uid, "the guest halted".into());
    book.apply(changes);
    assert_eq!(book.sliver(&name).unwrap().stopped.as_deref(), Some("the guest halted"));
    let (changes, record) = book.configure(&slice(AGENT), &name, config()).unwrap();
    book.apply(changes);
    assert_eq!((record.stopped, &book.sliver(&name).unwrap().stopped), (None, &None));
}
