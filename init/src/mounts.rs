//! The file systems that every Linux needs before anything else works, and partitions found by their label.
//!
//! Mounting what is mounted already is a success: a phase that failed may be run again.

use std::{
    ffi::CString,
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags},
};

use crate::{
    error::{self, Context as _, Result},
    interface::natural,
};

/// Mounts a file system, making the directory if it is not there.
///
/// # Errors
/// When the kernel refuses.
pub fn mount(source: &str, target: &str, kind: &str, flags: MountFlags, options: &str) -> Result<()> {
    std::fs::create_dir_all(target).what(|| format!("make directory {target}"))?;
    let options = CString::new(options).map_err(|_| Errno::INVAL);
    let mounted = options.and_then(|o| rustix::mount::mount(source, target, kind, flags, Some(o.as_c_str())));
    match mounted {
        Err(Errno::BUSY) => Ok(()),
        mounted => mounted.what(|| format!("mount {source} at {target} as {kind}")),
    }
}

/// Mounts `/proc`, `/sys`, `/dev` with `pts` and `shm`, `/run` and `/tmp`.
///
/// # Errors
/// When the kernel refuses.
pub fn mount_api() -> Result<()> {
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let device = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("proc", "/proc", "proc", quiet, "")?;
    mount("sysfs", "/sys", "sysfs", quiet, "")?;
    mount("devtmpfs", "/dev", "devtmpfs", device, "mode=0755")?;
    mount("devpts", "/dev/pts", "devpts", device, "gid=5,mode=620,ptmxmode=666")?;
    mount("tmpfs", "/dev/shm", "tmpfs", quiet, "mode=1777")?;
    mount("tmpfs", "/run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=0755")?;
    mount("tmpfs", "/tmp", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=1777")
}

/// Mounts the cgroup hierarchy (version 2) at `/sys/fs/cgroup`. `favordynmods`: a process that joins a group need not wait for all processors to
/// have been idle once, which was a tenth of the time to make a clone; forks and exits, of which a node has few, pay for it.
///
/// # Errors
/// When the kernel refuses.
pub fn mount_cgroup2() -> Result<()> {
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", quiet, "nsdelegate,memory_recursiveprot,favordynmods")
}

/// Unmounts; what is not mounted is a success.
///
/// # Errors
/// [`libc::EBUSY`] when something there is still used.
pub fn unmount(target: &str) -> Result<()> {
    match rustix::mount::unmount(target, UnmountFlags::empty()) {
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        done => done.what(|| format!("unmount {target}")),
    }
}

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Its device: `/dev/vda2`.
    pub device: PathBuf,
    /// The disk's name: `vda`.
    pub disk: String,
}

/// The GPT partition with this label, as far as the kernel has found it, on a certain disk or on the first that has one.
/// A machine may have a second disk that was once another node's: what belongs together is on one disk.
///
/// # Errors
/// When `/sys` is not mounted.
pub fn partition(label: &str, on: Option<&str>) -> Result<Option<Partition>> {
    let class = Path::new("/sys/class/block");
    let entries = std::fs::read_dir(class).what(|| format!("list {}", class.display()))?;
    let mut names: Vec<_> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort_by_key(|name| natural(name));
    // A device may vanish between the listing and the reading.
    let found = names.iter().find_map(|name| {
        let uevent = error::read(class.join(name).join("uevent")).ok()?;
        let disk = disk_of(&std::fs::canonicalize(class.join(name)).ok()?)?;
        let right = property(&uevent, "PARTNAME") == Some(label) && on.is_none_or(|on| on == disk);
        right.then(|| Partition { device: Path::new("/dev").join(name), disk })
    });
    Ok(found)
}

/// `/sys/devices/…/block/vda/vda2` is on `vda`.
fn disk_of(path: &Path) -> Option<String> {
    Some(path.parent()?.file_name()?.to_str()?.to_owned())
}

/// The value of `KEY=value` in the lines of a `uevent` file.
pub fn property<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_property() {
        let text = "MAJOR=254\nDEVNAME=vda2\nPARTN=2\nPARTNAME=commonage-state\n";
        assert_eq!(property(text, "PARTNAME"), Some("commonage-state"));
        assert_eq!(property(text, "PART"), None);
        assert_eq!(property("", "PARTN"), None);
    }
}
