//! The transport's state machine, against a driver that follows it and one that does not.

use super::register as r;
use super::*;
use crate::reactor::Reactor;
use crate::virtio::read_config_from;
use proptest::prelude::*;
use std::sync::Mutex;
use vm_memory::GuestAddress;

/// What happened to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Activate,
    Reset,
    Queue(usize),
}

struct Probe {
    calls: Arc<Mutex<Vec<Call>>>,
    fails: bool,
    active: Option<Active>,
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8, 16]
    }
    fn features(&self) -> u64 {
        0b1000
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_from(b"configuration", offset, data);
    }
    fn activate(&mut self, active: Active) -> Result<(), DeviceError> {
        self.active = Some(active);
        self.calls.lock().unwrap().push(Call::Activate);
        Ok(())
    }
    fn active(&mut self) -> Option<&mut Active> {
        self.active.as_mut()
    }
    fn reset(&mut self) {
        self.active = None;
        self.calls.lock().unwrap().push(Call::Reset);
    }
    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.calls.lock().unwrap().push(Call::Queue(queue));
        match self.fails {
            true => Err(DeviceError::Host { what: "probe", source: io::Error::other("asked to fail") }),
            false => Ok(()),
        }
    }
}

struct Rig {
    transport: Transport,
    calls: Arc<Mutex<Vec<Call>>>,
    reactor: Reactor,
}

impl Rig {
    fn new(fails: bool) -> Self {
        let calls = Arc::default();
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let reactor = Reactor::new().unwrap();
        let device = Box::new(Probe { calls: Arc::clone(&calls), fails, active: None });
        let transport = Transport::new(device, memory, reactor.poller(0)).unwrap();
        Self { transport, calls, reactor }
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn negotiate(&mut self) {
        self.set(r::STATUS, 1);
        self.set(r::STATUS, 3);
        self.set(r::DRIVER_FEATURES_SEL, 1);
        self.set(r::DRIVER_FEATURES, 1);
        self.set(r::STATUS, 11);
        assert_eq!(self.get(r::STATUS), 11);
    }

    fn set_up_queue(&mut self, index: u32, at: u32) {
        self.set(r::QUEUE_SEL, index);
        self.set(r::QUEUE_NUM, 8);
        self.set(r::QUEUE_DESC_LOW, at);
        self.set(r::QUEUE_DRIVER_LOW, at.wrapping_add(0x1000));
        self.set(r::QUEUE_DEVICE_LOW, at.wrapping_add(0x2000));
        self.set(r::QUEUE_READY, 1);
    }

    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    /// Delivers everything that is pending, as the event loop does.
    fn deliver(&mut self) {
        let events: Vec<_> = self.reactor.wait().unwrap().collect();
        for event in events {
            self.transport.event(event.token, event.readiness);
        }
    }
}

#[test]
fn a_driver_that_follows_the_rules_gets_a_running_device() {
    let mut rig = Rig::new(false);
    assert_eq!((rig.get(r::MAGIC), rig.get(r::VERSION), rig.get(r::DEVICE_ID)), (0x7472_6976, 2, 42));
    assert_eq!(rig.get(r::QUEUE_NUM_MAX), 8);
    rig.negotiate();
    rig.set_up_queue(0, 0x1000);
    rig.set_up_queue(1, 0x4000);
    assert_eq!(rig.get(r::QUEUE_READY), 1);
    rig.set(r::STATUS, 15);
    assert_eq!(rig.get(r::STATUS), 15);
    assert_eq!(rig.calls(), [Call::Activate]);
    rig.deliver();
    assert_eq!(rig.calls(), [Call::Queue(0), Call::Queue(1)]);
    rig.set(r::QUEUE_NOTIFY, 1);
    rig.deliver();
    assert_eq!(rig.calls(), [Call::Queue(1)]);
    rig.set(r::STATUS, 0);
    assert_eq!(rig.calls(), [Call::Reset]);
    assert_eq!((rig.get(r::STATUS), rig.get(r::QUEUE_READY)), (0, 0));
    rig.set(r::QUEUE_NOTIFY, 0);
    rig.deliver();
    assert_eq!(rig.calls(), []);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for (low, high, accepted) in [(0, 1, true), (8, 1, true), (0, 0, false), (1, 1, false), (0, 3, false)] {
        let mut rig = Rig::new(false);
        rig.set(r::STATUS, 1);
        rig.set(r::STATUS, 3);
        for (sel, value) in [(0, low), (1, high), (2, u32::MAX)] {
            rig.set(r::DRIVER_FEATURES_SEL, sel);
            rig.set(r::DRIVER_FEATURES, value);
        }
        rig.set(r::STATUS, 11);
        assert_eq!(rig.get(r::STATUS), if accepted { 11 } else { 3 }, "{low:#x} {high:#x}");
        // Without FEATURES_OK there is no way on.
        rig.set(r::STATUS, 15);
        assert_eq!(rig.calls().is_empty(), !accepted);
    }
}

#[test]
fn queues_outside_memory_need_a_reset_and_never_reach_the_device() {
    for at in [0xe000, 0xffff_f000, 0x1_0000] {
        let mut rig = Rig::new(false);
        rig.negotiate();
        rig.set_up_queue(0, at);
        rig.set(r::STATUS, 15);
        assert_eq!(rig.get(r::STATUS), 15 | status::NEEDS_RESET);
        assert_eq!(rig.calls(), []);
        rig.set(r::STATUS, 0);
        assert_eq!(rig.get(r::STATUS), 0);
        assert_eq!(rig.calls(), []);
    }
}

#[test]
fn a_device_that_fails_is_stopped_until_reset() {
    let mut rig = Rig::new(true);
    rig.negotiate();
    rig.set_up_queue(0, 0x1000);
    rig.set(r::STATUS, 15);
    rig.deliver();
    assert_eq!(rig.calls(), [Call::Activate, Call::Queue(0), Call::Reset]);
    assert_eq!(rig.get(r::STATUS), 15 | status::NEEDS_RESET);
    assert_eq!(rig.get(r::INTERRUPT_STATUS), Interrupt::CONFIG_CHANGE);
    rig.set(r::INTERRUPT_ACK, 2);
    assert_eq!(rig.get(r::INTERRUPT_STATUS), 0);
    rig.set(r::QUEUE_NOTIFY, 0);
    rig.deliver();
    rig.set(r::STATUS, 0);
    assert_eq!(rig.calls(), []);
    rig.negotiate();
}

#[test]
fn queue_registers_are_deaf_outside_their_state() {
    let mut rig = Rig::new(false);
    rig.set_up_queue(0, 0x1000);
    assert_eq!(rig.get(r::QUEUE_READY), 0);
    rig.negotiate();
    rig.set_up_queue(7, 0x1000);
    assert_eq!((rig.get(r::QUEUE_READY), rig.get(r::QUEUE_NUM_MAX)), (0, 0));
}

#[test]
fn configuration_is_bounded_and_registers_have_32_bits() {
    let mut rig = Rig::new(false);
    let mut bytes = [0xff; 8];
    rig.transport.read(r::CONFIG + 8, &mut bytes);
    assert_eq!(&bytes, b"ation\0\0\0");
    rig.transport.read(0xfff, &mut bytes[..1]);
    assert_eq!(bytes[0], 0);
    let mut half = [0xff; 2];
    rig.transport.read(r::MAGIC, &mut half);
    assert_eq!(half, [0, 0]);
    rig.transport.write(r::STATUS, &[1]);
    assert_eq!(rig.get(r::STATUS), 0);
}

proptest! {
    /// Whatever is written wherever: status bits appear in order, activation and reset alternate, nothing panics.
    #[test]
    fn a_hostile_driver_cannot_leave_the_state_machine(
        writes in prop::collection::vec((
            prop_oneof![
                4 => Just(r::STATUS),
                1 => prop::sample::select(vec![
                    r::DRIVER_FEATURES, r::DRIVER_FEATURES_SEL, r::QUEUE_SEL, r::QUEUE_NUM, r::QUEUE_READY,
                    r::QUEUE_NOTIFY, r::INTERRUPT_ACK, r::QUEUE_DESC_LOW, r::QUEUE_DESC_HIGH,
                    r::QUEUE_DRIVER_LOW, r::QUEUE_DEVICE_LOW, r::CONFIG,
                ]),
                1 => 0u64..0x1000,
            ],
            prop_oneof![
                4 => prop::sample::select(vec![0u32, 1, 3, 11, 15, 128, 64, 143]),
                1 => 0u32..0x1_0000,
                1 => any::<u32>(),
            ],
        ), 0..60),
        good in any::<bool>(),
    ) {
        let mut rig = Rig::new(false);
        if good {
            rig.negotiate();
            rig.set_up_queue(0, 0x1000);
        }
        let mut running = false;
        for (offset, value) in writes {
            rig.set(offset, value);
            rig.get(offset);
            for call in rig.calls() {
                match call {
                    Call::Activate => { prop_assert!(!running); running = true; }
                    Call::Reset => { prop_assert!(running); running = false; }
                    Call::Queue(_) => prop_assert!(running),
                }
            }
            let known = rig.transport.status() & 0xf;
            prop_assert!([0, 1, 3, 11, 15].contains(&known), "status {known:#x}");
        }
    }
}
