//! What `bench-node` measured, told to the bench that started it: one JSON object on a line that begins with [`RESULT`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Before the result on the node's console.
pub const RESULT: &str = "bench-result: ";
/// Before each line that says how far the node is.
pub const PROGRESS: &str = "bench-node: ";
/// Before what `bench-guest` measured, on a guest's console.
pub const GUEST: &str = "bench-guest: ";

/// What slivers cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Density {
    /// Slivers that were made and lived together.
    pub slivers: u32,
    /// Of these, how many answered a command after they had idled.
    pub answering: u32,
    /// How they came to be: clones of a template, or booted each.
    pub cloned: bool,
    /// Memory of each guest as its kernel sees it, MiB.
    pub guest_mib: u32,
    /// What the node said it had before the first sliver and after the last had idled, KiB.
    pub node: Fall,
    /// Of each sliver, the mean.
    pub sliver: Taken,
    /// The template's memory, KiB, which all share and which is in no other figure.
    pub template_kib: u64,
    /// Bytes of disk that each sliver has taken, the mean.
    pub disk_bytes: u64,
    /// From asking for a sliver to the end of its first command, each.
    pub create_us: Vec<u64>,
    /// Clone and cold boot in turns, each from asking for a sliver to the end of its first command.
    pub turns: Turns,
    /// Of all slivers while they idled.
    pub idle: Idle,
    /// Memory taken after so many slivers.
    pub curve: Vec<Point>,
    /// The peer.
    pub peer: Option<Peer>,
    /// A large program in all slivers at once.
    pub program: Option<Program>,
}

/// Clones and cold boots in turns, microseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Turns {
    /// Clones.
    pub clone_us: Vec<u64>,
    /// Cold boots.
    pub cold_us: Vec<u64>,
}

/// `/proc/meminfo` before and after, KiB.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Fall {
    /// Before.
    pub before: BTreeMap<String, u64>,
    /// After.
    pub after: BTreeMap<String, u64>,
}

impl Fall {
    /// How much less there is of a field than there was, KiB.
    pub fn of(&self, field: &str) -> i64 {
        let get = |fields: &BTreeMap<String, u64>| fields.get(field).copied().unwrap_or_default();
        get(&self.before).cast_signed() - get(&self.after).cast_signed()
    }
}

/// What the process of a machine has to itself, KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Taken {
    /// Pages of guest memory.
    pub guest_kib: f64,
    /// Everything else: the process's own.
    pub vmm_kib: f64,
    /// Threads.
    pub threads: f64,
}

/// What machines do while nobody asks anything of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Idle {
    /// For how long that was looked at, microseconds.
    pub window_us: u64,
    /// Times a thread of a machine was woken, a second and machine.
    pub wakeups: f64,
    /// Context switches of the whole node, a second and machine.
    pub switches: f64,
    /// Processor time of a machine's threads, thousandths of one processor, a machine.
    pub cpu_permille: f64,
}

/// A point of the curve over the number of slivers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// So many slivers.
    pub slivers: u32,
    /// Fall of the memory available, KiB.
    pub fall_kib: i64,
    /// Median of the creations since the last point, microseconds.
    pub create_us: u64,
}

/// QEMU's `microvm`, and sliver-vmm started the same way beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Peer {
    /// What it says it is.
    pub version: String,
    /// From the process's start to the line on the serial port with which the guest's init waits for an identity.
    pub qemu_boot_us: Vec<u64>,
    /// The same of sliver-vmm, in turns.
    pub our_boot_us: Vec<u64>,
    /// How many were left alone for the figures below.
    pub machines: u32,
    /// Fall of the memory available for each, KiB.
    pub fall_kib: f64,
    /// What each process has to itself.
    pub taken: Taken,
    /// While they idle.
    pub idle: Idle,
}

/// A large program in all slivers at once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// Its size, KiB.
    pub size_kib: u64,
    /// In how many slivers it ran, having read all its pages.
    pub running: u32,
    /// Its pages mapped by all machines together, KiB.
    pub mapped_kib: u64,
    /// Of these, what a machine has to itself, KiB.
    pub private_kib: u64,
    /// The node before the first and after the last.
    pub node: Fall,
}

/// What a guest's disk did, by the name of the load.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Blk {
    /// Size of the file that all used, MiB.
    pub file_mib: u64,
    /// How long each load ran, milliseconds.
    pub window_ms: u64,
    /// What QEMU says it is.
    pub version: String,
    /// Each round and way, with what each load reached.
    pub rounds: Vec<BlkRound>,
}

/// One guest that ran all loads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlkRound {
    /// `sliver-vmm`, or QEMU and its way of doing input and output.
    pub machine: String,
    /// By load.
    pub loads: BTreeMap<String, Rate>,
}

/// What one load reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Requests.
    pub requests: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// In so many microseconds.
    pub elapsed_us: u64,
}

impl Rate {
    /// Requests a second.
    pub fn per_second(&self) -> f64 {
        self.requests as f64 * 1e6 / (self.elapsed_us.max(1)) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fall_is_positive_when_there_is_less() {
        let fields = |kib| BTreeMap::from([("MemAvailable".to_owned(), kib)]);
        let fall = Fall { before: fields(100), after: fields(70) };
        assert_eq!((fall.of("MemAvailable"), fall.of("Slab")), (30, 0));
        assert_eq!(Fall { before: fields(1), after: fields(3) }.of("MemAvailable"), -2);
    }

    #[test]
    fn a_rate_of_no_time_is_no_division_by_zero() {
        assert!(Rate { requests: 1, bytes: 1, elapsed_us: 0 }.per_second().is_finite());
        assert_eq!(Rate { requests: 50, bytes: 1, elapsed_us: 500_000 }.per_second(), 100.0);
    }
}
