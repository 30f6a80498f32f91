//! The node's kernel: Debian's packaged cloud kernel, downloaded from the machine's sources and unpacked, not installed.
//!
//! Of its modules those are kept that a node can need: disks, networks, virtualisation, and whatever those depend on.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Context;
use crate::apt::{self, Facts};
use crate::cache::{Build, Recipe};
use crate::error::{Error, IoContext as _, Result};
use crate::packages::Versions;

/// Folders, under the modules' `kernel/`, of what a node may need.
const FOLDERS: &[&str] = &[
    // Checksums of ext4 by the processor's own instruction; the kernel has the slow way built in.
    "arch/x86/crypto/crc32c-intel.ko",
    "arch/x86/kvm/",
    "drivers/acpi/button.ko",
    "drivers/ata/",
    "drivers/block/virtio_blk.ko",
    "drivers/block/xen-blkfront.ko",
    "drivers/char/hw_random/",
    "drivers/hv/",
    "drivers/input/evdev.ko",
    "drivers/net/ethernet/",
    "drivers/net/hyperv/",
    "drivers/net/net_failover.ko",
    "drivers/net/tun.ko",
    "drivers/net/virtio_net.ko",
    "drivers/net/vmxnet3/",
    "drivers/net/xen-netfront.ko",
    "drivers/nvme/host/",
    "drivers/ptp/",
    "drivers/scsi/",
    "drivers/virtio/",
    "fs/ext4/",
    "fs/jbd2/",
    "lib/libcrc32c.ko",
    "virt/",
];

/// What it is made of.
#[derive(Debug, Clone)]
pub struct HostKernel {
    /// The bootable kernel.
    pub vmlinuz: PathBuf,
    /// The directory to be `/lib/modules/RELEASE`: modules, `modules.dep`, `modules.alias`.
    pub modules: PathBuf,
    /// `uname -r` of it.
    pub release: String,
    /// Names it in other recipes.
    pub(crate) id: String,
}

/// Downloads it.
///
/// # Errors
/// When the sources don't have it.
pub fn build(context: &Context, versions: &Versions, facts: &Facts) -> Result<HostKernel> {
    let recipe = Recipe::new("host-kernel", 1)
        .input("package", &facts.kernel_package)
        .input("version", &facts.kernel_version)
        .input("modules", FOLDERS.join(" "))
        .input("depmod", versions.of("kmod"));
    let entry = context.cache.get(&recipe, |b| unpack(b, facts))?;
    let modules = entry.path("modules");
    let release = only_child(&modules)?;
    Ok(HostKernel {
        vmlinuz: entry.path("vmlinuz"),
        modules: modules.join(&release),
        release,
        id: entry.name(),
    })
}

fn unpack(build: &Build<'_>, facts: &Facts) -> Result<()> {
    let mut download = apt::command("apt-get");
    download.current_dir(build.scratch).arg("download");
    download.arg(format!("{}={}", facts.kernel_package, facts.kernel_version));
    let what =
        "download the host kernel (if it is gone from the mirror, `apt-get update` finds its successor)";
    build.log.run(what, &mut download)?;
    let package = build.scratch.join(only_child(build.scratch)?);
    let tree = build.scratch.join("tree");
    build.log.run("unpack the host kernel", Command::new("dpkg-deb").arg("-x").arg(&package).arg(&tree))?;

    let all = tree.join("lib/modules");
    let release = only_child(&all)?;
    copy(&tree.join(format!("boot/vmlinuz-{release}")), &build.out.join("vmlinuz"))?;

    // depmod of all modules tells what the chosen ones depend on; depmod of the chosen ones is for the node.
    build.log.run("depmod", Command::new(depmod()).arg("-b").arg(&tree).arg(&release))?;
    let from = all.join(&release);
    let dependencies = from.join("modules.dep");
    let dependencies = std::fs::read_to_string(&dependencies).doing("read", &dependencies)?;
    let chosen = choose(&dependencies, FOLDERS);
    if !chosen.iter().any(|m| m.ends_with("/kvm-amd.ko"))
        || !chosen.iter().any(|m| m.ends_with("/virtio_net.ko"))
    {
        let why = format!("it has no kvm-amd.ko or virtio_net.ko; see `FOLDERS` in {}", file!());
        return Err(Error::unexpected(format!("choose modules of {}", facts.kernel_package), why));
    }
    let small = build.scratch.join("small");
    let to = small.join("lib/modules").join(&release);
    for name in chosen.into_iter().chain(["modules.builtin", "modules.builtin.modinfo", "modules.order"]) {
        copy(&from.join(name), &to.join(name))?;
    }
    build.log.run("depmod", Command::new(depmod()).arg("-b").arg(&small).arg(&release))?;
    let kept = build.out.join("modules");
    std::fs::rename(small.join("lib/modules"), &kept).doing("move", &kept)
}

/// It is in `/sbin`, which an ordinary user's path may lack.
fn depmod() -> &'static str {
    if Path::new("/usr/sbin/depmod").exists() { "/usr/sbin/depmod" } else { "/sbin/depmod" }
}

/// Modules in `folders` and, transitively, what they need, from the text of `modules.dep`.
fn choose<'a>(dependencies: &'a str, folders: &[&str]) -> BTreeSet<&'a str> {
    let needs: BTreeMap<&str, &str> = dependencies.lines().filter_map(|l| l.split_once(':')).collect();
    let wanted =
        |m: &&str| m.strip_prefix("kernel/").is_some_and(|m| folders.iter().any(|f| m.starts_with(f)));
    let mut chosen = BTreeSet::new();
    let mut waiting: Vec<&str> = needs.keys().copied().filter(wanted).collect();
    while let Some(module) = waiting.pop() {
        if chosen.insert(module) {
            waiting.extend(needs.get(module).into_iter().flat_map(|n| n.split_whitespace()));
        }
    }
    chosen
}

fn only_child(directory: &Path) -> Result<String> {
    let mut names = std::fs::read_dir(directory).doing("list", directory)?.flatten().map(|e| e.file_name());
    match (names.next(), names.next()) {
        (Some(name), None) => Ok(name.to_string_lossy().into_owned()),
        _ => Err(Error::unexpected(
            format!("look into {}", directory.display()),
            "there is not exactly one thing in it",
        )),
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent).doing("create", parent)?;
    }
    std::fs::copy(from, to).doing("copy", from).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_modules_bring_what_they_need() {
        let dependencies = "kernel/drivers/net/virtio_net.ko: kernel/drivers/net/failover.ko kernel/drivers/virtio/virtio.ko\n\
                            kernel/drivers/net/failover.ko: kernel/net/core/x.ko\n\
                            kernel/net/core/x.ko:\n\
                            kernel/sound/y.ko:\n\
                            kernel/drivers/virtio/virtio.ko:\n";
        let chosen = choose(dependencies, &["drivers/net/virtio_net.ko"]);
        let expected = [
            "kernel/drivers/net/failover.ko",
            "kernel/drivers/net/virtio_net.ko",
            "kernel/drivers/virtio/virtio.ko",
            "kernel/net/core/x.ko",
        ];
        assert_eq!(chosen.into_iter().collect::<Vec<_>>(), expected);
    }
}
