//! The balloon: pages really go back, statistics are kept until wanted, hostile drivers reach nothing but their own memory.

use super::*;
use crate::virtio::Interrupt;
use crate::virtio::testing::{BUFFERS, Driver, MEMORY, hostile};
use proptest::prelude::*;
use virtio_queue::QueueT;

const ALL: u64 = 1 << 32 | 1 << STATS_VQ | 1 << DEFLATE_ON_OOM | 1 << PAGE_REPORTING;
/// Pages that the tests give away: 0x80 to 0xff.
const FIRST: u64 = 0x80;

struct Rig {
    driver: Driver,
    balloon: Balloon,
    interrupt: Interrupt,
}

impl Rig {
    fn new(features: u64) -> Self {
        let driver = Driver::new(&QUEUE_SIZES);
        let mut balloon = Balloon::new(64);
        let (mut active, interrupt) = driver.activate();
        active.features = features;
        balloon.activate(active).unwrap();
        driver.write(FIRST * PAGE, &[7; 0x80 * PAGE as usize]);
        Self { driver, balloon, interrupt }
    }

    /// Whether page `number` still holds what was in it; none if it is neither whole nor empty.
    fn holds(&self, number: u64) -> Option<bool> {
        let bytes = self.driver.read(number * PAGE, PAGE as usize);
        match (bytes.iter().all(|byte| *byte == 7), bytes.iter().all(|byte| *byte == 0)) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        }
    }

    fn send(&mut self, queue: usize, bytes: &[u8]) {
        self.driver.write(BUFFERS, bytes);
        self.driver.chain(queue, &[(BUFFERS, bytes.len() as u32, false)]);
        self.balloon.queue_event(queue).unwrap();
    }
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

fn statistics(entries: &[(u16, u64)]) -> Vec<u8> {
    entries.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect()
}

#[test]
fn inflating_gives_exactly_the_named_pages_back() {
    let mut rig = Rig::new(ALL);
    let first = FIRST as u32;
    rig.send(0, &numbers(&[first + 3, first + 2, first + 9, first + 2]));
    let gone: Vec<u64> = (FIRST..FIRST + 0x80).filter(|page| rig.holds(*page) == Some(false)).collect();
    assert_eq!(gone, [FIRST + 2, FIRST + 3, FIRST + 9]);
    assert!((FIRST..FIRST + 0x80).all(|page| rig.holds(page).is_some()));
    assert_eq!(rig.driver.used(0).len(), 1);
    rig.send(1, &numbers(&[first + 2]));
    assert_eq!(rig.driver.used(1).len(), 1);
}

#[test]
fn pages_outside_memory_harm_nobody() {
    let mut rig = Rig::new(ALL);
    rig.send(0, &numbers(&[u32::MAX, u32::MAX - 1, (MEMORY / PAGE) as u32, (MEMORY / PAGE) as u32 + 1]));
    // A torn number is none.
    rig.send(0, &[1, 2, 3]);
    assert_eq!(rig.driver.used(0).len(), 2);
    assert!((FIRST..FIRST + 0x80).all(|page| rig.holds(page) == Some(true)));
}

#[test]
fn reported_ranges_go_back_and_are_counted() {
    let mut rig = Rig::new(ALL);
    let range = |page: u64, pages: u64| (page * PAGE, (pages * PAGE) as u32, true);
    rig.driver.chain(3, &[range(FIRST, 16), range(FIRST + 32, 16), (MEMORY - PAGE, 2 * PAGE as u32, true)]);
    rig.balloon.queue_event(3).unwrap();
    let gone = (FIRST..FIRST + 0x80).filter(|page| rig.holds(*page) == Some(false)).count();
    assert_eq!((gone, rig.balloon.metrics().2), (32, 32 * 4));
    assert_eq!(rig.driver.used(3), [(0, 0)]);
}

#[test]
fn queues_move_up_where_a_feature_is_missing() {
    let has = |features: u64| move |bit: u32| features >> bit & 1 == 1;
    let roles = |features: u64| [2, 3].map(|queue| role(queue, has(features)));
    assert_eq!(roles(ALL), [Some(Role::Statistics), Some(Role::Reporting)]);
    assert_eq!(roles(1 << PAGE_REPORTING), [Some(Role::Reporting), None]);
    assert_eq!(roles(1 << STATS_VQ), [Some(Role::Statistics), None]);
    let mut rig = Rig::new(1 << 32 | 1 << PAGE_REPORTING);
    rig.driver.chain(2, &[(FIRST * PAGE, PAGE as u32, true)]);
    rig.balloon.queue_event(2).unwrap();
    assert_eq!(rig.holds(FIRST), Some(false));
}

#[test]
fn statistics_are_kept_until_somebody_asks() {
    let mut rig = Rig::new(ALL);
    assert_eq!(rig.balloon.metrics(), (0, None, 0));
    rig.send(2, &statistics(&[(0, 1), (MEMORY_FREE, 5 << 20), (5, 9 << 20)]));
    assert!(rig.driver.used(2).is_empty());
    assert_eq!(rig.interrupt.status(), 0);
    assert_eq!(rig.balloon.metrics().1, Some(5 << 10));
    assert_eq!(rig.driver.used(2).len(), 1);
    assert_eq!(rig.interrupt.status(), Interrupt::USED_RING);
    // Asked again before the guest answered: nothing to give back.
    assert_eq!(rig.balloon.metrics().1, Some(5 << 10));
    assert_eq!(rig.driver.used(2).len(), 1);
    rig.send(2, &statistics(&[(MEMORY_FREE, 6 << 20)]));
    assert_eq!(rig.balloon.metrics().1, Some(6 << 10));
}

#[test]
fn every_queue_asks_for_the_next_notification() {
    let mut rig = Rig::new(ALL);
    for queue in &mut rig.balloon.active().unwrap().queues {
        queue.set_event_idx(true);
    }
    for turn in 1..4 {
        for queue in 0..4 {
            rig.send(queue, &[0; 40]);
            assert_eq!(rig.driver.notify_at(queue), turn, "queue {queue}");
        }
        rig.balloon.metrics();
    }
}

#[test]
fn a_driver_with_many_statistics_buffers_gets_them_back() {
    let mut rig = Rig::new(ALL);
    for _ in 0..10 {
        rig.send(2, &statistics(&[(MEMORY_FREE, 1 << 20)]));
    }
    assert_eq!(rig.driver.used(2).len(), 9);
}

#[test]
fn a_new_target_is_told_once() {
    let mut rig = Rig::new(ALL);
    let target = |rig: &Rig| {
        let mut word = [0; 4];
        rig.balloon.read_config(0, &mut word);
        u32::from_le_bytes(word)
    };
    rig.balloon.leave(48);
    assert_eq!((target(&rig), rig.interrupt.status()), (16 * 256, Interrupt::CONFIG_CHANGE));
    rig.interrupt.acknowledge(u32::MAX);
    rig.balloon.leave(48);
    assert_eq!(rig.interrupt.status(), 0);
    rig.balloon.leave(64);
    assert_eq!(target(&rig), 0);
    rig.balloon.leave(u32::MAX);
    assert_eq!(target(&rig), 0);
    rig.balloon.leave(0);
    assert_eq!(target(&rig), 64 * 256);
}

#[test]
fn the_guest_tells_how_much_is_in_it_and_nothing_else() {
    let mut rig = Rig::new(ALL);
    rig.balloon.write_config(4, &1000u32.to_le_bytes());
    for offset in [0, 1, 3, 5, 8, u64::MAX] {
        rig.balloon.write_config(offset, &[0xff; 4]);
    }
    rig.balloon.write_config(4, &[0xff; 8]);
    assert_eq!(rig.balloon.metrics().0, 1000 / 256);
    assert_eq!(rig.balloon.target, 0);
}

#[test]
fn it_survives_a_snapshot_with_its_statistics_buffer() {
    let mut rig = Rig::new(ALL);
    rig.balloon.leave(40);
    rig.balloon.write_config(4, &4000u32.to_le_bytes());
    rig.send(2, &statistics(&[(MEMORY_FREE, 1 << 20)]));
    let state = rig.balloon.save();
    let queues = std::mem::take(&mut rig.balloon.active().unwrap().queues);
    let mut copy = Balloon::new(64);
    let (mut active, _) = rig.driver.activate();
    (active.features, active.queues) = (ALL, queues);
    copy.activate(active).unwrap();
    copy.restore(&state).unwrap();
    assert_eq!((copy.target, copy.actual), (24 * 256, 4000));
    copy.metrics();
    assert_eq!(rig.driver.used(2).len(), 1);
}

#[test]
fn a_snapshot_that_lies_is_an_error_at_worst() {
    for state in
        [vec![], vec![1; 11], vec![0xff; 12], vec![1; 13], [&[1u8; 8][..], &[1, 0, 0xff, 0xff]].concat()]
    {
        let mut rig = Rig::new(ALL);
        rig.balloon.restore(&state).unwrap();
        rig.balloon.metrics();
        rig.send(2, &[]);
    }
}

proptest! {
    #[test]
    fn runs_are_the_pages_each_once(pages in prop::collection::vec(prop_oneof![0u32..50, u32::MAX - 3..=u32::MAX], 0..60)) {
        let runs = runs(pages.clone());
        let mut expected: Vec<u64> = pages.into_iter().map(u64::from).collect();
        expected.sort_unstable();
        expected.dedup();
        let found: Vec<u64> =
            runs.iter().flat_map(|(start, count)| (0..u64::from(*count)).map(|at| u64::from(*start) + at)).collect();
        prop_assert_eq!(found, expected);
        prop_assert!(runs.windows(2).all(|pair| u64::from(pair[0].0) + u64::from(pair[0].1) < u64::from(pair[1].0)));
    }

    #[test]
    fn a_hostile_driver_loses_its_own_pages_at_most(hostile in hostile(), queue in 0usize..4) {
        let mut rig = Rig::new(ALL);
        hostile.apply(&rig.driver, queue);
        let _ = rig.balloon.queue_event(queue);
        let _ = rig.balloon.queue_event(queue);
        rig.balloon.metrics();
        rig.balloon.reset();
        prop_assert!(rig.balloon.active().is_none());
    }

    #[test]
    fn any_configuration_access_is_harmless(offset in any::<u64>(), bytes in prop::collection::vec(any::<u8>(), 0..9)) {
        let mut rig = Rig::new(ALL);
        rig.balloon.write_config(offset, &bytes);
        let mut read = bytes.clone();
        rig.balloon.read_config(offset, &mut read);
        prop_assert_eq!(rig.balloon.target, 0);
    }
}
