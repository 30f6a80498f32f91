//! The root file system: a read-only base that all slivers of a node share, under the sliver's own disk.
//!
//! Everything that needs no disk is mounted by [`prepare`], before there is an identity, so that clones share it; [`enter`] then mounts the
//! disk and moves all of it to its place. The initial RAM file system cannot be unmounted or pivoted away from, so the overlay is moved over
//! it and entered with `chroot`, by all threads at once: they share their root and working directories. What lies below stays mounted and
//! unreachable by path; [`Root`] keeps a way to the disk.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use commonage_init::error::{Context as _, Error, Result};
use commonage_init::mounts::mount;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;

use crate::{disk, log};

/// The shared base, an erofs image in persistent memory.
const BASE: &str = "/dev/pmem0";
/// What is mounted before there is a root, and moved to it. `/dev` and `/sys` take what is mounted in them along.
const MOVED: [&str; 4] = ["/dev", "/proc", "/sys", "/run"];
/// Directories in `/var/lib` that are the disk's own where the base has them: what they hold is layers of overlays, and those cannot lie on one.
const PLAIN: [&str; 3] = ["docker", "containerd", "containers"];
/// Devices that are for everybody, and that the kernel makes for root alone: a tunnel or a mount made with one is in the maker's own namespaces.
const FOR_EVERYBODY: [&str; 2] = ["/dev/fuse", "/dev/net/tun"];
/// How long devices have to appear. They are there at once unless the kernel probes them late.
const DEVICE_PATIENCE: Duration = Duration::from_secs(10);
/// Tables that a new file system has not written yet read as zeros anyway, so no thread need write them, which would also take the node's disk.
const DISK_OPTIONS: &str = "noinit_itable";

/// The root file system in force.
#[derive(Debug)]
pub struct Root {
    disk: OwnedFd,
}

impl Root {
    /// Where the disk is mounted, for the kernel: no path leads there any more, but a descriptor does.
    pub fn disk(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.disk.as_fd().as_raw_fd()))
    }

    /// What is the sliver's own of its root: the files that were written, and none of the base's. To be read only.
    pub fn own(&self) -> PathBuf {
        self.disk().join("upper")
    }
}

/// Mounts all that needs no disk. Only PID 1 right after the kernel started it may call this, once.
///
/// # Errors
/// A device is missing or a file system cannot be mounted.
pub fn prepare() -> Result<()> {
    let nothing_special = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let open = MountFlags::NOSUID | MountFlags::NODEV;
    let terminals = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, "mode=0755")?;
    mount("proc", "/proc", "proc", nothing_special, "")?;
    mount("sysfs", "/sys", "sysfs", nothing_special, "")?;
    mount("tmpfs", "/run", "tmpfs", open, "mode=0755")?;
    mount("devpts", "/dev/pts", "devpts", terminals, "gid=5,mode=0620,ptmxmode=666")?;
    mount("tmpfs", "/dev/shm", "tmpfs", open, "mode=1777")?;
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", nothing_special, "")?;
    for (link, to) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        match symlink(to, format!("/dev/{link}")) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                log(format_args!("cannot make /dev/{link}: {e}"))
            }
            _ => {}
        }
    }
    for device in FOR_EVERYBODY {
        if let Err(e) = fs::set_permissions(device, Permissions::from_mode(0o666)) {
            log(format_args!("cannot open {device} to everybody: {e}"));
        }
    }

    appear(BASE)?;
    // With DAX every sliver maps the host's pages of the image themselves; an image that is compressed cannot be mapped so.
    if let Err(e) = mount(BASE, "/base", "erofs", MountFlags::RDONLY, "dax=always") {
        log(format_args!("{e}; trying without DAX"));
        mount(BASE, "/base", "erofs", MountFlags::RDONLY, "")?;
    }
    make_dir("/disk")?;
    make_dir("/root")
}

/// Mounts the disk and makes it, over the base, the root. Once.
///
/// # Errors
/// A file system cannot be mounted; as long as that was the disk's or the overlay, this may be tried again.
pub fn enter() -> Result<Root> {
    mount(disk::DEVICE, "/disk", "ext4", MountFlags::NOATIME, DISK_OPTIONS)?;
    for dir in ["/disk/upper", "/disk/work"] {
        make_dir(dir)?;
    }
    mount_overlay("/disk", "/root")?;
    for name in PLAIN {
        bind_plain(name)?;
    }
    let disk = rustix::fs::open("/disk", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .what(|| "open the disk's top directory".into())?;

    for from in MOVED {
        let to = format!("/root{from}");
        make_dir(&to)?;
        rustix::mount::mount_move(from, &to).what(|| format!("move {from} to the new root"))?;
    }
    rustix::process::chdir("/root").what(|| "enter the new root".into())?;
    rustix::mount::mount_move(".", "/").what(|| "move the new root to /".into())?;
    rustix::process::chroot(".").what(|| "change to the new root".into())?;
    rustix::process::chdir("/").what(|| "enter /".into())?;
    clear_tmp(Path::new("/tmp")).what(|| "clear /tmp".into())?;
    Ok(Root { disk })
}

/// Gives a directory of `/var/lib` a place on the disk itself, if the base has it.
fn bind_plain(name: &str) -> Result<()> {
    if !Path::new("/base/var/lib").join(name).is_dir() {
        return Ok(());
    }
    let (from, to) = (format!("/disk/{name}"), format!("/root/var/lib/{name}"));
    make_dir(&from)?;
    fs::set_permissions(&from, Permissions::from_mode(0o711)).what(|| format!("set the mode of {from}"))?;
    rustix::mount::mount_bind(&from, &to).what(|| format!("mount {from} at {to}"))
}

/// Mounts the base with `upper` in the directory `over` on top of it.
///
/// # Errors
/// The kernel refuses.
pub fn mount_overlay(over: &str, at: &str) -> Result<()> {
    let layers = format!("lowerdir=/base,upperdir={over}/upper,workdir={over}/work");
    mount("overlay", at, "overlay", MountFlags::NOATIME, &layers)
}

/// `/tmp` is on the disk, not in memory, of which a sliver has little; it starts empty all the same.
fn clear_tmp(tmp: &Path) -> io::Result<()> {
    const MODE: u32 = 0o1777;
    fs::create_dir_all(tmp)?;
    // What a base has right already is not copied.
    if fs::symlink_metadata(tmp)?.permissions().mode() & 0o7777 != MODE {
        fs::set_permissions(tmp, Permissions::from_mode(MODE))?;
    }
    for entry in fs::read_dir(tmp)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?
        } else {
            fs::remove_file(entry.path())?
        }
    }
    Ok(())
}

/// Makes a directory and its parents, unless they are there.
///
/// # Errors
/// The kernel refuses.
pub fn make_dir(path: &str) -> Result<()> {
    fs::create_dir_all(path).what(|| format!("make the directory {path}"))
}

/// Waits until a device is there.
///
/// # Errors
/// It does not come.
pub fn appear(device: &str) -> Result<()> {
    let end = Instant::now() + DEVICE_PATIENCE;
    while !Path::new(device).exists() {
        if Instant::now() > end {
            let why = "the machine's configuration lacks it, or the kernel its driver";
            return Err(Error::TimedOut(format!("{device} has not appeared: {why}")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tmp_is_cleared_and_links_in_it_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (tmp, kept) = (dir.path().join("tmp"), dir.path().join("kept"));
        fs::create_dir_all(tmp.join("a/b")).unwrap();
        fs::write(&kept, "x").unwrap();
        symlink(&kept, tmp.join("link")).unwrap();
        clear_tmp(&tmp).unwrap();
        assert_eq!(fs::read_dir(&tmp).unwrap().count(), 0);
        assert_eq!(fs::metadata(&tmp).unwrap().permissions().mode() & 0o7777, 0o1777);
        assert!(kept.exists());
    }
}
