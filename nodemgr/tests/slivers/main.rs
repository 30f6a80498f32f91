//! The node manager with everything real below it: net-demux, machines, guests. Run in a machine of its own, by the test of the same name in the
//! testbed; one after the other, because they are one node.

#![allow(clippy::unwrap_used, reason = "helpers of tests are no tests to clippy")]

mod world;

use std::os::unix::fs::MetadataExt as _;
use std::time::Instant;

use commonage_nodemgr_api::http::{File, RestartPolicy, SliverConfig, SliverState};
use commonage_vmm_api::Start;

use world::{Node, mini, slice, templates};

#[test]
#[ignore = "needs a node: cargo xtask test"]
fn slivers_are_clones_of_one_template_and_none_is_like_another() {
    let node = Node::start();
    let names = ["a_one", "a_two", "a_three"];
    for name in names {
        let since = Instant::now();
        node.run(name);
        println!("{name} runs after {} ms", since.elapsed().as_millis());
        assert!(node.is_clone(name), "{:?}", node.start_of(name));
    }
    assert_eq!(std::fs::read_dir(templates()).unwrap().count(), 1);
    for question in [
        "hostname",
        "cat /etc/machine-id",
        "cat /proc/sys/kernel/random/uuid",
        "cat /sys/class/net/eth0/address",
    ] {
        let mut answers = names.map(|name| node.ask(name, question));
        println!("{question}: {answers:?}");
        answers.sort();
        assert!(answers[0] != answers[1] && answers[1] != answers[2], "{question}: {answers:?}");
    }
    for name in names {
        let disk = node.manager.paths(&slice(name)).disk();
        node.ask(name, "sync");
        let kib = std::fs::metadata(disk).unwrap().blocks() / 2;
        println!("{name}: its disk takes {kib} KiB");
        assert!(kib <= 1024, "a new disk takes {kib} KiB");
        let metrics = node.block_on(node.manager.metrics(&slice(name), &slice(name))).unwrap();
        assert!(metrics.private_kib > 0 && metrics.vcpus.len() == 1, "{metrics:?}");
        println!("{name}: {metrics:?}");
    }
    for name in names {
        node.delete(name);
    }
    node.die();
}

#[test]
#[ignore = "needs a node: cargo xtask test"]
fn each_end_is_told_and_followed_by_what_the_policy_says() {
    let node = Node::start();
    let failed = |wanted: &'static str| move |state: &SliverState| matches!(state, SliverState::Failed { reason } if reason.contains(wanted));
    node.run("b_always");
    for (line, wanted) in [
        ("reboot", "rebooted"),
        ("halt", "halted"),
        ("poweroff", "halted"),
        ("echo c > /proc/sysrq-trigger", "panicked"),
    ] {
        node.tell("b_always", line);
        let SliverState::Failed { reason } = node.until("b_always", failed(wanted)) else { unreachable!() };
        println!("{line}: {reason}");
        assert!(reason.contains("console ends with"), "{reason}");
        node.until_running("b_always");
    }
    node.delete("b_always");

    let policy = |restart| SliverConfig { restart, ..mini() };
    node.bind("b_failure", policy(RestartPolicy::OnFailure));
    node.until_running("b_failure");
    node.tell("b_failure", "reboot");
    node.until("b_failure", failed("rebooted"));
    node.until_running("b_failure");
    node.tell("b_failure", "halt");
    let stopped = |state: &SliverState| matches!(state, SliverState::Stopped { .. });
    node.until("b_failure", stopped);

    node.bind("b_never", policy(RestartPolicy::Never));
    node.until_running("b_never");
    node.tell("b_never", "echo c > /proc/sysrq-trigger");
    let SliverState::Stopped { reason } = node.until("b_never", stopped) else { unreachable!() };
    assert!(reason.contains("panicked"), "{reason}");

    // A node manager that restarts leaves them as they are, and whoever configures them anew starts them.
    node.die();
    let node = Node::start();
    node.until("b_failure", stopped);
    node.until("b_never", |state| *state == SliverState::Stopped { reason: reason.clone() });
    node.configure("b_never", policy(RestartPolicy::Never));
    node.until_running("b_never");
    for name in ["b_never", "b_failure"] {
        node.delete(name);
    }
    node.die();
}

#[test]
#[ignore = "needs a node: cargo xtask test"]
fn a_new_node_manager_takes_over_what_lives_and_serves_its_calls() {
    let node = Node::start();
    let contents = commonage_nodemgr_api::Bytes(b"a file".to_vec());
    let file = File { path: "/root/file".into(), mode: 0o640, contents };
    node.bind("c_one", SliverConfig { files: vec![file], ..mini() });
    node.until_running("c_one");
    assert_eq!(node.ask("c_one", "cat /root/file; stat -c %a /root/file"), "a file640");
    node.put("c_one", "/root/call", &std::fs::read("/bin/vsock-call").unwrap());
    let ask = r"printf 'GET /v1/node HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n' | /root/call 806";
    assert!(node.ask("c_one", ask).contains(r#""caller":"c_one""#));
    node.ask("c_one", "echo here > /run/mark");
    // While nobody is there, calls are refused; none waits for ever.
    node.die();
    let node = Node::start();
    node.until_running("c_one");
    assert_eq!(node.ask("c_one", "cat /run/mark"), "here", "it was started anew");
    assert!(node.ask("c_one", ask).contains(r#""caller":"c_one""#));
    // A guest that connects without end stops only itself.
    node.ask("c_one", "for i in $(seq 100); do (sleep 20 | /root/call 806) > /dev/null 2>&1 & done; sleep 1");
    node.run("c_two");
    node.delete("c_two");
    node.ask("c_one", "killall call sleep; for i in $(seq 10); do /root/call 4711 < /dev/null; done; true");
    assert!(node.ask("c_one", ask).contains(r#""caller":"c_one""#));
    node.delete("c_one");
    node.die();
}

#[test]
#[ignore = "needs a node: cargo xtask test"]
fn a_saved_sliver_goes_on_where_it_was_and_only_once() {
    let node = Node::start();
    node.run("d_one");
    node.ask("d_one", "echo here > /run/mark; echo there > /root/mark; (while :; do sleep 1; done) > /dev/null 2>&1 & echo $! > /run/pid");
    let saved = node.manager.paths(&slice("d_one")).state.join("saved");
    node.power_off();
    assert!(saved.join("memory").exists());
    let node = Node::start();
    node.until_running("d_one");
    let Start::Restore { memory, .. } = node.start_of("d_one") else { panic!("it booted") };
    assert!(memory.ends_with("d_one/resuming/memory"), "{}", memory.display());
    assert_eq!(
        node.ask("d_one", "cat /run/mark /root/mark; kill -0 $(cat /run/pid) && echo lives"),
        "here\nthere\nlives"
    );
    let clock: i64 = node.ask("d_one", "date +%s").parse().unwrap();
    assert!((clock - jiff::Timestamp::now().as_second()).abs() < 5, "its clock is off: {clock}");
    for name in ["saved", "saved.new", "resuming"] {
        assert!(!saved.with_file_name(name).exists(), "{name} is left");
    }
    // A second planned end, and what was saved is damaged meanwhile: it starts afresh, with what was on its disk.
    node.ask("d_one", "sync");
    node.power_off();
    let state = std::fs::read(saved.join("state")).unwrap();
    std::fs::write(saved.join("state"), &state[..state.len() / 2]).unwrap();
    let node = Node::start();
    node.until_running("d_one");
    assert!(node.is_clone("d_one"));
    assert_eq!(node.ask("d_one", "cat /root/mark; ls /run/mark 2>/dev/null || echo afresh"), "there\nafresh");
    node.delete("d_one");
    node.die();
}

#[test]
#[ignore = "needs a node: cargo xtask test"]
fn a_template_that_is_damaged_costs_a_boot_and_is_given_up() {
    let node = Node::start();
    node.run("e_one");
    let Start::Restore { state, .. } = node.start_of("e_one") else { panic!("it booted") };
    let text = std::fs::read(&state).unwrap();
    std::fs::write(&state, &text[..text.len() - 1]).unwrap();
    node.run("e_two");
    assert!(matches!(node.start_of("e_two"), Start::Boot { .. }));
    assert!(!state.exists(), "the template is still there");
    assert_eq!(node.ask("e_one", "echo unharmed"), "unharmed");
    for name in ["e_one", "e_two"] {
        node.delete(name);
    }
    node.die();
}
