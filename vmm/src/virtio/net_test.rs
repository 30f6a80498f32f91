//! The network device against net-demux's end of a real ring.

use super::*;
use crate::virtio::testing::{BUFFERS, Driver, hostile};
use commonage_net_demux_api::ring::Ring;
use proptest::prelude::*;

struct Rig {
    driver: Driver,
    net: Net,
    demux: Endpoint,
}

impl Rig {
    fn new() -> Self {
        let (ours, fds) = Ring::create().unwrap();
        let demux = Endpoint::open(fds).unwrap();
        let driver = Driver::new(&QUEUE_SIZES);
        let mut net = Net::new([2, 0, 0, 1, 2, 3], ours);
        let (active, _) = driver.activate();
        net.activate(active).unwrap();
        Self { driver, net, demux }
    }

    /// Lets the device see every event that is pending.
    fn settle(&mut self) {
        self.net.event(RING_TOKEN, Readiness::READ).unwrap();
    }
}

#[test]
fn frames_go_out_without_their_header() {
    let mut rig = Rig::new();
    rig.driver.write(BUFFERS + 12, b"a frame of some length");
    rig.driver.chain(TX, &[(BUFFERS, 34, false)]);
    rig.driver.chain(TX, &[(BUFFERS, 5, false), (BUFFERS + 5, 7, false), (BUFFERS + 12, 7, false)]);
    rig.net.queue_event(TX).unwrap();
    let mut frame = [0; MAX_FRAME];
    assert_eq!(rig.demux.recv(&mut frame), Some(22));
    assert_eq!(&frame[..22], b"a frame of some length");
    assert_eq!(rig.demux.recv(&mut frame), Some(7));
    assert_eq!(rig.demux.recv(&mut frame), None);
    assert_eq!(rig.driver.used(TX).len(), 2);
}

#[test]
fn frames_come_in_behind_a_header_and_wait_for_buffers() {
    let mut rig = Rig::new();
    rig.demux.send(b"first").unwrap();
    rig.demux.send(b"second").unwrap();
    rig.settle();
    rig.driver.chain(RX, &[(BUFFERS, 1526, true)]);
    rig.net.queue_event(RX).unwrap();
    assert_eq!(rig.driver.used(RX), [(0, 17)]);
    assert_eq!(rig.driver.read(BUFFERS, 17), b"\0\0\0\0\0\0\0\0\0\0\x01\0first");
    rig.driver.chain(RX, &[(BUFFERS, 12, true), (BUFFERS + 12, 100, true)]);
    rig.net.queue_event(RX).unwrap();
    assert_eq!(rig.driver.used(RX)[1], (1, 18));
    assert_eq!(rig.driver.read(BUFFERS + 12, 6), b"second");
}

#[test]
fn a_full_ring_stops_the_guest_and_no_frame_is_lost() {
    let mut rig = Rig::new();
    let mut received = 0;
    let mut frame = [0; MAX_FRAME];
    for sent in 0u32..100 {
        rig.driver.write(BUFFERS + 0x1000 * u64::from(sent) + 12, &sent.to_le_bytes());
        rig.driver.chain(TX, &[(BUFFERS + 0x1000 * u64::from(sent), 1526, false)]);
    }
    rig.net.queue_event(TX).unwrap();
    let taken = rig.driver.used(TX).len();
    assert!(taken < 100, "the ring cannot hold them all");
    while received < 100 {
        let before = received;
        while rig.demux.recv(&mut frame).is_some() {
            assert_eq!(u32::from_le_bytes([frame[0], frame[1], frame[2], frame[3]]), received);
            received += 1;
        }
        assert!(received > before, "stuck after {received}");
        rig.settle();
    }
}

#[test]
fn frames_too_long_or_without_header_are_dropped() {
    let mut rig = Rig::new();
    rig.driver.chain(TX, &[(BUFFERS, 12 + 1515, false)]);
    rig.driver.chain(TX, &[(BUFFERS, 11, false)]);
    rig.driver.chain(TX, &[(BUFFERS, 12, false)]);
    rig.driver.chain(TX, &[(u64::MAX - 20, 100, false)]);
    rig.net.queue_event(TX).unwrap();
    assert_eq!(rig.driver.used(TX).len(), 4);
    assert_eq!(rig.demux.recv(&mut [0; MAX_FRAME]), None);
}

#[test]
fn reset_forgets_frames_and_stops_watching() {
    let mut rig = Rig::new();
    rig.demux.send(b"stale").unwrap();
    rig.settle();
    rig.net.reset();
    rig.net.queue_event(RX).unwrap();
    let (active, _) = rig.driver.activate();
    rig.net.activate(active).unwrap(); // would fail if the ring were still watched
    rig.driver.chain(RX, &[(BUFFERS, 1526, true)]);
    rig.net.queue_event(RX).unwrap();
    assert!(rig.driver.used(RX).is_empty());
}

proptest! {
    #[test]
    fn a_hostile_driver_breaks_nothing(rx in hostile(), tx in hostile()) {
        let mut rig = Rig::new();
        rx.apply(&rig.driver, RX);
        tx.apply(&rig.driver, TX);
        for _ in 0..4 {
            let _ = rig.demux.send(&[1; 100]);
        }
        let _ = rig.net.queue_event(TX);
        let _ = rig.net.event(RING_TOKEN, Readiness::READ);
        rig.net.reset();
        prop_assert!(!rig.demux.broken());
    }
}
