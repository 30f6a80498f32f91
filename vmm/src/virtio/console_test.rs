//! The console device behind real rings in guest memory.

use proptest::prelude::*;

use super::*;
use crate::virtio::testing::{BUFFERS, Driver, hostile};

struct Rig {
    device: VirtioConsole,
    driver: Driver,
    path: std::path::PathBuf,
    _directory: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let mut device = VirtioConsole::new(Console::file(&path).unwrap());
        let driver = Driver::new(&QUEUE_SIZES);
        device.activate(driver.activate().0).unwrap();
        Self { device, driver, path, _directory: directory }
    }

    fn say(&mut self, bytes: &[u8]) {
        self.driver.write(BUFFERS, bytes);
        self.driver.chain(TX, &[(BUFFERS, bytes.len() as u32, false)]);
        self.device.queue_event(TX).unwrap();
    }
}

#[test]
fn what_the_guest_says_is_in_the_log_whatever_the_framing() {
    let mut rig = Rig::new();
    rig.say(b"hello ");
    rig.driver.write(BUFFERS, b"world\n");
    rig.driver.chain(TX, &[(BUFFERS, 2, false), (BUFFERS + 2, 0, false), (BUFFERS + 2, 4, false)]);
    rig.device.queue_event(TX).unwrap();
    assert_eq!(std::fs::read(&rig.path).unwrap(), b"hello world\n");
    assert_eq!(rig.driver.used(TX), [(0, 0), (1, 0)]);
}

#[test]
fn typing_goes_to_a_guest_that_has_spoken_as_it_makes_room() {
    let mut rig = Rig::new();
    assert!(!rig.device.type_in(b"too early"));
    rig.say(b"login: ");
    assert!(rig.device.type_in(b"root\nsecret\n"));
    rig.device.queue_event(RX).unwrap();
    assert!(rig.driver.used(RX).is_empty(), "no buffer yet");
    rig.driver.chain(RX, &[(BUFFERS, 3, true), (BUFFERS + 0x100, 2, true)]);
    rig.device.queue_event(RX).unwrap();
    assert_eq!(rig.driver.used(RX), [(0, 5)]);
    assert_eq!(
        (rig.driver.read(BUFFERS, 3), rig.driver.read(BUFFERS + 0x100, 2)),
        (b"roo".to_vec(), b"t\n".to_vec())
    );
    // Offered before it is needed: used when something is typed.
    rig.driver.chain(RX, &[(BUFFERS, 100, true)]);
    rig.device.queue_event(RX).unwrap();
    assert_eq!(rig.driver.read(BUFFERS, 7), b"secret\n");
    assert_eq!(rig.device.typed.capacity(), 0);
    rig.driver.chain(RX, &[(BUFFERS, 100, true)]);
    rig.device.queue_event(RX).unwrap();
    assert_eq!(rig.driver.used(RX).len(), 2);
    assert!(rig.device.type_in(b"x"));
    rig.device.queue_event(RX).unwrap();
    assert_eq!(rig.driver.used(RX).len(), 3);

    rig.device.type_in(&vec![b'x'; 2 * MAX_TYPED]);
    assert_eq!(rig.device.typed.len(), MAX_TYPED);
    rig.device.reset();
    assert!(!rig.device.type_in(b"nobody"));
    assert!(rig.device.typed.is_empty());
}

#[test]
fn a_restored_device_goes_on_where_it_was() {
    let mut rig = Rig::new();
    rig.say(b"$ ");
    rig.device.type_in(b"ls\n");
    let saved = rig.device.save();
    let mut clone = Rig::new();
    clone.driver.chain(RX, &[(BUFFERS, 100, true)]);
    clone.device.restore(&saved).unwrap();
    assert_eq!(clone.driver.read(BUFFERS, 3), b"ls\n");
    assert!(clone.device.type_in(b"more"));
    clone.device.restore(&[]).unwrap();
}

proptest! {
    #[test]
    fn a_hostile_driver_harms_nobody(rx in hostile(), tx in hostile()) {
        let mut rig = Rig::new();
        rig.say(b"x");
        rig.device.type_in(&[7; 5000]);
        rx.apply(&rig.driver, RX);
        tx.apply(&rig.driver, TX);
        for queue in [RX, TX, RX] {
            let _ = rig.device.queue_event(queue);
        }
        rig.device.reset();
    }
}
