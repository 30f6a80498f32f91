//! The node's disk: finds it, partitions it if it must be, makes file systems.
//!
//! [`plan`] decides from descriptions alone; this file looks at the disks and does what was decided.

pub mod plan;
mod table;

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    process::Command,
};

use commonage_init::{interface::natural, mounts, say};
use rustix::mount::MountFlags;

use crate::{
    ME,
    boot::Devices,
    error::{Error, Result},
};
use plan::{Action, IMAGE_LABEL, STATE_LABEL};

const BLOCK: &str = "/sys/block";

/// Whole disks that a machine has for good, in order of names. Loop devices, RAM disks, CD drives and what can be
/// pulled out are none.
pub fn names() -> Vec<String> {
    let fixed = |name: &String| {
        let path = Path::new(BLOCK).join(name);
        let attribute = |a: &str| std::fs::read_to_string(path.join(a)).unwrap_or_default().trim().to_owned();
        path.join("device").exists()
            && attribute("removable") == "0"
            && attribute("ro") == "0"
            && !name.starts_with("sr")
            && !name.starts_with("fd")
    };
    let entries = std::fs::read_dir(BLOCK).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|e| e.file_name().into_string().ok()).filter(fixed).collect();
    names.sort_by_key(|n| natural(n));
    names
}

/// A disk's size in bytes; 0 if it is gone.
pub fn size(name: &str) -> u64 {
    let sectors = std::fs::read_to_string(Path::new(BLOCK).join(name).join("size")).unwrap_or_default();
    // Always in units of 512 bytes, whatever the disk's own are.
    sectors.trim().parse::<u64>().unwrap_or(0).saturating_mul(512)
}

/// Makes sure that both partitions and their file systems are there. Returns the image partition's device.
pub fn partition(min_mib: u64, image_mib: u64, devices: &mut Devices) -> Result<PathBuf> {
    let enough = || Ok(names().iter().any(|n| size(n) >> 20 >= min_mib).then_some(()));
    devices.wait_for(enough)?;
    let disks: Vec<_> = names().into_iter().map(table::describe).collect::<Result<_>>()?;
    let plan = plan::plan(&disks, min_mib, image_mib)?;
    match &plan.action {
        Action::Keep => say!(ME, "{}: partitions are right", plan.disk.name),
        Action::Rewrite { add } => {
            say!(ME, "{}: new partition table, {} partitions", plan.disk.name, add.len())
        }
        Action::Change { remove, add } => {
            say!(
                ME,
                "{}: {} partitions removed, {} added; the state stays",
                plan.disk.name,
                remove.len(),
                add.len()
            );
        }
    }
    table::apply(plan.disk, &plan.action)?;
    let mut ready = |label: &'static str| {
        // As soon as the kernel has read the new table.
        let found = devices.wait_for(|| mounts::partition(label, Some(&plan.disk.name)))?;
        let why = || format!("the kernel finds no partition {label} on it");
        let missing = || Error::Table { disk: plan.disk.name.clone(), why: why() };
        let device = found.ok_or_else(missing)?.device;
        if plan.action.adds(label) {
            make_file_system(&device, label)?;
            return Ok(device);
        }
        match read_label(&device)? {
            Found::Label(found) if found == label => {}
            // Tenants' disks may be in there. Somebody has to look.
            Found::Label(found) if label == STATE_LABEL => {
                let why = format!("its state partition has an ext4 file system labelled {found:?}");
                return Err(Error::Table { disk: plan.disk.name.clone(), why });
            }
            Found::Label(_) | Found::Nothing => make_file_system(&device, label)?,
        }
        Ok(device)
    };
    ready(STATE_LABEL)?;
    ready(IMAGE_LABEL)
}

/// Mounts the image partition for writing. It holds nothing that PLC has not, so if it cannot be mounted it is made anew.
pub fn mount_image(device: &Path, target: &str) -> Result<()> {
    let path = device.to_string_lossy();
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
    if let Err(e) = mounts::mount(&path, target, "ext4", flags, "") {
        say!(ME, "warning: {e}; the image partition is made anew");
        make_file_system(device, IMAGE_LABEL)?;
        mounts::mount(&path, target, "ext4", flags, "")?;
    }
    Ok(())
}

fn make_file_system(device: &Path, label: &str) -> Result<()> {
    let path = device.display().to_string();
    say!(ME, "{path}: making file system {label}");
    let failed = |why: String| Error::Mke2fs { device: path.clone(), why };
    let mut command = Command::new("/sbin/mke2fs");
    // No part is reserved for root: nobody else writes there.
    command.args(["-q", "-F", "-t", "ext4", "-m", "0", "-L", label]).arg(device);
    let done = command.output().map_err(|e| failed(e.to_string()))?;
    if done.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&done.stderr).trim().replace('\n', "; ");
    Err(failed(format!("{}: {words}", done.status)))
}

/// What is on a partition.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// An ext4 file system with this label.
    Label(String),
    /// No ext4 file system.
    Nothing,
}

/// Looks what is on a partition. That it can't be read is an error, and not taken for nothing.
fn read_label(device: &Path) -> Result<Found> {
    let mut superblock = [0; 1024];
    let read = |superblock: &mut [u8]| -> io::Result<()> {
        let mut file = File::open(device)?;
        file.seek(SeekFrom::Start(1024))?;
        file.read_exact(superblock)
    };
    read(&mut superblock).map_err(|e| Error::io(format!("read {}", device.display()), e))?;
    Ok(label(&superblock).map_or(Found::Nothing, Found::Label))
}

/// `s_magic` is at 0x38 and `s_volume_name`, 16 bytes, at 0x78 of the superblock.
fn label(superblock: &[u8; 1024]) -> Option<String> {
    if superblock.get(0x38..0x3a)? != [0x53, 0xef] {
        return None;
    }
    let name = superblock.get(0x78..0x88)?;
    let name = name.split(|b| *b == 0).next()?;
    Some(String::from_utf8_lossy(name).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_label() {
        let mut superblock = [0; 1024];
        superblock[0x78..0x87].copy_from_slice(IMAGE_LABEL.as_bytes());
        assert_eq!(label(&superblock), None);
        superblock[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
        assert_eq!(label(&superblock).as_deref(), Some(IMAGE_LABEL));
        superblock[0x78..0x88].fill(0xff);
        assert_ne!(label(&superblock).as_deref(), Some(IMAGE_LABEL));
    }
}
