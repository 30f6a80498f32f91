//! What the sliver kernel promises, seen in a real sliver's machine: every facility by Debian's own tools, then podman and Docker.
//!
//! The machine is `sliver-vmm`'s, inside an emulated node; its root is made as sliver-init makes it, of the base `containers` and a disk. The
//! scripts that it runs are in `guest/`.

mod common;

use std::path::Path;

use commonage_images::cpio::Tree;
use commonage_images::{Context, bases};
use commonage_testbed::nested;
use commonage_vmm_api::{DiskConfig, MachineConfig, Start};

/// The machine's memory: what Docker and a few containers need.
const MEMORY_MIB: u32 = 768;
/// The machine's disk is sparse.
const COMMAND: &str = "truncate -s 4G /disk/sliver.img && sliver-vmm run --config /machine.json | tee /tmp/said; \
     grep -q 'sliver: the test ended with status 0' /tmp/said";

#[test]
#[ignore = "needs QEMU and images: cargo xtask test"]
fn a_sliver_can_do_what_a_server_can() {
    let images = common::images().unwrap();
    let base = bases::containers(&Context::from_env().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let script = concat!(
        include_str!("../guest/facilities.sh"),
        include_str!("../guest/containers.sh"),
        "[ $failed = 0 ] && [ $status = 0 ]\n"
    );
    let mut initrd = Tree::new();
    initrd.file("/bin/busybox", 0o755, Path::new("/bin/busybox"));
    initrd.bytes("/init", 0o755, include_str!("../guest/init.sh")).bytes("/test", 0o644, script);
    initrd.character_device("/dev/console", 0o600, 5, 1);
    initrd.write(&at("initrd")).unwrap();
    let config = MachineConfig {
        start: Start::Boot {
            kernel: "/vmlinux".into(),
            initrd: Some("/initrd".into()),
            cmdline: String::new(),
        },
        memory_mib: MEMORY_MIB,
        vcpus: 1,
        base: Some("/disk/base".into()),
        disk: Some(DiskConfig { path: "/disk/sliver.img".into(), rate: None }),
        net: None,
        vsock: None,
        balloon: false,
        console: None,
        control: None,
        jail: None,
    };
    std::fs::write(at("machine.json"), serde_json::to_vec(&config).unwrap()).unwrap();

    let vmm = images.binary("sliver-vmm");
    let said = nested::Machine::new(&images)
        .memory_mib(2048)
        .disk(6 << 10, &[("base", &base)])
        .file("/vmlinux", &images.sliver_kernel)
        .file("/initrd", &at("initrd"))
        .file("/machine.json", &at("machine.json"))
        .file("/bin/sliver-vmm", &vmm)
        .run(COMMAND)
        .unwrap_or_else(|error| panic!("{error:#}"));
    println!("{said}");
    let failed: Vec<&str> = said.lines().filter(|line| line.starts_with("FAILED ")).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let passed = said.lines().filter(|line| line.starts_with("ok ")).count();
    assert!(passed > 150, "only {passed} checks were made:\n{said}");
}
