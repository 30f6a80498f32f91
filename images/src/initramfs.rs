//! What runs from memory: the boot CD's and the node's initramfs (one static program as `/init`, kernel modules, mke2fs),
//! and the sliver's initrd (nothing but sliver-init).
//!
//! Compressed ones are padded with zeros to a multiple of 4 bytes, so that another archive (the node's configuration) may be appended.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Context;
use crate::cache::{Build, Recipe};
use crate::cpio::Tree;
use crate::error::{Error, IoContext as _, Result};
use crate::host_kernel::HostKernel;
use crate::packages::Versions;

/// Decompression costs the same at every level; this one compresses in a few seconds.
const LEVEL: &str = "-9";
/// What makes an ext4 file system, and its defaults.
const MKE2FS: &str = "/sbin/mke2fs";
const MKE2FS_CONFIG: &str = "/etc/mke2fs.conf";

/// Programs by name.
pub type Binaries = BTreeMap<String, PathBuf>;

/// What both machines' initramfs are made of.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// The cache.
    pub context: &'a Context,
    /// Of the packages that tools come from.
    pub versions: &'a Versions,
    /// Our programs.
    pub binaries: &'a Binaries,
    /// For its modules.
    pub kernel: &'a HostKernel,
}

impl Parts<'_> {
    /// The boot CD's: `/init` is boot-cd.
    ///
    /// # Errors
    /// When something that goes into it is missing.
    pub fn boot_cd(&self) -> Result<PathBuf> {
        self.pack("boot-initramfs", &[("/init", "boot-cd")], &[])
    }

    /// The node's: `/init` is node-init. `files` are added: path in it, path here.
    ///
    /// # Errors
    /// When something that goes into it is missing.
    pub fn node(&self, files: &[(&str, &Path)]) -> Result<PathBuf> {
        let programs = [
            ("/init", "node-init"),
            ("/bin/nodemgr", "nodemgr"),
            ("/bin/net-demux", "net-demux"),
            ("/bin/sliver-vmm", "sliver-vmm"),
        ];
        self.pack("node-initramfs", &programs, files)
    }

    fn pack(&self, kind: &str, programs: &[(&str, &str)], files: &[(&str, &Path)]) -> Result<PathBuf> {
        let mut tree = Tree::new();
        machine(&mut tree, self.kernel)?;
        let mut recipe = Recipe::new(kind, 1)
            .input("kernel", &self.kernel.id)
            .input("mke2fs", self.versions.of("e2fsprogs"))
            .input("compressor", format!("{} {LEVEL}", self.versions.of("zstd")));
        for (path, name) in programs {
            let program = program(self.binaries, name)?;
            recipe = recipe.file(*path, program)?;
            tree.file(path, 0o755, program);
        }
        for (path, source) in files {
            recipe = recipe.file(*path, source)?;
            tree.file(path, 0o644, source);
        }
        let entry = self.context.cache.get(&recipe, |build| {
            dynamic(&mut tree, build, MKE2FS)?;
            let archive = build.scratch.join("initramfs.cpio");
            tree.write(&archive)?;
            compress(build, &archive, &build.out.join("initramfs"))
        })?;
        Ok(entry.path("initramfs"))
    }
}

/// The sliver's: `/init` is sliver-init. Not compressed: unpacking costs a sliver's boot more than copying a megabyte does.
///
/// # Errors
/// When something that goes into it is missing.
pub fn sliver(context: &Context, binaries: &Binaries) -> Result<PathBuf> {
    let init = program(binaries, "sliver-init")?;
    let recipe = Recipe::new("sliver-initrd", 1).file("sliver-init", init)?;
    let entry = context.cache.get(&recipe, |build| {
        let mut tree = Tree::new();
        skeleton(&mut tree);
        tree.file("/init", 0o755, init);
        tree.write(&build.out.join("sliver-initrd")).map(drop)
    })?;
    Ok(entry.path("sliver-initrd"))
}

/// What every machine has that runs from memory: mount points, modules, mke2fs's configuration.
fn machine(tree: &mut Tree, kernel: &HostKernel) -> Result<()> {
    skeleton(tree);
    for directory in ["/etc", "/run", "/tmp", "/root", "/image", "/state"] {
        tree.directory(directory);
    }
    tree.copy(&format!("/lib/modules/{}", kernel.release), &kernel.modules)?;
    tree.file(MKE2FS_CONFIG, 0o644, Path::new(MKE2FS_CONFIG));
    Ok(())
}

/// The kernel opens /dev/console before anything is mounted.
fn skeleton(tree: &mut Tree) {
    tree.directory("/proc").directory("/sys").directory("/dev");
    tree.character_device("/dev/console", 0o600, 5, 1).character_device("/dev/null", 0o666, 1, 3);
}

/// Adds a dynamically linked program of this machine with its loader and libraries, each where the program looks for it.
fn dynamic(tree: &mut Tree, build: &Build<'_>, program: &str) -> Result<()> {
    let libraries = build.log.output("list a program's libraries", Command::new("ldd").arg(program))?;
    // Lines are `libext2fs.so.2 => /lib/…/libext2fs.so.2 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`, `linux-vdso.so.1 (0x…)`.
    let paths: Vec<&str> = libraries
        .lines()
        .filter_map(|l| l.rsplit("=>").next()?.split_whitespace().next().filter(|w| w.starts_with('/')))
        .collect();
    if paths.is_empty() {
        return Err(Error::unexpected(
            format!("list the libraries of {program}"),
            format!("ldd says:\n{libraries}"),
        ));
    }
    for path in paths.into_iter().chain([program]) {
        tree.file(path, 0o755, Path::new(path));
    }
    Ok(())
}

fn compress(build: &Build<'_>, from: &Path, to: &Path) -> Result<()> {
    let mut zstd = Command::new("zstd");
    // The number of threads is fixed because the output depends on whether there is more than one.
    zstd.args(["--quiet", "--no-progress", "-T2", LEVEL]).arg(from).arg("-o").arg(to);
    build.log.run("compress an initramfs", &mut zstd)?;
    let length = to.metadata().doing("look at", to)?.len();
    let file = std::fs::File::options().write(true).open(to).doing("open", to)?;
    file.set_len(length.next_multiple_of(4)).doing("pad", to)
}

fn program<'a>(binaries: &'a Binaries, name: &str) -> Result<&'a Path> {
    let path = binaries.get(name).map(PathBuf::as_path);
    path.ok_or_else(|| {
        Error::unexpected(format!("find the program {name}"), "no package of the workspace makes it")
    })
}
