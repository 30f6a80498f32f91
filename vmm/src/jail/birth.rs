//! What the process does before anything else. It closes what it was born with, standard input, output and error aside, whatever the parent
//! forgot; and takes the place that a node manager has for it: a session of its own, a control group, the [void](commonage_isolation::void).
//!
//! The node manager could see to that between fork and exec, if it forked: a process that looks after a thousand slivers takes long to copy. So
//! it spawns, which runs nothing of its own in the child.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use commonage_isolation::void::Void;

/// Where a void's two namespaces can be opened: `MOUNT,NETWORK`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VoidFiles {
    mounts: PathBuf,
    network: PathBuf,
}

impl FromStr for VoidFiles {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let files =
            text.split_once(',').filter(|(mounts, network)| !mounts.is_empty() && !network.is_empty());
        let (mounts, network) = files.ok_or("give two files, as in /proc/7/ns/mnt,/proc/7/ns/net")?;
        Ok(Self { mounts: mounts.into(), network: network.into() })
    }
}

/// The place a node manager has for a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The void that its jail is made in.
    pub void: VoidFiles,
    /// `cgroup.procs` of its control group; it stays in its parent's without.
    pub group: Option<PathBuf>,
}

/// Closes what was inherited and takes `place`, if there is one.
///
/// # Errors
/// A file of the place cannot be opened, or there is no `/proc`.
pub fn settle(place: Option<&Place>) -> io::Result<Option<Void>> {
    for number in inherited()? {
        // Owned, and so closed.
        own(number)?;
    }
    let Some(Place { void, group }) = place else { return Ok(None) };
    match rustix::process::setsid() {
        // It leads a group already, so a person's shell started it; it ends with the terminal.
        Ok(_) | Err(rustix::io::Errno::PERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    if let Some(group) = group {
        // "0" is the process that writes.
        let join = |path| File::options().write(true).open(path)?.write_all(b"0");
        join(group).map_err(with(group))?;
    }
    let open = |path: &Path| File::open(path).map(OwnedFd::from).map_err(with(path));
    Ok(Some(Void::from_parts(open(&void.mounts)?, open(&void.network)?)))
}

fn with(path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// The descriptors that survived an exec, standard ones aside.
fn inherited() -> io::Result<Vec<RawFd>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        numbers.extend(number.filter(|number| *number > 2 && survives_exec(*number).is_ok_and(|it| it)));
    }
    Ok(numbers)
}

fn survives_exec(number: RawFd) -> io::Result<bool> {
    // SAFETY: asks only; a descriptor that is not open is an error.
    match unsafe { libc::fcntl(number, libc::F_GETFD) } {
        -1 => Err(io::Error::last_os_error()),
        flags => Ok(flags & libc::FD_CLOEXEC == 0),
    }
}

/// Takes an inherited descriptor, once.
fn own(number: RawFd) -> io::Result<OwnedFd> {
    if !survives_exec(number)? {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("descriptor {number} was not inherited"),
        ));
    }
    // SAFETY: it is open and would survive an exec. Whatever this process opens itself (the standard library, rustix, KVM's crates) closes on
    // exec, so this one was inherited, and no value owns it: an owner is made only here, of a descriptor that closes on exec from then on.
    let owned = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC)?;
    Ok(owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_voids_files_are_two() {
        let files = VoidFiles { mounts: "/m".into(), network: "n".into() };
        assert_eq!("/m,n".parse(), Ok(files));
        for bad in ["", "/m", "/m,", ",n"] {
            assert!(bad.parse::<VoidFiles>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_this_process_opened_itself_is_not_taken() {
        use std::os::fd::AsRawFd as _;
        let file = std::fs::File::open("/proc/self/status").unwrap();
        assert!(!inherited().unwrap().contains(&file.as_raw_fd()));
        assert!(own(file.as_raw_fd()).is_err());
        assert!(own(1_000_000).is_err());
    }
}
