//! Tests of the ring: against a queue, against a hostile peer, across a restart, and with two threads at full speed.

use std::collections::VecDeque;

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};

use super::*;

fn pair(capacity: usize) -> (Endpoint, Endpoint) {
    let (machine, fds) = Ring::with_capacity(capacity).unwrap();
    (machine, Endpoint::open(fds).unwrap())
}

fn ready(endpoint: &Endpoint) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(endpoint.event(), PollFlags::IN)];
    poll(&mut fds, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
}

fn wait(endpoint: &Endpoint) {
    let mut fds = [PollFd::from_borrowed_fd(endpoint.event(), PollFlags::IN)];
    let limit = rustix::time::Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_ne!(poll(&mut fds, Some(&limit)).unwrap(), 0, "a wake-up was lost");
    endpoint.drain_event();
}

#[derive(Debug, Clone)]
enum Step {
    Send { from_machine: bool, length: usize, fill: u8 },
    Recv { at_machine: bool },
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (any::<bool>(), 1..=MAX_FRAME, any::<u8>()).prop_map(|(from_machine, length, fill)| Step::Send { from_machine, length, fill }),
        8 => any::<bool>().prop_map(|at_machine| Step::Recv { at_machine }),
        1 => Just(Step::Restart),
    ]
}

fn frame(length: usize, fill: u8) -> Vec<u8> {
    (0..length).map(|i| fill.wrapping_add((i % 251) as u8)).collect()
}

proptest! {
    #[test]
    fn behaves_as_two_queues_across_restarts(steps in prop::collection::vec(step(), 1..400)) {
        let (mut machine, mut demux) = pair(4096);
        let mut model = [VecDeque::new(), VecDeque::new()];
        let mut used = [0u64; 2];
        for step in steps {
            match step {
                Step::Send { from_machine, length, fill } => {
                    let (side, queue) = if from_machine { (&mut machine, 0) } else { (&mut demux, 1) };
                    let fits = used[queue] + record_size(length) <= 4096;
                    prop_assert_eq!(side.send(&frame(length, fill)).is_ok(), fits);
                    if fits {
                        used[queue] += record_size(length);
                        model[queue].push_back(frame(length, fill));
                    }
                }
                Step::Recv { at_machine } => {
                    let (side, queue) = if at_machine { (&mut machine, 1) } else { (&mut demux, 0) };
                    let mut buf = [0; MAX_FRAME];
                    let got = side.recv(&mut buf).map(|n| buf[..n].to_vec());
                    let expected = model[queue].pop_front();
                    if let Some(frame) = &expected { used[queue] -= record_size(frame.len()); }
                    prop_assert_eq!(got, expected);
                }
                Step::Restart => demux = Endpoint::open(machine.fds().unwrap()).unwrap(),
            }
        }
        prop_assert!(!machine.broken() && !demux.broken());
    }

    /// A peer that writes anything anywhere is survived, by both sides.
    #[test]
    fn survives_corruption(
        sends in 0usize..6,
        writes in prop::collection::vec((prop_oneof![0usize..256, 512usize..1536], prop_oneof![any::<u64>(), 0u64..5000, Just(8u64)]), 1..40),
        reopen in any::<bool>(),
    ) {
        let (mut machine, mut demux) = pair(4096);
        for n in 0..sends {
            let _ = machine.send(&frame(60 + n, 1));
            let _ = demux.send(&frame(600 + n, 2));
        }
        let mut buf = [0; MAX_FRAME];
        for (word, value) in writes {
            machine.map.words()[word].store(value, Ordering::Relaxed);
            for side in [&mut machine, &mut demux] {
                if let Some(n) = side.recv(&mut buf) { prop_assert!((1..=MAX_FRAME).contains(&n)); }
                let _ = side.send(&[9; 100]);
                side.drain_event();
            }
        }
        if reopen
            && let Ok(mut again) = Endpoint::open(machine.fds().unwrap()) {
            for _ in 0..100 { let _ = again.recv(&mut buf); }
            let _ = again.send(&[1]);
        }
    }
}

#[test]
fn wakes_the_peer_only_when_it_waits() {
    let (mut machine, mut demux) = pair(4096);
    let mut buf = [0; MAX_FRAME];
    assert!(ready(&machine), "opening wakes the machine, in case an earlier net-demux owed it a wake-up");
    machine.drain_event();
    assert_eq!(demux.recv(&mut buf), None);
    machine.send(b"one").unwrap();
    assert!(ready(&demux));
    demux.drain_event();
    machine.send(b"two").unwrap();
    assert!(!ready(&demux), "it was told already and has not said since that it found nothing");
    assert_eq!(demux.recv(&mut buf), Some(3));
    assert_eq!(demux.recv(&mut buf), Some(3));
    assert_eq!(demux.recv(&mut buf), None);
    machine.send(b"three").unwrap();
    assert!(ready(&demux));
}

#[test]
fn room_is_told_when_half_is_free() {
    let (mut machine, mut demux) = pair(4096);
    machine.drain_event();
    while machine.send(&[7; 504]).is_ok() {}
    let mut buf = [0; MAX_FRAME];
    for _ in 0..3 {
        demux.recv(&mut buf).unwrap();
    }
    assert!(!ready(&machine));
    demux.recv(&mut buf).unwrap();
    assert!(ready(&machine));
}

#[test]
fn frames_no_ring_carries_are_discarded_and_counted() {
    let (mut machine, mut demux) = pair(4096);
    machine.send(&[]).unwrap();
    machine.send(&[0; MAX_FRAME + 1]).unwrap();
    assert_eq!(machine.oversized(), 2);
    assert_eq!(demux.recv(&mut [0; MAX_FRAME]), None);
    assert!(!demux.broken());
}

#[test]
fn a_wild_index_breaks_the_ring_for_good() {
    let (mut machine, mut demux) = pair(4096);
    let tail = DIRECTION_WORDS[GUEST_TO_DEMUX] + TAIL;
    machine.map.words()[tail].store(8192, Ordering::Relaxed);
    assert_eq!(demux.recv(&mut [0; MAX_FRAME]), None);
    assert!(demux.broken());
    assert_eq!(demux.send(b"x"), Err(Full));
    machine.map.words()[tail].store(0, Ordering::Relaxed);
    let _ = machine.send(b"x");
    assert_eq!(demux.recv(&mut [0; MAX_FRAME]), None);
}

#[test]
fn refuses_what_is_no_ring() {
    let fresh = || Ring::with_capacity(4096).unwrap();
    let (machine, mut fds) = fresh();
    fds.memory = rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fds.memory, 3 * 4096).unwrap();
    assert!(matches!(Endpoint::open(fds), Err(RingError::NotSealed(_))));

    let mut fds = machine.fds().unwrap();
    fds.memory = rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fds.memory, 4 * 4096).unwrap();
    rustix::fs::fcntl_add_seals(&fds.memory, REQUIRED_SEALS).unwrap();
    assert!(matches!(Endpoint::open(fds), Err(RingError::BadSize(16384))));

    let mut fds = machine.fds().unwrap();
    fds.memory = rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fds.memory, 3 * 4096).unwrap();
    rustix::fs::fcntl_add_seals(&fds.memory, REQUIRED_SEALS).unwrap();
    assert!(matches!(Endpoint::open(fds), Err(RingError::Corrupt(_))));

    let mut fds = machine.fds().unwrap();
    fds.room = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    assert!(matches!(Endpoint::open(fds), Err(RingError::BadEvent("room"))));

    let mut fds = machine.fds().unwrap();
    fds.memory = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    assert!(matches!(Endpoint::open(fds), Err(RingError::NotSealed(_))));

    assert!(Ring::with_capacity(5000).is_err());
    assert!(Endpoint::open(machine.fds().unwrap()).unwrap().fds().is_err());
}

/// Both threads sleep in `poll` whenever they can: a single lost wake-up ends the test by its time limit.
#[test]
fn two_threads_lose_nothing_and_never_miss_a_wake_up() {
    const FRAMES: u32 = 60_000;
    let (mut machine, mut demux) = pair(4096);
    let echo = std::thread::spawn(move || {
        let mut buf = [0; MAX_FRAME];
        let mut pending: Option<usize> = None;
        let mut done = 0;
        while done < FRAMES {
            if pending.is_none() {
                pending = demux.recv(&mut buf);
            }
            match pending {
                Some(n) if demux.send(&buf[..n]).is_ok() => {
                    pending = None;
                    done += 1;
                }
                _ => wait(&demux),
            }
        }
    });
    let mut buf = [0; MAX_FRAME];
    let (mut sent, mut received) = (0u32, 0u32);
    while received < FRAMES {
        let mut progress = false;
        let body = frame(4 + (sent as usize * 37) % 900, sent as u8);
        let mut out = sent.to_le_bytes().to_vec();
        out.extend_from_slice(&body);
        if sent < FRAMES && machine.send(&out).is_ok() {
            sent += 1;
            progress = true;
        }
        if let Some(n) = machine.recv(&mut buf) {
            assert_eq!(buf[..4], u32::to_le_bytes(received));
            assert_eq!(buf[4..n], frame(4 + (received as usize * 37) % 900, received as u8));
            received += 1;
            progress = true;
        }
        if !progress {
            wait(&machine);
        }
    }
    echo.join().unwrap();
}
