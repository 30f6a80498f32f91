//! Where things are on the node: what a node image has, unless the command line says otherwise.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;

/// Where things are on the node.
#[derive(Debug, Clone, Args)]
pub struct Places {
    /// Bases: base-NAME.erofs.
    #[arg(long, default_value = "/disk/images")]
    pub images: PathBuf,
    /// The sliver kernel (vmlinux) and initrd (sliver-initrd).
    #[arg(long, default_value = "/disk/lib")]
    pub lib: PathBuf,
    /// Slivers' disks; on a real file system, not in memory.
    #[arg(long, default_value = "/disk/state")]
    pub state: PathBuf,
    /// Sockets and templates.
    #[arg(long, default_value = "/run/commonage")]
    pub run: PathBuf,
    /// The machine program.
    #[arg(long, default_value = "/bin/sliver-vmm")]
    pub vmm: PathBuf,
    /// The network's program.
    #[arg(long, default_value = "/bin/net-demux")]
    pub net_demux: PathBuf,
    /// Makes file systems.
    #[arg(long, default_value = "/sbin/mke2fs")]
    pub mke2fs: PathBuf,
    /// Where cgroup2 is mounted, or a group of it that is ours.
    #[arg(long, default_value = "/sys/fs/cgroup")]
    pub cgroups: PathBuf,
    /// The network card.
    #[arg(long, default_value = "eth0")]
    pub nic: String,
    /// QEMU.
    #[arg(long, default_value = "/usr/bin/qemu-system-x86_64")]
    pub qemu: PathBuf,
}

impl Places {
    /// Makes the directories that are written to.
    pub fn make(&self) -> Result<()> {
        for dir in [&self.run, &self.state] {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(())
    }
}
