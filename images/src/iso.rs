//! The boot CD of one node: a hybrid image that boots by BIOS and by UEFI, from CD, USB stick or disk.
//!
//! It carries the host kernel, boot-cd's initramfs and, as a second archive, the node's configuration; so all CDs of a release differ
//! in one small file, and writing one takes seconds and needs no root.

use std::path::Path;
use std::process::Command;

use crate::cpio::Tree;
use crate::error::{Error, IoContext as _, Result};
use crate::run::Log;

/// Where boot-cd and the node expect their configuration.
pub const NODE_CONFIG: &str = "/etc/commonage/node.json";

/// The kernel's command line. The last console is what /dev/console is: the serial line, which is there when no screen is.
const COMMAND_LINE: &str = "console=tty0 console=ttyS0 quiet panic=10";

/// Only these parts of GRUB go onto the CD: what reads the CD, talks, and boots Linux.
const MODULES: &str = "iso9660 part_msdos part_gpt normal linux serial terminal search test echo all_video";

/// Writes the CD of the node that `node_json` (a `NodeConfig`) describes to `out`.
///
/// # Errors
/// When a file is missing or grub-mkrescue fails.
pub fn write(boot_kernel: &Path, boot_initramfs: &Path, node_json: &[u8], out: &Path) -> Result<()> {
    let scratch =
        tempfile::Builder::new().prefix("commonage-iso-").tempdir().doing("create", &std::env::temp_dir())?;
    let boot = scratch.path().join("cd/boot");
    let grub = boot.join("grub");
    std::fs::create_dir_all(&grub).doing("create", &grub)?;
    for (from, name) in [(boot_kernel, "vmlinuz"), (boot_initramfs, "boot-cd.img")] {
        std::fs::copy(from, boot.join(name)).doing("copy", from)?;
    }
    let mut node = Tree::new();
    node.bytes(NODE_CONFIG, 0o600, node_json);
    node.write(&boot.join("node.cpio"))?;
    let configuration = grub.join("grub.cfg");
    std::fs::write(&configuration, grub_configuration()).doing("write", &configuration)?;

    // Written beside and renamed, so that a CD that is there is whole.
    let directory = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let image = tempfile::Builder::new()
        .prefix(".iso-")
        .tempfile_in(directory)
        .doing("create a file in", directory)?;
    let log = Log::create(&scratch.path().join("log"))?;
    let mut mkrescue = Command::new("grub-mkrescue");
    mkrescue.arg("--output").arg(image.path()).arg(format!("--install-modules={MODULES}"));
    mkrescue.args(["--fonts=", "--locales=", "--themes="]).arg(scratch.path().join("cd"));
    log.run("write the boot CD (grub-mkrescue needs grub-common, grub-pc-bin, grub-efi-amd64-bin, xorriso, mtools)", &mut mkrescue)?;
    if image.path().metadata().doing("look at", image.path())?.len() == 0 {
        return Err(Error::unexpected(
            "write the boot CD",
            "grub-mkrescue succeeded and wrote nothing; is xorriso installed?",
        ));
    }
    image.persist(out).map_err(|e| e.error).doing("rename into place", out).map(drop)
}

fn grub_configuration() -> String {
    format!(
        "serial --unit=0 --speed=115200\n\
         terminal_input console serial\n\
         terminal_output console serial\n\
         set timeout=0\n\
         menuentry 'Commonage' {{\n\
         \x20 linux /boot/vmlinuz {COMMAND_LINE}\n\
         \x20 initrd /boot/boot-cd.img /boot/node.cpio\n\
         }}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grub_loads_both_archives() {
        let text = grub_configuration();
        assert!(text.contains("\n  initrd /boot/boot-cd.img /boot/node.cpio\n}\n"), "{text}");
        assert!(text.contains("console=ttyS0 quiet panic=10\n"));
    }
}
