//! What the kernel says that processes take: memory, wake-ups, processor time, disk. Everything is read from outside; what a machine's
//! process says of itself is not asked.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use commonage_bench::figures::{Idle, Taken};

/// A private, writable mapping of at least this size is guest memory: the smallest guest has 32 MiB, and no process of a machine needs as much.
const GUEST_KIB: u64 = 16 * 1024;

/// `/proc/meminfo`, KiB by field.
pub fn memory() -> Result<BTreeMap<String, u64>> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    Ok(fields(&text))
}

/// Lines `Name:   123 kB`.
fn fields(text: &str) -> BTreeMap<String, u64> {
    let field = |line: &str| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_owned(), value.split_whitespace().next()?.parse().ok()?))
    };
    text.lines().filter_map(field).collect()
}

/// Memory available, KiB.
pub fn available() -> Result<u64> {
    memory()?.get("MemAvailable").copied().context("/proc/meminfo has no MemAvailable")
}

/// A mapping of a process, KiB.
#[derive(Debug, Default)]
struct Mapping {
    guest: bool,
    name: String,
    rss: u64,
    private: u64,
}

/// The mappings of a process, from the text of its `smaps`.
fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(first), Some(second)) = (words.next(), words.next()) else { continue };
        // `7f…-7f… rw-p offset device inode name`, then `Field:  123 kB`.
        match (first.split_once('-'), all.last_mut()) {
            (Some((from, to)), _) if !first.ends_with(':') => {
                let number = |hex| u64::from_str_radix(hex, 16).unwrap_or_default();
                let kib = number(to).saturating_sub(number(from)) / 1024;
                let guest = second == "rw-p" && kib >= GUEST_KIB;
                let name = words.nth(3).unwrap_or_default().to_owned();
                all.push(Mapping { guest, name, ..Mapping::default() });
            }
            (_, Some(mapping)) => {
                let kib = second.parse::<u64>().unwrap_or_default();
                match first {
                    "Rss:" => mapping.rss += kib,
                    "Private_Clean:" | "Private_Dirty:" => mapping.private += kib,
                    _ => {}
                }
            }
            _ => {}
        }
    }
    all
}

fn mappings_of(pid: u32) -> Result<Vec<Mapping>> {
    let path = format!("/proc/{pid}/smaps");
    Ok(mappings(&fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?))
}

/// What processes have to themselves: the mean of all machines.
pub fn taken(machines: &[Vec<u32>]) -> Result<Taken> {
    let mut sum = Taken::default();
    for pid in machines.iter().flatten() {
        for mapping in mappings_of(*pid)? {
            let part = if mapping.guest { &mut sum.guest_kib } else { &mut sum.vmm_kib };
            *part += mapping.private as f64;
        }
        sum.threads += tasks(*pid).count() as f64;
    }
    let machines = machines.len().max(1) as f64;
    Ok(Taken {
        guest_kib: sum.guest_kib / machines,
        vmm_kib: sum.vmm_kib / machines,
        threads: sum.threads / machines,
    })
}

/// Of the mappings of files whose path has `name` in it: present, and of that what one process has to itself; of all processes, KiB.
pub fn file_pages(machines: &[Vec<u32>], name: &str) -> Result<(u64, u64)> {
    let mut sum = (0, 0);
    for pid in machines.iter().flatten() {
        for mapping in mappings_of(*pid)?.iter().filter(|m| m.name.contains(name)) {
            sum = (sum.0 + mapping.rss, sum.1 + mapping.private);
        }
    }
    Ok(sum)
}

/// Directories of a process's threads.
fn tasks(pid: u32) -> impl Iterator<Item = std::path::PathBuf> {
    fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().map(|e| e.path())
}

/// What threads have done since they began.
#[derive(Debug, Clone, Copy)]
pub struct Activity {
    at: Instant,
    wakeups: u64,
    cpu_ns: u64,
    switches: u64,
}

impl Activity {
    /// Of all threads of some machines, and of the node.
    pub fn of(machines: &[Vec<u32>]) -> Result<Self> {
        let (mut wakeups, mut cpu_ns) = (0, 0);
        for task in machines.iter().flatten().flat_map(|pid| tasks(*pid)) {
            // A thread that sleeps went to sleep by itself, and each time was woken from it.
            let status = fs::read_to_string(task.join("status")).unwrap_or_default();
            wakeups += fields(&status).get("voluntary_ctxt_switches").copied().unwrap_or_default();
            let run = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
            cpu_ns += run.split_whitespace().next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or_default();
        }
        let stat = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let switches = stat.lines().find_map(|l| l.strip_prefix("ctxt ")?.trim().parse().ok());
        Ok(Self { at: Instant::now(), wakeups, cpu_ns, switches: switches.unwrap_or_default() })
    }

    /// What was done since an earlier look at as many machines, for each.
    pub fn since(&self, earlier: &Self, machines: usize) -> Idle {
        let window = self.at.duration_since(earlier.at);
        let each = |now: u64, then: u64| {
            now.saturating_sub(then) as f64 / window.as_secs_f64().max(1e-6) / machines.max(1) as f64
        };
        Idle {
            window_us: window.as_micros() as u64,
            wakeups: each(self.wakeups, earlier.wakeups),
            switches: each(self.switches, earlier.switches),
            cpu_permille: each(self.cpu_ns, earlier.cpu_ns) / 1e6,
        }
    }
}

/// Bytes of disk that a directory and all in it have taken.
pub fn disk(directory: &Path) -> Result<u64> {
    let what = || format!("cannot look at {}", directory.display());
    let mut bytes = fs::symlink_metadata(directory).with_context(what)?.blocks() * 512;
    for entry in fs::read_dir(directory).with_context(what)? {
        let entry = entry.with_context(what)?;
        let meta = entry.metadata().with_context(what)?;
        bytes += if meta.is_dir() { disk(&entry.path())? } else { meta.blocks() * 512 };
    }
    Ok(bytes)
}
