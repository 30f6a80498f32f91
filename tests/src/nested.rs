//! One command on a real KVM, on a machine that may have none: run by a bare node's kernel in QEMU, which emulates the virtualisation.
//!
//! The machine has busybox, the KVM modules and the files it is given, no disk and no network. It tells how the command ended on its
//! serial console, and ends.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use commonage_images::Images;
use commonage_images::cpio::Tree;

use crate::console::{Console, Mark};
use crate::node::accelerator;
use crate::process::Process;

/// How long the command may take.
const PATIENCE: Duration = Duration::from_secs(600);
/// Before the exit status of the command, on the console.
const ENDED: &str = "nested: ended with status ";

/// Runs `command`, a line for the shell, with `files` (path in the machine, path here; all executable), and returns what the console said.
///
/// # Errors
/// QEMU refuses, time is up, or the command fails; with everything that the console said.
pub fn run(images: &Images, files: &[(&str, &Path)], command: &str) -> Result<String> {
    let dir = tempfile::Builder::new().prefix("commonage-").tempdir().context("no temporary directory")?;
    let at = |name: &str| dir.path().join(name);
    initramfs(images, files, command)?.write(&at("initramfs"))?;
    let mut args: Vec<String> = Vec::new();
    let mut pair = |a: &str, b: &str| args.extend([a.to_owned(), b.to_owned()]);
    pair("-M", "q35");
    for (name, value) in accelerator() {
        pair(name, value);
    }
    pair("-m", "1024");
    pair("-display", "none");
    pair("-serial", "stdio");
    pair("-kernel", &images.boot_kernel.display().to_string());
    pair("-initrd", &at("initramfs").display().to_string());
    // Level 3: KVM logs as errors what guests try on processors that lack it.
    pair("-append", "console=ttyS0 loglevel=3 panic=-1");
    args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    let mut qemu = Process::start(Path::new("qemu-system-x86_64"), &args, &at("qemu.log"), true)?;
    let console = Console::follow(qemu.stdout().context("QEMU's output is gone")?, &at("console"))?;
    // A panic of its kernel ends the machine; one that is only told of is a guest's.
    let ended = console.wait(Mark::START, &[ENDED], &[], PATIENCE);
    let said = String::from_utf8_lossy(&std::fs::read(console.path())?).replace('\r', "");
    let ended = ended.with_context(|| format!("the console said:\n{said}\nQEMU said:\n{}", qemu.tail(20)))?;
    if !ended.ends_with(&format!("{ENDED}0")) {
        bail!("{command:?}: {ended}; the console said:\n{said}");
    }
    Ok(said)
}

fn initramfs(images: &Images, files: &[(&str, &Path)], command: &str) -> Result<Tree> {
    let mut tree = Tree::new();
    tree.directory("/proc").directory("/sys").directory("/dev").directory("/tmp");
    tree.character_device("/dev/console", 0o600, 5, 1);
    tree.file("/bin/busybox", 0o755, Path::new("/bin/busybox"));
    tree.copy(&format!("/lib/modules/{}", images.kernel_release), &images.modules)?;
    for (path, source) in files {
        tree.file(path, 0o755, source);
    }
    let init = format!(
        "#!/bin/busybox sh\nexport PATH=/bin\n/bin/busybox --install -s /bin\nmount -t proc none /proc\nmount -t sysfs none /sys\n\
         mount -t devtmpfs none /dev\nmodprobe kvm-amd || modprobe kvm-intel\n{command}\necho \"{ENDED}$?\"\npoweroff -f\n"
    );
    tree.bytes("/init", 0o755, init);
    Ok(tree)
}
