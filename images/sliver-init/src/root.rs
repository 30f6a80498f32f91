//! The root file system: a read-only base that all slivers of a node share, under the sliver's own disk.
//!
//! The initial RAM file system cannot be unmounted or pivoted away from, so the overlay is moved over it and entered with `chroot`. What
//! lies below stays mounted and unreachable by path; [`Root::disk`] keeps a way to it.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use commonage_init::error::{Context as _, Error, Result};
use commonage_init::mounts::mount;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;

use crate::log;

/// The shared base, an erofs image in persistent memory, and the sliver's own disk, ext4.
const BASE: &str = "/dev/pmem0";
const DISK: &str = "/dev/vda";
/// How long devices have to appear. They are there at once unless the kernel probes them late.
const DEVICE_PATIENCE: Duration = Duration::from_secs(10);

/// The root file system in force.
#[derive(Debug)]
pub struct Root {
    /// The top directory of the sliver's own disk.
    pub disk: OwnedFd,
}

/// Mounts everything and makes it the root. Only PID 1 right after the kernel started it may call this, once.
///
/// # Errors
/// A device is missing or a file system cannot be mounted.
pub fn enter() -> Result<Root> {
    let nothing_special = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, "mode=0755")?;
    mount("proc", "/proc", "proc", nothing_special, "")?;
    mount("sysfs", "/sys", "sysfs", nothing_special, "")?;

    appear(BASE)?;
    appear(DISK)?;
    // With DAX every sliver maps the host's pages of the image themselves; an image that is compressed cannot be mapped so.
    if let Err(e) = mount(BASE, "/base", "erofs", MountFlags::RDONLY, "dax=always") {
        log(format_args!("{e}; trying without DAX"));
        mount(BASE, "/base", "erofs", MountFlags::RDONLY, "")?;
    }
    mount(DISK, "/disk", "ext4", MountFlags::NOATIME, "")?;
    for dir in ["/disk/upper", "/disk/work"] {
        make_dir(dir)?;
    }
    let layers = "lowerdir=/base,upperdir=/disk/upper,workdir=/disk/work";
    mount("overlay", "/root", "overlay", MountFlags::NOATIME, layers)?;
    let disk = rustix::fs::open("/disk", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .what(|| "open the disk's top directory".into())?;

    for (from, to) in [("/dev", "/root/dev"), ("/proc", "/root/proc"), ("/sys", "/root/sys")] {
        make_dir(to)?;
        rustix::mount::mount_move(from, to).what(|| format!("move {from} to the new root"))?;
    }
    rustix::process::chdir("/root").what(|| "enter the new root".into())?;
    rustix::mount::mount_move(".", "/").what(|| "move the new root to /".into())?;
    rustix::process::chroot(".").what(|| "change to the new root".into())?;
    rustix::process::chdir("/").what(|| "enter /".into())?;

    let open = MountFlags::NOSUID | MountFlags::NODEV;
    mount("tmpfs", "/run", "tmpfs", open, "mode=0755")?;
    mount(
        "devpts",
        "/dev/pts",
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        "gid=5,mode=0620,ptmxmode=0666",
    )?;
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
    clear_tmp(Path::new("/tmp")).what(|| "clear /tmp".into())?;
    Ok(Root { disk })
}

/// `/tmp` is on the disk, not in memory, of which a sliver has little; it starts empty all the same.
fn clear_tmp(tmp: &Path) -> io::Result<()> {
    fs::create_dir_all(tmp)?;
    fs::set_permissions(tmp, Permissions::from_mode(0o1777))?;
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

fn make_dir(path: &str) -> Result<()> {
    fs::create_dir_all(path).what(|| format!("make the directory {path}"))
}

fn appear(device: &str) -> Result<()> {
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
        assert!(kept.exists());
    }
}
