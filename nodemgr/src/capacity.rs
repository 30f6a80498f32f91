//! What the node has to give, from the machine itself; each figure can be said by a flag instead.

use std::fs;
use std::path::Path;

use commonage_isolation::{Capacity, PortRange};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::Error;

/// Memory that stays the host's, MiB: kernel, node manager, net-demux, page cache of bases, machines' own processes.
pub const RESERVE_MIB: u64 = 384;
/// Process ids that stay the host's.
const RESERVE_PIDS: u64 = 1024;

/// Figures said by flags.
#[derive(Debug, Clone, Copy, Default)]
pub struct Said {
    /// Memory for guests, MiB.
    pub memory_mib: Option<u64>,
    /// Disk for slivers, MiB.
    pub disk_mib: Option<u64>,
    /// Processes.
    pub pids: Option<u64>,
}

/// The node's capacity.
///
/// # Errors
/// A figure cannot be read from the machine and was not said.
pub fn of_machine(state: &Path, said: Said, link_bps: u64, ports: PortRange) -> Result<Capacity, Error> {
    let memory_mib = match said.memory_mib {
        Some(said) => said,
        None => memory_mib()?.saturating_sub(RESERVE_MIB),
    };
    let disk_mib = match said.disk_mib {
        Some(said) => said,
        None => disk_mib(state)?,
    };
    let pids = match said.pids {
        Some(said) => said,
        None => pids()?.saturating_sub(RESERVE_PIDS),
    };
    Ok(Capacity { memory_mib, disk_mib, link_bps, pids, ports })
}

/// Lets this process have as many descriptors as the kernel allows at all: each sliver takes about ten.
pub fn raise_descriptors() {
    let path = Path::new("/proc/sys/fs/nr_open");
    let most = fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
    // Without the privilege to raise it, what the process was given.
    let given = getrlimit(Resource::Nofile).maximum;
    let limit = |n| setrlimit(Resource::Nofile, Rlimit { current: n, maximum: n });
    if limit(most).is_err() && limit(given).is_err() {
        tracing::warn!("cannot raise the number of open files: with many slivers there may be too few");
    }
}

fn memory_mib() -> Result<u64, Error> {
    let path = Path::new("/proc/meminfo");
    let text = fs::read_to_string(path).unwrap_or_default();
    mem_total_kib(&text).map(|kib| kib / 1024).ok_or_else(|| fact("memory", path, "memory-mib"))
}

fn mem_total_kib(meminfo: &str) -> Option<u64> {
    meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse().ok())
}

/// Nine tenths of the state partition: the rest is for the database, logs and the file system itself.
fn disk_mib(state: &Path) -> Result<u64, Error> {
    let stat = rustix::fs::statvfs(state).map_err(|_| fact("disk", state, "disk-mib"))?;
    Ok((stat.f_blocks.saturating_mul(stat.f_frsize) >> 20) / 10 * 9)
}

fn pids() -> Result<u64, Error> {
    let path = Path::new("/proc/sys/kernel/pid_max");
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().map_err(|_| fact("room for processes", path, "pids"))
}

fn fact(what: &'static str, path: &Path, flag: &'static str) -> Error {
    Error::Fact { what, path: path.to_owned(), flag }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        assert_eq!(mem_total_kib("MemTotal:        2029668 kB\nMemFree: 1 kB\n"), Some(2_029_668));
        assert_eq!(mem_total_kib("nonsense"), None);
    }

    #[test]
    fn this_machine_has_something_to_give() {
        let c = of_machine(Path::new("/"), Said::default(), 1, PortRange::DEFAULT).unwrap();
        assert!(c.disk_mib > 0 && c.pids > 0);
        let said = Said { memory_mib: Some(7), disk_mib: Some(8), pids: Some(9) };
        let c = of_machine(Path::new("/nonexistent"), said, 1, PortRange::DEFAULT).unwrap();
        assert_eq!((c.memory_mib, c.disk_mib, c.pids), (7, 8, 9));
    }
}
