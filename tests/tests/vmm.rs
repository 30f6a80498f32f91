//! The tests of whole sliver machines (`vmm/tests/machine.rs`, `images/sliver-init/tests/sliver`) need a KVM that can run Linux: here they get one,
//! inside an emulated machine. Those of the machines' jail (`vmm/tests/jail`) and of the node manager with everything real below it
//! (`nodemgr/tests/slivers`) are run here too, on a node's own kernel.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use commonage_images::{Context, Images};
use commonage_testbed::nested;
use serde_json::Value;

const COMMAND: &str =
    "SLIVER_KERNEL=/vmlinux SLIVER_VMM=/bin/sliver-vmm machine --ignored --test-threads=1 --color=never";
/// `mke2fs` is busybox's unless the other is found first.
const SLIVER_COMMAND: &str = "PATH=/sbin:/bin SLIVER_KERNEL=/vmlinux SLIVER_INITRD=/initrd SLIVER_BASE=/base SLIVER_VMM=/bin/sliver-vmm \
    sliver --ignored --test-threads=1 --color=never";
const NODE_COMMAND: &str = "PATH=/sbin:/bin slivers --ignored --test-threads=1 --color=never";
const JAIL_COMMAND: &str = "jail --ignored --test-threads=1 --color=never --skip walls_take_little_memory";

#[test]
#[ignore = "needs QEMU and images: cargo xtask test"]
fn sliver_machines_pass_their_tests() {
    let images = common::images().unwrap();
    let (machine, vmm) = (build("machine").unwrap(), images.binary("sliver-vmm"));
    // One of its machines has 4 GiB, and is saved and cloned.
    let nested = nested::Machine::new(&images)
        .memory_mib(1536)
        .patience(Duration::from_secs(1200))
        .file("/bin/machine", &machine)
        .file("/bin/sliver-vmm", &vmm)
        .file("/vmlinux", &images.sliver_kernel)
        .file("/etc/mke2fs.conf", Path::new("/etc/mke2fs.conf"))
        .program("/sbin/mkfs.ext4");
    // What a filter does not know ends the process; which call it was, the kernel's log tells.
    let command = format!("{COMMAND} || {{ dmesg | grep type=1326; false; }}");
    passed(nested.and_then(|nested| nested.run(&command)));
}

#[test]
#[ignore = "needs QEMU and images: cargo xtask test"]
fn jails_hold_on_a_nodes_kernel() {
    let images = common::images().unwrap();
    let jail = build("jail").unwrap();
    passes(&images, &[("/bin/jail", &jail)], JAIL_COMMAND);
}

#[test]
#[ignore = "needs QEMU and images: cargo xtask test"]
fn slivers_pass_their_tests() {
    let images = common::images().unwrap();
    let base = images.node_files.get("base-mini.erofs").expect("images have a base");
    let machine = nested::Machine::new(&images)
        .file("/bin/sliver", &build("sliver").unwrap())
        .file("/bin/sliver-vmm", &images.binary("sliver-vmm"))
        .file("/vmlinux", &images.sliver_kernel)
        .file("/initrd", &images.sliver_initrd)
        .file("/base", base)
        .file("/etc/mke2fs.conf", Path::new("/etc/mke2fs.conf"))
        .program("/sbin/mke2fs");
    passed(machine.and_then(|machine| machine.run(SLIVER_COMMAND)));
}

#[test]
#[ignore = "needs QEMU and images: cargo xtask test"]
fn slivers_of_one_node_pass_their_tests() {
    let images = common::images().unwrap();
    let base = |name: &str| images.node_files[&format!("base-{name}.erofs")].as_path();
    let files = [
        ("lib/vmlinux", images.sliver_kernel.as_path()),
        ("lib/sliver-initrd", &images.sliver_initrd),
        ("images/base-mini.erofs", base("mini")),
        ("images/base-agent.erofs", base("agent")),
    ];
    let machine = nested::Machine::new(&images)
        .memory_mib(1536)
        .disk(8192, &files)
        .network()
        .patience(Duration::from_secs(1800))
        .file("/bin/slivers", &build("slivers").unwrap())
        .file("/bin/sliver-vmm", &images.binary("sliver-vmm"))
        .file("/bin/net-demux", &images.binary("net-demux"))
        .file("/bin/vsock-call", Path::new(env!("CARGO_BIN_EXE_vsock-call")))
        .program("/sbin/mke2fs");
    passed(machine.and_then(|machine| machine.run(NODE_COMMAND)));
}

fn passes(images: &Images, files: &[(&str, &Path)], command: &str) {
    passed(nested::run(images, files, command));
}

/// The test runner said that there were tests, and that they passed.
fn passed(run: Result<String>) {
    let said = run.unwrap_or_else(|error| panic!("{error:#}"));
    let result = said.lines().find_map(|line| line.trim().strip_prefix("test result: ok. "));
    let result = result.unwrap_or_else(|| panic!("the test runner did not say how it went:\n{said}"));
    println!("{said}");
    assert!(!result.starts_with("0 passed"), "no test was run:\n{said}");
}

/// The test binary of `vmm/tests/TARGET`. Of the whole workspace, so that what it depends on is built as `cargo test --workspace` did.
fn build(target: &str) -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(Context::from_env()?.workspace);
    cargo.args(["test", "--workspace", "--test", target, "--no-run"]);
    cargo.arg("--message-format=json-render-diagnostics");
    let output = cargo.stderr(std::process::Stdio::inherit()).output()?;
    ensure!(output.status.success(), "cargo test --no-run: {}", output.status);
    let messages = output.stdout.split(|byte| *byte == b'\n');
    let built = messages.filter_map(|line| serde_json::from_slice::<Value>(line).ok()).find_map(|m| {
        (m["target"]["name"] == target).then(|| m["executable"].as_str().map(PathBuf::from))?
    });
    built.context("cargo does not name the test's executable")
}
