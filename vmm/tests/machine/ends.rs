//! Ends that a guest brings about, each told from the others.

use super::*;

/// Runs a guest; why its machine ended, its exit status, its console's last words.
fn end(machine: &Machine) -> (ExitReason, Option<i32>, String) {
    let mut child = machine.start();
    let waiting = machine.connect(&mut child);
    ask(&waiting, &Request::Wait);
    let status = child.wait().unwrap();
    match answer(&waiting) {
        Response::Exited { reason, console } => (reason, status.code(), console),
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn reboot_halt_panic_and_crash_are_told_apart() {
    let (reason, code, console) = end(&Machine::new("echo LAST"));
    assert_eq!((reason, code), (ExitReason::Reboot, Some(0)));
    assert!(console.contains("LAST"), "{console}");
    for command in ["halt -f", "poweroff -f"] {
        let (reason, code, console) = end(&Machine::new(command));
        assert_eq!((reason, code), (ExitReason::Halt, Some(0)), "{command}: {console}");
    }
    // A dead init is a panic.
    let (reason, code, console) = end(&Machine::new("exit 1"));
    assert_eq!((reason, code), (ExitReason::Panic, Some(4)), "{console}");
    assert!(console.contains("Attempted to kill init"), "{console}");
    // Makes the kernel reboot by triple fault, which is what a crashed processor looks like.
    let mut machine = Machine::new("");
    machine.append("reboot=t");
    let (reason, code, _) = end(&machine);
    assert_eq!((reason, code), (ExitReason::TripleFault, Some(3)));
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn a_guest_that_only_says_that_it_halted_goes_on() {
    let (reason, _, console) = end(&Machine::new(
        "echo 'reboot: System halted'; sleep 1; echo '[1.0] reboot: System halted'; echo STILL",
    ));
    assert_eq!(reason, ExitReason::Reboot);
    assert!(console.contains("STILL"), "{console}");
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn all_processors_of_a_larger_machine_end_together() {
    let spread = "for cpu in 0 1 2 3; do ( while :; do :; done ) & done\n";
    for (command, expected) in
        [("halt -f", ExitReason::Halt), ("reboot -f", ExitReason::Reboot), ("exit 1", ExitReason::Panic)]
    {
        let mut machine = Machine::new(&format!("{spread}{command}"));
        machine.config.vcpus = 4;
        let (reason, _, console) = end(&machine);
        assert_eq!(reason, expected, "{command}: {console}");
    }
}
