//! The void: a mount namespace that has nothing but an empty, read-only root, and a network namespace that has nothing but a loopback
//! interface that is down. Who is in it can name no file and reach no network.
//!
//! It is made once, and then any number of processes step into it, each in the same time however much the host has mounted: to unshare a mount
//! namespace copies the mounts of the one left behind, which for the void are two.
//!
//! The root's file system is read-only itself, not only its mount, and so are all copies; nobody outside can write to it either.

#![allow(unsafe_code)] // to unshare, in one place

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use rustix::fs::{CWD, Mode, OFlags, open, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount,
    unmount,
};
use rustix::process::{chdir, chroot, fchdir};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// Most rounds of unmounting: one more for each layer of mounts that hid others.
const ROUNDS: usize = 16;

/// Why there is no void.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}; it takes root, and /proc")]
pub struct VoidError {
    what: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> VoidError {
    move |source| VoidError { what, source: source.into() }
}

/// The two namespaces, held by descriptors that close on exec.
#[derive(Debug)]
pub struct Void {
    mounts: OwnedFd,
    network: OwnedFd,
}

impl Void {
    /// Makes one, on a thread of its own; the caller stays where it is.
    ///
    /// # Errors
    /// The kernel refuses, or a mount cannot be taken away.
    pub fn create() -> Result<Self, VoidError> {
        let thread = std::thread::Builder::new().name("void".into()).spawn(|| {
            let proc = fall_in()?;
            let hold = |name: &str| openat(&proc, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
            Ok(Self {
                mounts: hold("thread-self/ns/mnt").map_err(failed("hold the empty mount namespace"))?,
                network: hold("thread-self/ns/net").map_err(failed("hold the empty network namespace"))?,
            })
        });
        let ended = thread.map_err(failed("start a thread"))?.join();
        ended.unwrap_or_else(|_| Err(failed("make a void")(io::Error::other("its thread panicked"))))
    }

    /// One that was made elsewhere. Anything else than descriptors of such namespaces is found out by [`enter`](Self::enter).
    pub fn from_parts(mounts: OwnedFd, network: OwnedFd) -> Self {
        Self { mounts, network }
    }

    /// What a child must inherit to [put together](Self::from_parts) the same void: mount namespace, network namespace.
    pub fn parts(&self) -> [BorrowedFd<'_>; 2] {
        [self.mounts.as_fd(), self.network.as_fd()]
    }

    /// Moves the calling process, which must have one thread, into it. Takes the same time whatever is mounted.
    ///
    /// # Errors
    /// The caller is not root or has several threads, or the descriptors are not of such namespaces.
    pub fn enter(&self) -> Result<(), VoidError> {
        move_into_link_name_space(self.network.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(failed("enter the empty network namespace"))?;
        move_into_link_name_space(self.mounts.as_fd(), Some(LinkNameSpaceType::Mount))
            .map_err(failed("enter the empty mount namespace"))
    }
}

/// Makes a void of the calling thread's own and moves it in; other threads stay where they are. Takes time for each mount of the host.
/// Returns the `/proc` that was left behind.
///
/// # Errors
/// The kernel refuses, or a mount cannot be taken away. The thread may then be anywhere between.
pub fn fall_in() -> Result<OwnedFd, VoidError> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = open("/proc", directory, Mode::empty()).map_err(failed("open /proc"))?;
    // SAFETY: descriptors stay shared; what is unshared is the working directory, the root, mounts and the network, which no code takes
    // for another thread's.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWNET) }
        .map_err(failed("leave the host's namespaces"))?;
    // Or the unmounting below would happen on the host too.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(failed("keep mounts to oneself"))?;
    let root = empty_root().map_err(failed("make an empty root"))?;
    unmount_all(&proc)?;
    let enter = || {
        // Over the old root, which can neither be unmounted nor pivoted away from where it is the initial RAM file system. It holds no
        // mounts any more, and nobody in the void has the privilege to look under the new one.
        move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        fchdir(&root)?;
        chroot(".")?;
        chdir("/")
    };
    enter().map_err(failed("change to the empty root"))?;
    Ok(proc)
}

/// An empty file system that is read-only in itself, mounted nowhere yet.
fn empty_root() -> rustix::io::Result<OwnedFd> {
    let configuration = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(configuration.as_fd(), "mode", "0555")?;
    fsconfig_set_flag(configuration.as_fd(), "ro")?;
    fsconfig_create(configuration.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(configuration.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Takes away every mount but the root.
fn unmount_all(proc: &OwnedFd) -> Result<(), VoidError> {
    for _ in 0..ROUNDS {
        let mut mounts = Vec::new();
        openat(proc, "thread-self/mountinfo", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(io::Error::from)
            .and_then(|file| File::from(file).read_to_end(&mut mounts))
            .map_err(failed("read which mounts there are"))?;
        let points = mount_points(&mounts);
        if points.is_empty() {
            return Ok(());
        }
        for point in points {
            // What is refused went with the mount it was on, or is hidden by another: the next round tells.
            let _ = unmount(&point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
    }
    Err(failed("unmount what the host has mounted")(io::Error::from(io::ErrorKind::ResourceBusy)))
}

/// The mount points of a `mountinfo` (proc_pid_mountinfo(5)) other than the root: the fifth field of each line.
fn mount_points(mountinfo: &[u8]) -> Vec<PathBuf> {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let points = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    points.filter(|point| *point != b"/").map(|point| OsString::from_vec(unescape(point)).into()).collect()
}

/// Blank, tab, newline and backslash are written as a backslash and three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((byte, behind)) = rest.split_first() {
        let digits = behind
            .get(..3)
            .filter(|digits| *byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        if let Some(digits) = digits {
            plain.push(
                digits.iter().fold(0u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')),
            );
            rest = behind.get(3..).unwrap_or_default();
        } else {
            plain.push(*byte);
            rest = behind;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_the_fifth_field_unescaped_and_without_the_root() {
        let text = b"21 1 0:20 / / rw - rootfs rootfs rw\n\
            22 21 0:21 / /proc rw,relatime shared:5 - proc proc rw\n\
            36 35 98:0 /mnt1 /a\\040b\\134 rw,noatime master:1 - ext3 /dev/root rw\n";
        assert_eq!(mount_points(text), [PathBuf::from("/proc"), PathBuf::from("/a b\\")]);
        assert_eq!(unescape(b"\\04"), b"\\04");
        assert_eq!(unescape(b"\\777"), [0xff]);
    }
}
