//! The block device against well-formed, malformed and hostile requests, many at a time, resets, pauses and its rate limit.

use super::*;
use crate::virtio::Interrupt;
use crate::virtio::testing::{BUFFERS, Driver, Hostile, MEMORY, NEXT, WRITE, hostile};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

const SECTORS: u64 = 16;
const HEADER_AT: u64 = BUFFERS;
const DATA_AT: u64 = BUFFERS + 0x1000;
const STATUS_AT: u64 = BUFFERS + 0x8000;
const UNTOUCHED: u8 = 0xaa;

struct Rig {
    driver: Driver,
    blk: Blk,
    image: File,
}

impl Rig {
    fn new() -> Self {
        Self::limited(None)
    }

    fn limited(rate: Option<RateLimit>) -> Self {
        let file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..SECTORS * SECTOR).map(|at| (at / SECTOR) as u8 + 1).collect();
        file.write_all_at(&content, 0).unwrap();
        let image = file.try_clone().unwrap();
        let driver = Driver::new(&[QUEUE_SIZE]);
        let mut blk = Blk::new(file, rate).unwrap();
        let (active, _) = driver.activate();
        blk.activate(active).unwrap();
        Self { driver, blk, image }
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.write(HEADER_AT, &header);
        self.driver.write(STATUS_AT, &[UNTOUCHED]);
    }

    /// Sends one request in the usual framing; returns (status, used length).
    fn request(&mut self, kind: u32, sector: u64, data: Option<(u32, bool)>) -> (u8, u32) {
        self.header(kind, sector);
        let mut parts = vec![(HEADER_AT, 16, false)];
        parts.extend(data.map(|(len, write)| (DATA_AT, len, write)));
        parts.push((STATUS_AT, 1, true));
        self.driver.chain(0, &parts);
        self.serve();
        let (_, written) = *self.driver.used(0).last().unwrap();
        (self.driver.read(STATUS_AT, 1)[0], written)
    }

    /// Lets the device serve until it answered everything that was offered.
    fn serve(&mut self) {
        self.blk.queue_event(0).unwrap();
        self.wait(|rig| rig.driver.used(0).len() as u64 >= rig.driver.offered(0));
    }

    /// Serves the event loop until `done`.
    fn wait(&mut self, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            let events: Vec<_> = self.driver.reactor.wait().unwrap().collect();
            for event in events {
                self.blk.event(event.token, event.readiness).unwrap();
            }
        }
    }

    /// Offers `count` requests of one sector each, headers, data and statuses apart. Returns where the data of each is.
    fn offer_many(&mut self, count: u64, kind: impl Fn(u64) -> (u32, u64)) -> Vec<u64> {
        let data = (0..count).map(|index| {
            let at = BUFFERS + 0x1_0000 + index * 1024;
            let (kind, sector) = kind(index);
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..].copy_from_slice(&sector.to_le_bytes());
            self.driver.write(at + 512, &header);
            self.driver.write(at + 600, &[UNTOUCHED]);
            let data = (at, 512, kind == VIRTIO_BLK_T_IN);
            self.driver.chain(0, &[(at + 512, 16, false), data, (at + 600, 1, true)]);
            at
        });
        data.collect()
    }

    fn image(&self) -> Vec<u8> {
        let mut content = vec![0; (SECTORS * SECTOR) as usize];
        self.image.read_exact_at(&mut content, 0).unwrap();
        content
    }
}

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

#[test]
fn reads_and_writes_sectors() {
    let mut rig = Rig::new();
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 3, Some((1024, true))), (OK, 1025));
    let data = rig.driver.read(DATA_AT, 1024);
    assert!(data[..512].iter().all(|byte| *byte == 4) && data[512..].iter().all(|byte| *byte == 5));
    rig.driver.write(DATA_AT, &[0x77; 512]);
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 15, Some((512, false))), (OK, 1));
    assert!(rig.image()[15 * 512..].iter().all(|byte| *byte == 0x77));
    assert!(rig.image()[14 * 512..15 * 512].iter().all(|byte| *byte == 15));
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, None), (OK, 1));
    assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, Some((20, true))), (OK, 21));
    assert_eq!(rig.driver.read(DATA_AT, 20), ID);
}

#[test]
fn what_is_beyond_the_end_or_no_whole_sector_is_refused() {
    let mut rig = Rig::new();
    let before = rig.image();
    for (sector, len) in
        [(16, 512), (15, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511), (1 << 55, 512)]
    {
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, sector, Some((len, true))), (IOERR, 1));
        assert_eq!(rig.request(VIRTIO_BLK_T_OUT, sector, Some((len, false))), (IOERR, 1));
    }
    assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, Some((19, true))), (IOERR, 1));
    assert_eq!(rig.request(4711, 0, None), (UNSUPP, 1));
    assert_eq!(rig.image(), before);
    assert_eq!(rig.image.metadata().unwrap().len(), SECTORS * SECTOR);
}

#[test]
fn erasing_zeroes_exactly_the_range() {
    let mut rig = Rig::new();
    let mut erase = |kind, sector: u64, count: u32, flags: u32| {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&count.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        rig.driver.write(DATA_AT, &range);
        (rig.request(kind, 0, Some((16, false))).0, rig.image())
    };
    let (status, image) = erase(VIRTIO_BLK_T_DISCARD, 2, 2, 0);
    assert_eq!(status, OK);
    for (sector, content) in image.chunks(512).enumerate() {
        let expected = if (2..4).contains(&sector) { 0 } else { sector as u8 + 1 };
        assert!(content.iter().all(|byte| *byte == expected), "sector {sector}");
    }
    assert_eq!(erase(VIRTIO_BLK_T_WRITE_ZEROES, 8, 8, 1).0, OK);
    assert_eq!(erase(VIRTIO_BLK_T_WRITE_ZEROES, 8, 9, 1).0, IOERR);
    assert_eq!(erase(VIRTIO_BLK_T_DISCARD, u64::MAX, u32::MAX, 0).0, IOERR);
    assert_eq!(erase(VIRTIO_BLK_T_DISCARD, 0, 1, 1).0, UNSUPP);
    assert_eq!(erase(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 2).0, UNSUPP);
}

#[test]
fn framing_does_not_matter() {
    let mut rig = Rig::new();
    rig.header(VIRTIO_BLK_T_IN, 1);
    // The header in three pieces; data and status in one buffer.
    let parts =
        [(HEADER_AT, 1, false), (HEADER_AT + 1, 8, false), (HEADER_AT + 9, 7, false), (DATA_AT, 513, true)];
    rig.driver.chain(0, &parts);
    rig.serve();
    assert_eq!(rig.driver.used(0), [(0, 513)]);
    let data = rig.driver.read(DATA_AT, 513);
    assert!(data[..512].iter().all(|byte| *byte == 2));
    assert_eq!(data[512], OK);
}

#[test]
fn malformed_chains_are_returned_unanswered() {
    let mut rig = Rig::new();
    rig.header(VIRTIO_BLK_T_IN, 0);
    // No writable byte at all; readable after writable.
    rig.driver.chain(0, &[(HEADER_AT, 16, false)]);
    rig.driver.chain(0, &[(STATUS_AT, 1, true), (HEADER_AT, 16, false)]);
    rig.serve();
    assert_eq!(rig.driver.used(0), [(0, 0), (1, 0)]);
    assert_eq!(rig.driver.read(STATUS_AT, 1), [UNTOUCHED]);
}

#[test]
fn a_loop_of_descriptors_ends() {
    let mut rig = Rig::new();
    rig.driver.descriptor(0, 0, HEADER_AT, 16, NEXT, 1);
    rig.driver.descriptor(0, 1, DATA_AT, 512, NEXT | WRITE, 1);
    rig.driver.offer(0, 0);
    rig.serve();
    assert_eq!(rig.driver.used(0).len(), 1);
}

#[test]
fn buffers_outside_memory_are_refused() {
    let mut rig = Rig::new();
    for at in [MEMORY, MEMORY - 511, u64::MAX - 100] {
        rig.header(VIRTIO_BLK_T_IN, 0);
        rig.driver.chain(0, &[(HEADER_AT, 16, false), (at, 512, true), (STATUS_AT, 1, true)]);
        rig.serve();
        assert_eq!(rig.driver.read(STATUS_AT, 1), [IOERR]);
    }
}

#[test]
fn an_impossible_available_index_stops_the_device() {
    let mut rig = Rig::new();
    let hostile = Hostile { descriptors: vec![], heads: vec![], available: QUEUE_SIZE + 1, bytes: vec![] };
    hostile.apply(&rig.driver, 0);
    assert!(matches!(rig.blk.queue_event(0), Err(DeviceError::Queue { queue: 0, .. })));
}

/// As many requests as fit into the queue: each takes three descriptors.
const MANY: u64 = QUEUE_SIZE as u64 / 3;

#[test]
fn many_requests_at_a_time_are_each_answered_once() {
    let mut rig = Rig::new();
    let data = rig.offer_many(MANY, |index| (VIRTIO_BLK_T_IN, index % SECTORS));
    rig.serve();
    let heads: BTreeSet<u32> = rig.driver.used(0).into_iter().map(|(head, _)| head).collect();
    assert_eq!(heads.len() as u64, MANY);
    for (index, at) in data.iter().enumerate() {
        assert_eq!(rig.driver.read(at + 600, 1), [OK]);
        let sector = index as u8 % SECTORS as u8;
        assert!(rig.driver.read(*at, 512).iter().all(|byte| *byte == sector + 1));
    }
    let metrics = rig.blk.metrics();
    assert_eq!((metrics.requests, metrics.read_bytes), (MANY, MANY * 512));
    assert_eq!(rig.blk.disk.bytes, 0);
}

#[test]
fn it_asks_for_the_next_notification() {
    let mut rig = Rig::new();
    rig.blk.active().unwrap().queues[0].set_event_idx(true);
    for turn in 1..5 {
        rig.request(VIRTIO_BLK_T_IN, 0, Some((512, true)));
        assert_eq!(rig.driver.notify_at(0), turn);
    }
}

#[test]
fn rings_that_overlap_do_not_hold_the_event_loop() {
    let mut rig = Rig::new();
    let active = rig.blk.active().unwrap();
    let queue = &mut active.queues[0];
    // The used ring's flags are the available ring's index: it is 1 while notifications are off, and 0 while they are on.
    queue.try_set_avail_ring_address(GuestAddress(0xffe)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(0x1000)).unwrap();
    queue.set_next_avail(1);
    assert!(queue.is_valid(&active.memory));
    rig.blk.queue_event(0).unwrap();
    let (mut active, _) = rig.driver.activate();
    std::mem::swap(&mut active.queues, &mut rig.blk.active().unwrap().queues);
    active.drain(0, |_, _| panic!("nothing was offered")).unwrap();
    // The rest is left to a next round.
    assert_eq!(active.kicks[0].read().unwrap(), 1);
}

#[test]
fn nothing_touches_memory_after_a_reset() {
    for _ in 0..20 {
        let mut rig = Rig::new();
        let data = rig.offer_many(MANY, |index| match index % 3 {
            0 => (VIRTIO_BLK_T_IN, index % SECTORS),
            1 => (VIRTIO_BLK_T_OUT, index % SECTORS),
            _ => (VIRTIO_BLK_T_FLUSH, 0),
        });
        rig.blk.queue_event(0).unwrap();
        rig.blk.reset();
        for at in &data {
            rig.driver.write(*at, &[0x5a; 1024]);
        }
        rig.driver.forget(0);
        let (active, _) = rig.driver.activate();
        rig.blk.activate(active).unwrap();
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, Some((512, true))).0, OK);
        for at in &data {
            assert!(rig.driver.read(*at, 1024).iter().all(|byte| *byte == 0x5a));
        }
        assert_eq!(rig.driver.used(0).len(), 1);
    }
}

#[test]
fn a_device_that_is_gone_waits_for_what_it_began() {
    let mut rig = Rig::new();
    rig.offer_many(MANY, |index| (VIRTIO_BLK_T_IN, index % SECTORS));
    rig.blk.queue_event(0).unwrap();
    let Rig { blk, driver, .. } = rig;
    drop(blk);
    drop(driver);
}

#[test]
fn a_pause_ends_what_was_begun() {
    let mut rig = Rig::new();
    rig.offer_many(MANY, |index| {
        (if index % 2 == 0 { VIRTIO_BLK_T_FLUSH } else { VIRTIO_BLK_T_OUT }, index % SECTORS)
    });
    rig.blk.queue_event(0).unwrap();
    rig.blk.quiesce().unwrap();
    assert_eq!(rig.driver.used(0).len() as u64, MANY);
    // And it goes on afterwards.
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 3, Some((512, true))), (OK, 513));
}

#[test]
fn the_rate_limit_holds_back_and_lets_go() {
    // 10 KiB a second: a bucket of 10 KiB, which 21 requests empty; the next one waits for the debt of 512 bytes.
    let mut rig = Rig::limited(Some(RateLimit { bytes_per_second: 10_240, requests_per_second: 0 }));
    let begun = Instant::now();
    rig.offer_many(23, |index| (VIRTIO_BLK_T_IN, index % SECTORS));
    rig.blk.queue_event(0).unwrap();
    rig.blk.quiesce().unwrap();
    let served = rig.driver.used(0).len();
    assert!((20..23).contains(&served), "{served} of 23 were served at once");
    assert_eq!(rig.blk.metrics().held_back, 1);
    // What is held back is still in the queue.
    let queue = rig.blk.active().unwrap().queues.first().unwrap();
    assert_eq!(usize::from(queue.next_avail()), served);
    rig.wait(|rig| rig.driver.used(0).len() == 23);
    // All but the last were paid for, beyond the 20 that the bucket held.
    assert!(begun.elapsed().as_millis() >= 2 * 512 * 1000 / 10_240);
    assert!(rig.blk.metrics().held_back >= 2);
}

#[test]
fn a_reset_while_held_back_forgets_the_requests() {
    let mut rig = Rig::limited(Some(RateLimit { bytes_per_second: 0, requests_per_second: 1 }));
    rig.offer_many(5, |index| (VIRTIO_BLK_T_IN, index));
    rig.blk.queue_event(0).unwrap();
    rig.blk.reset();
    rig.blk.reset();
    // One that the bucket holds, and one more that leaves a debt.
    assert!(rig.driver.used(0).len() <= 2);
}

#[test]
fn a_flush_with_nothing_to_do_is_answered_at_once() {
    let mut rig = Rig::new();
    // The first one cannot know what an earlier machine did not flush.
    rig.offer_many(1, |_| (VIRTIO_BLK_T_FLUSH, 0));
    rig.blk.queue_event(0).unwrap();
    rig.blk.quiesce().unwrap();
    let durable = |rig: &Rig| format!("{:?}", rig.blk.disk.durability);
    let after_flush = durable(&rig);
    rig.offer_many(1, |_| (VIRTIO_BLK_T_FLUSH, 0));
    rig.blk.queue_event(0).unwrap();
    assert_eq!((rig.blk.disk.ring.under_way(), rig.driver.used(0).len()), (0, 2));
    rig.request(VIRTIO_BLK_T_OUT, 0, Some((512, false)));
    assert_ne!(durable(&rig), after_flush);
    rig.request(VIRTIO_BLK_T_FLUSH, 0, None);
    assert_eq!(durable(&rig), after_flush);
}

#[test]
fn a_disk_of_another_size_is_told() {
    let mut rig = Rig::new();
    let told = |blk: &mut Blk| blk.active().unwrap().interrupt.status() & Interrupt::CONFIG_CHANGE != 0;
    let state = rig.blk.save();
    rig.blk.restore(&state).unwrap();
    assert!(!told(&mut rig.blk));
    rig.blk.restore(&(SECTORS - 1).to_le_bytes()).unwrap();
    assert!(told(&mut rig.blk));
    let mut capacity = [0; 8];
    rig.blk.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
}

#[test]
fn more_than_announced_is_refused() {
    let mut rig = Rig::new();
    rig.image.set_len(1 << 30).unwrap();
    let mut blk = Blk::new(rig.image.try_clone().unwrap(), None).unwrap();
    blk.activate(rig.driver.activate().0).unwrap();
    rig.blk = blk;
    rig.header(VIRTIO_BLK_T_IN, 0);
    // The same 1 MiB over and over, 63 MiB in all.
    let mut parts = vec![(HEADER_AT, 16, false)];
    parts.extend(std::iter::repeat_n((0x8_0000, 0x8_0000, true), 126));
    parts.push((STATUS_AT, 1, true));
    rig.driver.chain(0, &parts);
    rig.serve();
    assert_eq!(rig.driver.read(STATUS_AT, 1), [IOERR]);
}

#[test]
fn a_status_within_the_data_is_written_last() {
    let mut rig = Rig::new();
    rig.header(VIRTIO_BLK_T_IN, 1);
    rig.driver.chain(
        0,
        &[(HEADER_AT, 16, false), (DATA_AT, 512, true), (DATA_AT, 512, true), (DATA_AT + 7, 1, true)],
    );
    rig.serve();
    let data = rig.driver.read(DATA_AT, 512);
    assert_eq!((data[6], data[7], data[8]), (3, OK, 3));
}

proptest! {
    #[test]
    fn a_hostile_driver_harms_only_its_own_disk(hostile in hostile()) {
        let mut rig = Rig::new();
        hostile.apply(&rig.driver, 0);
        let _ = rig.blk.queue_event(0);
        let _ = rig.blk.quiesce();
        let _ = rig.blk.queue_event(0);
        rig.blk.reset();
        prop_assert_eq!(rig.image.metadata().unwrap().len(), SECTORS * SECTOR);
    }
}
