//! A CD boots by BIOS and by UEFI, and its `/init` sees both archives: the release's and the node's.
#![expect(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not know helpers of tests")]

use std::path::Path;
use std::process::{Command, Stdio};

use commonage_images::cpio::Tree;
use commonage_images::{Context, apt, host_kernel, iso, packages};

const INIT: &str = "#!/bin/busybox sh\n\
    /bin/busybox mount -t proc none /proc\n\
    echo \"CD SAYS $(/bin/busybox cat /etc/commonage/node.json) $(/bin/busybox wc -c < /padding)\" > /dev/ttyS0\n\
    /bin/busybox poweroff -f\n";

/// Boots a CD made just now; returns what the serial line said.
fn boot(firmware: &[&str]) -> String {
    let context = Context::from_env().unwrap();
    let versions = packages::ensure(&context, &[packages::BUILD, packages::MACHINES]).unwrap();
    let kernel = host_kernel::build(&context, &versions, &apt::facts(&context).unwrap()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);

    let mut tree = Tree::new();
    tree.directory("/proc").character_device("/dev/console", 0o600, 5, 1).character_device(
        "/dev/ttyS0",
        0o600,
        4,
        64,
    );
    tree.file("/bin/busybox", 0o755, Path::new("/bin/busybox")).bytes("/init", 0o755, INIT);
    // As much as a real one carries, and not to be compressed away.
    let noise: Vec<u8> = (0..4_000_003_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    tree.bytes("/padding", 0o644, noise);
    tree.write(&at("initramfs.cpio")).unwrap();
    let mut zstd = Command::new("zstd");
    assert!(
        zstd.args(["-q", "-9"])
            .arg(at("initramfs.cpio"))
            .arg("-o")
            .arg(at("initramfs"))
            .status()
            .unwrap()
            .success()
    );
    iso::write(&kernel.vmlinuz, &at("initramfs"), b"{\"node\":7}", &at("cd.iso")).unwrap();

    let output = Command::new("timeout")
        .args([
            "180",
            "qemu-system-x86_64",
            "-M",
            "q35",
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-smp",
            "1",
            "-m",
            "1024",
        ])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .args(firmware)
        .arg("-cdrom")
        .arg(at("cd.iso"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn boots_by_bios() {
    let console = boot(&[]);
    assert!(console.contains("CD SAYS {\"node\":7} 4000003"), "{console}");
}

#[test]
#[ignore = "needs QEMU and OVMF: cargo xtask test"]
fn boots_by_uefi() {
    let console = boot(&["-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE.fd"]);
    assert!(console.contains("CD SAYS {\"node\":7} 4000003"), "{console}");
}
