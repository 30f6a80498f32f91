//! The block device against well-formed, malformed and hostile requests.

use super::*;
use crate::virtio::testing::{BUFFERS, Driver, Hostile, MEMORY, NEXT, WRITE, hostile};
use proptest::prelude::*;
use std::os::unix::fs::FileExt;

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
        let file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..SECTORS * SECTOR).map(|at| (at / SECTOR) as u8 + 1).collect();
        file.write_all_at(&content, 0).unwrap();
        let image = file.try_clone().unwrap();
        let driver = Driver::new(&[QUEUE_SIZE]);
        let mut blk = Blk::new(file).unwrap();
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
        self.blk.queue_event(0).unwrap();
        let (_, written) = *self.driver.used(0).last().unwrap();
        (self.driver.read(STATUS_AT, 1)[0], written)
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
    rig.blk.queue_event(0).unwrap();
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
    rig.blk.queue_event(0).unwrap();
    assert_eq!(rig.driver.used(0), [(0, 0), (1, 0)]);
    assert_eq!(rig.driver.read(STATUS_AT, 1), [UNTOUCHED]);
}

#[test]
fn a_loop_of_descriptors_ends() {
    let mut rig = Rig::new();
    rig.driver.descriptor(0, 0, HEADER_AT, 16, NEXT, 1);
    rig.driver.descriptor(0, 1, DATA_AT, 512, NEXT | WRITE, 1);
    rig.driver.offer(0, 0);
    rig.blk.queue_event(0).unwrap();
    assert_eq!(rig.driver.used(0).len(), 1);
}

#[test]
fn buffers_outside_memory_are_refused() {
    let mut rig = Rig::new();
    for at in [MEMORY, MEMORY - 511, u64::MAX - 100] {
        rig.header(VIRTIO_BLK_T_IN, 0);
        rig.driver.chain(0, &[(HEADER_AT, 16, false), (at, 512, true), (STATUS_AT, 1, true)]);
        rig.blk.queue_event(0).unwrap();
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

proptest! {
    #[test]
    fn a_hostile_driver_harms_only_its_own_disk(hostile in hostile()) {
        let mut rig = Rig::new();
        hostile.apply(&rig.driver, 0);
        let _ = rig.blk.queue_event(0);
        prop_assert_eq!(rig.image.metadata().unwrap().len(), SECTORS * SECTOR);
    }
}
