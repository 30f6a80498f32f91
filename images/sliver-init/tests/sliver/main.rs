//! Whole slivers: the real sliver-init on the real kernel in the real `sliver-vmm`, with this test as the node manager. Needs KVM that can run
//! Linux and `mke2fs`; `SLIVER_KERNEL`, `SLIVER_INITRD`, `SLIVER_BASE` (the base `mini`) and `SLIVER_VMM` name what the machines are made of.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod machine;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use commonage_nodemgr_api::guest::{FromGuest, FromHost};
use commonage_vmm_api::{ExitReason, Request, Response};
use machine::{ADDRESS, GATEWAY_MAC, Host, Running, identity};

/// How far a guest's clock may be from the host's, which runs both on one emulated processor.
const CLOCK_ERROR: Duration = Duration::from_secs(5);
/// Values of a sliver that no other may have, as a shell tells them, a line each.
const IDENTITY: &str = "cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub /etc/hostname /proc/sys/kernel/hostname \
    /proc/sys/net/ipv4/ip_local_port_range /sys/class/net/eth0/address /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; \
    head -c 16 /dev/urandom | hexdump -e '16/1 \"%02x\" \"\\n\"'";

#[test]
#[ignore = "needs KVM and SLIVER_*"]
fn a_machine_waits_becomes_a_sliver_and_is_switched_off() {
    let host = Host::new();
    let running = host.start();
    running.wait_for_knock();
    let mut ring = running.ring();
    // Whoever is early is told so.
    assert!(running.run("true").unwrap_err().contains("no identity"));

    let mut guest = running.converse();
    assert_eq!(guest.hear(), FromGuest::Hello { configured: false, boot_script_exit: None });
    let mut identity = identity(1, host.disk_bytes());
    identity.boot_script = "echo ran > /root/ran; exit 3".into();
    assert!(machine::frames(&mut ring).is_empty(), "a machine without identity sends frames");
    guest.say(&FromHost::Identity(Box::new(identity.clone())));
    assert_eq!(guest.hear(), FromGuest::Configured);
    assert_eq!(guest.hear(), FromGuest::BootScriptDone { exit: 3 });
    assert_eq!(running.run("cat /root/ran /etc/hostname").unwrap(), "ran\na-sliver1\n");
    assert_eq!(running.run("stat -c '%a %n' /tmp /root /root/.ssh /dev/shm /run").unwrap(), MODES);

    // What it sends comes from the identity's addresses.
    running.run("ping -c 1 -w 1 192.0.2.99; true").unwrap();
    let frames = machine::frames(&mut ring);
    let ping = frames.iter().find(|f| f.get(12..14) == Some(&[8, 0])).expect("a ping");
    assert_eq!(
        (&ping[..6], &ping[6..12], &ping[26..30]),
        (&GATEWAY_MAC[..], &identity.mac[..], &ADDRESS.octets()[..])
    );
    assert!(frames.iter().all(|f| f.get(12..14) == Some(&[8, 0])), "it sends something else than IPv4");

    // A node manager that comes back; the older connection is closed.
    let mut again = running.converse();
    assert_eq!(again.hear(), FromGuest::Hello { configured: true, boot_script_exit: Some(3) });
    assert!(guest.is_closed());
    again.say(&FromHost::Welcome);
    let later = "2040-01-01T00:00:00Z".parse().unwrap();
    again.say(&FromHost::Resumed { now: later, entropy: identity.entropy });
    // Lines are obeyed in order, and this one is answered.
    again.say(&FromHost::Identity(Box::new(machine::identity(1, host.disk_bytes()))));
    assert_eq!(again.hear(), FromGuest::Configured);
    assert!(running.run("date -u +%Y").unwrap().starts_with("2040"));

    // A daemon is asked first.
    running.run("(trap 'echo asked > /root/asked; exit' TERM; echo > /tmp/ready; while :; do sleep 1; done) >/dev/null 2>&1 & while [ ! -e /tmp/ready ]; do sleep 0.1; done").unwrap();
    let waiting = running.wait();
    assert_eq!(running.ask(&Request::Stop { grace_ms: 60_000 }), Response::Stopping);
    let (reason, console) = waiting.exited();
    assert_eq!(reason, ExitReason::Halt, "{console}");

    // The same sliver once more: what is its own is kept, and what it wrote.
    let own = "cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key";
    let next = host.start();
    next.become_sliver(1);
    assert_eq!(next.run("cat /root/asked; ls /tmp").unwrap(), "asked\n");
    let first = next.run(own).unwrap();
    next.end("reboot", &ExitReason::Reboot);
    let last = host.start();
    last.become_sliver(1);
    assert_eq!(last.run(own).unwrap(), first);
    last.end("halt", &ExitReason::Halt);
}

const MODES: &str = "1777 /tmp\n700 /root\n700 /root/.ssh\n1777 /dev/shm\n755 /run\n";

#[test]
#[ignore = "needs KVM and SLIVER_*"]
fn an_identity_that_cannot_be_is_refused_and_another_one_taken() {
    let host = Host::new();
    let running = host.start();
    running.wait_for_knock();
    let mut guest = running.converse();
    guest.hear();
    let mut bad = identity(1, host.disk_bytes());
    bad.files.push(commonage_nodemgr_api::http::File {
        path: "/../etc".into(),
        mode: 0o600,
        contents: commonage_nodemgr_api::Bytes::default(),
    });
    guest.say(&FromHost::Identity(Box::new(bad)));
    assert!(matches!(guest.hear(), FromGuest::Failed { message } if message.contains("..")));
    guest.say(&FromHost::Identity(Box::new(identity(1, host.disk_bytes()))));
    assert_eq!(guest.hear(), FromGuest::Configured);
    running.end("poweroff", &ExitReason::Halt);
}

#[test]
#[ignore = "needs KVM and SLIVER_*"]
fn clones_have_nothing_in_common() {
    let template = Host::template().snapshot();
    let count: u8 = std::env::var("CLONES").map_or(4, |n| n.parse().unwrap());
    let hosts: Vec<Host> = (0..count).map(|_| Host::clone_of(&template)).collect();
    let clones: Vec<Running> = hosts.iter().map(Host::start).collect();
    for (number, clone) in (1..).zip(&clones) {
        clone.become_sliver(number);
    }
    let mut seen: BTreeMap<usize, BTreeSet<String>> = BTreeMap::new();
    for clone in &clones {
        let told = clone.run(IDENTITY).unwrap();
        let values: Vec<&str> = told.lines().collect();
        assert_eq!(values.len(), 9, "{told}");
        for (at, value) in values.into_iter().enumerate() {
            assert!(seen.entry(at).or_default().insert(value.to_owned()), "two clones have {value}");
        }
        let clock: u64 = clone.run("date +%s").unwrap().trim().parse().unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert!(now.abs_diff(Duration::from_secs(clock)) < CLOCK_ERROR, "{clock} at {now:?}");
        let size: u64 = clone.run("cat /sys/class/block/vda/size").unwrap().trim().parse().unwrap();
        assert_eq!(size * 512, hosts[0].disk_bytes());
    }
    for clone in &clones {
        clone.end("poweroff", &ExitReason::Halt);
    }
}
