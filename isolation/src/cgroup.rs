//! Control groups (version 2): one a sliver, `ROOT/slivers/NAME`, holding its machine to its rspec.
//!
//! | file | from |
//! |---|---|
//! | `cpu.weight` | share: 1000 thousandths are the kernel's default of 100, in proportion, cut to 1..=10,000 |
//! | `memory.max` | guest memory + [`OVERHEAD_MIB`] for the machine's own process, its page tables and the page cache of its disk |
//! | `memory.swap.max` | 0: a sliver's memory is never on disk |
//! | `memory.oom.group` | 1: a machine dies whole |
//! | `pids.max` | limits.pids |
//!
//! The root is a parameter (`/sys/fs/cgroup` on a node). Whoever removes a group kills what is in it first.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use commonage_isolation_api::{Rspec, SliceName};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// What a machine's process may use beyond guest memory, MiB.
pub const OVERHEAD_MIB: u64 = 32;

const CONTROLLERS: &str = "+cpu +memory +pids";

/// Why a control group could not be made, changed or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {source}; is cgroup2 mounted there, with the controllers cpu, memory and pids?", path.display())]
pub struct CgroupError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// All slivers' groups.
#[derive(Debug, Clone)]
pub struct Cgroups {
    slivers: PathBuf,
}

impl Cgroups {
    /// Makes `root/slivers` and hands the controllers down to it.
    ///
    /// # Errors
    /// `root` is no cgroup2 file system, or the kernel lacks a controller.
    pub fn prepare(root: &Path) -> Result<Self, CgroupError> {
        write(&root.join("cgroup.subtree_control"), CONTROLLERS)?;
        let slivers = root.join("slivers");
        make(&slivers)?;
        write(&slivers.join("cgroup.subtree_control"), CONTROLLERS)?;
        Ok(Self { slivers })
    }

    /// The group of a slice's sliver, whether it exists or not.
    pub fn of(&self, slice: &SliceName) -> Cgroup {
        Cgroup { path: self.slivers.join(slice.as_str()) }
    }

    /// The group of the machine that templates are made of. No slice's name lacks an underscore.
    pub fn template(&self) -> Cgroup {
        Cgroup { path: self.slivers.join("template") }
    }

    /// The groups that exist, by name.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn names(&self) -> Result<Vec<String>, CgroupError> {
        let failed = |source| CgroupError { what: "list", path: self.slivers.clone(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.slivers).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                names.extend(entry.file_name().into_string());
            }
        }
        Ok(names)
    }
}

/// One sliver's group.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes it if it is not there, and sets its limits.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn create(&self, rspec: &Rspec) -> Result<(), CgroupError> {
        make(&self.path)?;
        self.limit(rspec)
    }

    /// Sets its limits anew.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn limit(&self, rspec: &Rspec) -> Result<(), CgroupError> {
        self.set("cpu.weight", &weight(rspec.share).to_string())?;
        self.set("memory.max", &memory_max(rspec.memory_mib).to_string())?;
        self.set("memory.oom.group", "1")?;
        // Absent when the kernel has no swap.
        match self.set("memory.swap.max", "0") {
            Err(e)
                if e.source.kind() != io::ErrorKind::NotFound
                    && e.source.kind() != io::ErrorKind::PermissionDenied =>
            {
                return Err(e);
            }
            _ => {}
        }
        self.set("pids.max", &rspec.limits.pids.to_string())
    }

    /// `cgroup.procs`: a process that writes `0` to it joins.
    pub fn procs(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Whether a process is in it. A group that does not exist is empty.
    ///
    /// # Errors
    /// The group cannot be read.
    pub fn populated(&self) -> Result<bool, CgroupError> {
        let path = self.path.join("cgroup.events");
        match File::open(&path).and_then(|file| is_populated(&file)) {
            Ok(populated) => Ok(populated),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(CgroupError { what: "read", path, source }),
        }
    }

    /// Kills every process in it and waits (blocking) until none is left. Nothing to do when it does not exist.
    ///
    /// # Errors
    /// The kernel refuses, or a process is left after `timeout`.
    pub fn kill(&self, timeout: Duration) -> Result<(), CgroupError> {
        if !self.path.exists() {
            return Ok(());
        }
        self.set("cgroup.kill", "1")?;
        self.wait_empty(timeout)
    }

    /// Waits (blocking) until no process is in it.
    ///
    /// # Errors
    /// A process is left after `timeout`.
    pub fn wait_empty(&self, timeout: Duration) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.events");
        let failed =
            |source| CgroupError { what: "wait for the end of all in", path: self.path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(failed(e)),
        };
        let deadline = Instant::now() + timeout;
        // Read through the file that is polled: the kernel tells of changes since that one was last read.
        while is_populated(&file).map_err(failed)? {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
            let left = Timespec::try_from(left).map_err(|e| failed(io::Error::other(e)))?;
            // The kernel raises POLLPRI when the file changes.
            match poll(&mut [PollFd::new(&file, PollFlags::PRI)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(failed(e.into())),
            }
        }
        Ok(())
    }

    /// Removes it; fine if it is gone already.
    ///
    /// # Errors
    /// A process is still in it.
    pub fn remove(&self) -> Result<(), CgroupError> {
        match fs::remove_dir(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(CgroupError { what: "remove", path: self.path.clone(), source })
            }
            _ => Ok(()),
        }
    }

    fn set(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        write(&self.path.join(file), value)
    }
}

/// What `cgroup.events`, opened, says now. Of a group that was removed since: nobody is in it.
fn is_populated(events: &File) -> io::Result<bool> {
    let mut text = [0; 256];
    match rustix::io::pread(events, &mut text, 0) {
        Ok(length) => {
            let text = text.get(..length).unwrap_or_default();
            Ok(text.split(|b| *b == b'\n').any(|line| line == b"populated 1"))
        }
        Err(Errno::NODEV) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// `cpu.weight` for a share in thousandths: proportional between 10 and 1,000,000 thousandths.
pub fn weight(share: u32) -> u32 {
    (share / 10).clamp(1, 10_000)
}

/// `memory.max`, bytes.
pub fn memory_max(guest_mib: u32) -> u64 {
    (u64::from(guest_mib) + OVERHEAD_MIB) << 20
}

fn make(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError { what: "make", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(|source| CgroupError { what: "write", path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use commonage_isolation_api::Interval;
    use jiff::Timestamp;

    fn rspec() -> Rspec {
        Rspec::modest(Interval { start: Timestamp::UNIX_EPOCH, end: Timestamp::MAX })
    }

    #[test]
    fn shares_become_weights_in_proportion() {
        assert_eq!(
            [1, 9, 10, 1000, 2000, 100_000, 10_000_000].map(weight),
            [1, 1, 1, 100, 200, 10_000, 10_000]
        );
    }

    #[test]
    fn a_group_gets_its_limits() {
        let root = tempfile::tempdir().unwrap();
        let groups = Cgroups::prepare(root.path()).unwrap();
        let slice: SliceName = "princeton_codeen".parse().unwrap();
        groups.of(&slice).create(&rspec()).unwrap();
        groups.of(&slice).create(&rspec()).unwrap();
        let read = |f: &str| fs::read_to_string(root.path().join("slivers").join(f)).unwrap();
        assert_eq!(read("cgroup.subtree_control"), "+cpu +memory +pids");
        assert_eq!(read("princeton_codeen/cpu.weight"), "100");
        assert_eq!(read("princeton_codeen/memory.max"), "167772160");
        assert_eq!(read("princeton_codeen/pids.max"), "64");
        assert_eq!(groups.names().unwrap(), ["princeton_codeen"]);
    }

    #[test]
    fn killing_waits_for_the_last_process() {
        let root = tempfile::tempdir().unwrap();
        let groups = Cgroups::prepare(root.path()).unwrap();
        let group = groups.of(&"a_b".parse().unwrap());
        group.kill(Duration::ZERO).unwrap();
        group.create(&rspec()).unwrap();
        fs::write(group.path.join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        assert!(group.kill(Duration::ZERO).is_err());
        assert_eq!(fs::read_to_string(group.path.join("cgroup.kill")).unwrap(), "1");
        fs::write(group.path.join("cgroup.events"), "populated 0\nfrozen 0\n").unwrap();
        group.kill(Duration::ZERO).unwrap();
    }

    #[test]
    fn removing_what_is_gone_is_fine() {
        let root = tempfile::tempdir().unwrap();
        let groups = Cgroups::prepare(root.path()).unwrap();
        groups.of(&"a_b".parse().unwrap()).remove().unwrap();
        fs::create_dir(groups.of(&"a_b".parse().unwrap()).path).unwrap();
        groups.of(&"a_b".parse().unwrap()).remove().unwrap();
        assert!(groups.names().unwrap().is_empty());
    }

    #[test]
    fn an_error_names_the_file() {
        let error = Cgroups::prepare(Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/cgroup.subtree_control"), "{error}");
    }
}
