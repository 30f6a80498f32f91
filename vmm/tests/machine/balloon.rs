//! The balloon of whole machines: memory that the guest gives up is really the host's again, and the guest's when it needs it.

use std::time::{Duration, Instant};

use super::control::{attach, hear};
use super::*;

/// MiB that the guest fills and frees again.
const FILLED: u64 = 40;

/// A machine of 128 MiB with a balloon whose guest filled memory and freed it; then it waits for a line and runs `script`. Free memory is
/// reported in blocks of 2^`order` pages.
fn machine(order: u32, script: &str) -> Machine {
    let mut machine = Machine::new(&format!(
        "mkdir /tmp; mount -t tmpfs -o size=100m none /tmp\n\
         dd if=/dev/urandom of=/tmp/x bs=1M count={FILLED} 2>/dev/null; echo FILLED; read line\n\
         rm /tmp/x; echo FREED; read line\n{script}\nsleep 1000"
    ));
    machine.append(&format!("page_reporting.page_reporting_order={order}"));
    machine.config.memory_mib = 128;
    machine.config.balloon = true;
    machine.config.jail = rustix::process::geteuid().is_root().then_some(JailConfig { uid: UID });
    machine
}

struct Running {
    child: Child,
    console: UnixStream,
    client: UnixStream,
    heard: String,
}

impl Running {
    fn start(machine: &Machine) -> Self {
        let mut child = machine.start();
        let console = attach(machine, &mut child);
        let client = machine.connect(&mut child);
        Self { child, console, client, heard: String::new() }
    }

    fn hear(&mut self, words: &str) {
        hear(&mut self.console, &mut self.heard, words);
    }

    fn go_on(&mut self) {
        self.console.write_all(b"\n").unwrap();
    }

    fn metrics(&self) -> Metrics {
        ask(&self.client, &Request::Metrics);
        let Response::Metrics(metrics) = answer(&self.client) else { panic!("no metrics") };
        *metrics
    }

    /// Asks until the metrics are as wished.
    fn until(&mut self, wish: impl Fn(&Metrics) -> bool) -> Metrics {
        let patience = Instant::now() + Duration::from_secs(120);
        loop {
            assert!(self.child.try_wait().unwrap().is_none(), "the machine ended early: {}", self.heard);
            let metrics = self.metrics();
            if wish(&metrics) {
                return metrics;
            }
            assert!(Instant::now() < patience, "still {metrics:?}: {}", self.heard);
            // The guest needs the processor too; what it says ends the pause.
            let pause = rustix::time::Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
            let mut fds = [PollFd::new(&self.console, PollFlags::HUP)];
            rustix::event::poll(&mut fds, Some(&pause)).unwrap();
        }
    }

    fn leave(&self, memory_mib: u32) {
        ask(&self.client, &Request::Balloon { memory_mib });
        assert_eq!(answer(&self.client), Response::Done);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn what_the_guest_frees_goes_back_to_the_host_by_itself() {
    let machine = machine(4, "");
    let mut running = Running::start(&machine);
    running.hear("FILLED");
    let filled = running.metrics();
    assert!(filled.private_kib >= FILLED * 1024, "{filled:?}");
    running.go_on();
    running.hear("FREED");
    let most = filled.private_kib - FILLED * 1024 * 9 / 10;
    let after = running.until(|metrics| metrics.private_kib <= most);
    assert!(after.reported_kib >= FILLED * 1024 * 9 / 10, "{after:?}");
    assert_eq!(after.balloon_mib, 0);
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn the_balloon_takes_memory_and_gives_it_back_when_the_guest_is_short() {
    // In blocks this large nothing is ever reported from so small a machine.
    let machine =
        machine(10, "dd if=/dev/zero of=/tmp/y bs=1M count=70 2>/dev/null && echo ALLOCATED; read line");
    let mut running = Running::start(&machine);
    running.hear("FILLED");
    running.go_on();
    running.hear("FREED");
    let before = running.metrics();
    assert!(before.private_kib >= FILLED * 1024, "{before:?}");
    running.leave(64);
    let inflated = running.until(|metrics| metrics.balloon_mib == 64);
    let shrunk = before.private_kib.saturating_sub(inflated.private_kib);
    assert!(shrunk >= 10 * 1024, "before: {before:?}, after: {inflated:?}");
    assert_eq!(inflated.reported_kib, 0);
    // Numbers come with the answer after the next: until they do, earlier ones are told.
    running.until(|metrics| metrics.guest_free_kib.is_some_and(|free| free < 64 * 1024 - 20 * 1024));

    // The guest needs more than it was left: it takes the pages out of the balloon by itself, and nothing is killed.
    running.go_on();
    running.hear("ALLOCATED");
    let short = running.metrics();
    assert!(short.balloon_mib < 64 && short.private_kib >= 70 * 1024, "{short:?}");
    assert!(!running.heard.contains("Killed process"), "{}", running.heard);

    running.leave(128);
    running.until(|metrics| metrics.balloon_mib == 0);
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn a_machine_without_a_balloon_says_so() {
    let machine = Machine::new("sleep 1000");
    let running = Running::start(&machine);
    ask(&running.client, &Request::Balloon { memory_mib: 40 });
    assert!(matches!(answer(&running.client), Response::Error { message } if message.contains("no balloon")));
}
