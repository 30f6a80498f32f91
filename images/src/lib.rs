//! Builds everything that boots: the sliver kernel, slivers' bases, the node image and the boot CD.
//!
//! Each artifact has a recipe and lives in a content-addressed [`cache`], so a second build takes a second and a change rebuilds only
//! what depends on it. Nothing here needs root except installing missing packages. Packages and kernels come from the machine's own
//! package sources. [`build`] makes all; [`iso::write`] makes one node's CD from that.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub mod apt;
pub mod bases;
pub mod binaries;
pub mod cache;
pub mod cpio;
mod error;
pub mod hash;
pub mod host_kernel;
pub mod initramfs;
pub mod iso;
pub mod packages;
pub mod progress;
pub mod run;
pub mod sliver_kernel;

pub use error::{Error, Result};

use cache::Cache;

/// Where things are built.
#[derive(Debug, Clone)]
pub struct Context {
    /// The root of the source tree.
    pub workspace: PathBuf,
    /// Where artifacts are kept.
    pub cache: Cache,
}

impl Context {
    /// This source tree, and the user's cache: `$COMMONAGE_CACHE`, or `commonage` in `$XDG_CACHE_HOME` or `~/.cache`.
    ///
    /// # Errors
    /// When the cache cannot be made.
    pub fn from_env() -> Result<Self> {
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let root = set("COMMONAGE_CACHE")
            .or_else(|| Some(set("XDG_CACHE_HOME")?.join("commonage")))
            .or_else(|| Some(set("HOME")?.join(".cache/commonage")))
            .ok_or_else(|| {
                Error::unexpected("find the cache", "set COMMONAGE_CACHE to a directory: HOME is not set")
            })?;
        let images = Path::new(env!("CARGO_MANIFEST_DIR"));
        let workspace = images.parent().unwrap_or(images).to_owned();
        Ok(Self { workspace, cache: Cache::open(&root)? })
    }

    /// Whether this process may install packages.
    pub fn is_root() -> bool {
        rustix::process::geteuid().is_root()
    }
}

/// All that was built.
#[derive(Debug, Clone, Serialize)]
pub struct Images {
    /// The kernel that the CD boots; the node image has the same as `vmlinuz`.
    pub boot_kernel: PathBuf,
    /// What it runs: boot-cd.
    pub boot_initramfs: PathBuf,
    /// What a node installs, by name: `vmlinuz`, `initramfs`, `base-*.erofs`.
    pub node_files: BTreeMap<String, PathBuf>,
    /// The kernel of slivers.
    pub sliver_kernel: PathBuf,
    /// Their initrd: sliver-init.
    pub sliver_initrd: PathBuf,
    /// The host kernel's modules: the directory to be `/lib/modules/RELEASE`.
    pub modules: PathBuf,
    /// `uname -r` of the host kernel.
    pub kernel_release: String,
    /// Static programs, by name.
    pub binaries: BTreeMap<String, PathBuf>,
}

impl Images {
    /// Where a program is; an empty path, which nothing can start, when no package makes it.
    pub fn binary(&self, name: &str) -> PathBuf {
        self.binaries.get(name).cloned().unwrap_or_default()
    }

    /// Writes a node's CD.
    ///
    /// # Errors
    /// See [`iso::write`].
    pub fn write_iso(&self, node_json: &[u8], out: &Path) -> Result<()> {
        iso::write(&self.boot_kernel, &self.boot_initramfs, node_json, out)
    }
}

/// Builds everything that is not in the cache yet.
///
/// # Errors
/// The first step's that fails.
pub fn build(context: &Context) -> Result<Images> {
    let versions = packages::ensure(context, &[packages::BUILD])?;
    let facts = apt::facts(context)?;
    // The programs first: who has just changed one learns of a mistake before the kernel is compiled.
    let binaries = binaries::build(context)?;
    let sliver_kernel = sliver_kernel::build(context, &versions)?;
    let kernel = host_kernel::build(context, &versions, &facts)?;
    let sliver_initrd = initramfs::sliver(context, &binaries)?;
    let mut node_files = bases::build(context, &versions, &facts, &binaries)?;
    let parts = initramfs::Parts { context, versions: &versions, binaries: &binaries, kernel: &kernel };
    let boot_initramfs = parts.boot_cd()?;
    let sliver = [
        ("/usr/lib/commonage/vmlinux", sliver_kernel.as_path()),
        ("/usr/lib/commonage/sliver-initrd", sliver_initrd.as_path()),
    ];
    node_files.insert("initramfs".into(), parts.node(&sliver)?);
    node_files.insert("vmlinuz".into(), kernel.vmlinuz.clone());
    Ok(Images {
        boot_kernel: kernel.vmlinuz,
        boot_initramfs,
        node_files,
        sliver_kernel,
        sliver_initrd,
        modules: kernel.modules,
        kernel_release: kernel.release,
        binaries,
    })
}
