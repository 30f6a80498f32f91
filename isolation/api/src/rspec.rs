//! The resource specification: one field a resource, over one interval of time.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Why an rspec is refused for itself, whatever the node's capacity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RspecError {
    /// A field is outside its range.
    #[error("rspec.{field} is {value}; it must be {range}")]
    Range {
        /// The field's path.
        field: &'static str,
        /// What was given.
        value: u64,
        /// What is allowed.
        range: &'static str,
    },
    /// The interval is empty or runs backwards.
    #[error("rspec.interval ends at {end}, which is not after its start {start}")]
    EndBeforeStart {
        /// The start given.
        start: Timestamp,
        /// The end given.
        end: Timestamp,
    },
    /// A link's cap is below its guarantee.
    #[error("rspec.link.cap_bps {cap} is below rspec.link.guaranteed_bps {guaranteed}")]
    CapBelowGuarantee {
        /// The cap given.
        cap: u64,
        /// The guarantee given.
        guaranteed: u64,
    },
}

/// When an rspec holds: from `start` (inclusive) to `end` (exclusive), UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interval {
    /// First moment.
    pub start: Timestamp,
    /// First moment after it.
    pub end: Timestamp,
}

impl Interval {
    /// Whether `t` lies inside.
    pub fn contains(&self, t: Timestamp) -> bool {
        self.start <= t && t < self.end
    }

    /// Whether the two share a moment.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// Outgoing bandwidth, bits a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// What the sliver always gets; guarantees add up to at most the node's link.
    pub guaranteed_bps: u64,
    /// What it never exceeds.
    pub cap_bps: u64,
}

/// Ports of the node's one address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ports {
    /// Length of the contiguous block the node picks, TCP and UDP alike: 16 to 4,096.
    pub block: u16,
    /// TCP ports wanted exactly, outside of any block: 1,024 to 65,535.
    #[serde(default)]
    pub tcp: BTreeSet<u16>,
    /// UDP ports wanted exactly.
    #[serde(default)]
    pub udp: BTreeSet<u16>,
}

/// Limits that are not shared resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Host processes and threads the sliver's machine may have (`pids.max`): 8 to 4,096.
    pub pids: u32,
}

/// What a sliver may ask of the node manager beyond what every sliver may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Privilege {
    /// Call `acquire`: turn free capacity into rcaps.
    Acquire,
    /// Keep other slices' software.
    EnvironmentService,
    /// Read every sliver's traffic.
    AdminSniffer,
    /// Export sensors.
    Sensors,
}

/// What a sliver may use, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rspec {
    /// Relative share of cycles and of what the link has left over, in thousandths of a share: 1 to 10,000,000.
    pub share: u32,
    /// Virtual processors: 1 to 8.
    pub vcpus: u8,
    /// Guest memory, MiB: 32 to 1,048,576.
    pub memory_mib: u32,
    /// The sliver's own disk, MiB: 16 to 16,777,216.
    pub disk_mib: u32,
    /// Outgoing bandwidth.
    pub link: Link,
    /// Ports.
    pub ports: Ports,
    /// Limits.
    pub limits: Limits,
    /// Privileges.
    #[serde(default)]
    pub privileges: BTreeSet<Privilege>,
    /// When.
    pub interval: Interval,
}

impl Rspec {
    /// Lowest port a sliver may own; those below are the host's.
    pub const FIRST_PORT: u16 = 1024;

    /// A modest sliver for `interval`: 1 share, 1 CPU, 128 MiB, 1 GiB disk, 64 ports, no privileges.
    pub fn modest(interval: Interval) -> Self {
        Self {
            share: 1000,
            vcpus: 1,
            memory_mib: 128,
            disk_mib: 1024,
            link: Link { guaranteed_bps: 0, cap_bps: 100_000_000 },
            ports: Ports { block: 64, tcp: BTreeSet::new(), udp: BTreeSet::new() },
            limits: Limits { pids: 64 },
            privileges: BTreeSet::new(),
            interval,
        }
    }

    /// Checks every field against its documented range.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn check(&self) -> Result<(), RspecError> {
        let range = |field, value: u64, lo: u64, hi: u64, range| {
            if (lo..=hi).contains(&value) { Ok(()) } else { Err(RspecError::Range { field, value, range }) }
        };
        range("share", self.share.into(), 1, 10_000_000, "1 to 10,000,000 thousandths")?;
        range("vcpus", self.vcpus.into(), 1, 8, "1 to 8")?;
        range("memory_mib", self.memory_mib.into(), 32, 1 << 20, "32 to 1,048,576 MiB")?;
        range("disk_mib", self.disk_mib.into(), 16, 1 << 24, "16 to 16,777,216 MiB")?;
        range("ports.block", self.ports.block.into(), 16, 4096, "16 to 4,096 ports")?;
        for port in &self.ports.tcp {
            range("ports.tcp", (*port).into(), Self::FIRST_PORT.into(), 65_535, "1,024 to 65,535")?;
        }
        for port in &self.ports.udp {
            range("ports.udp", (*port).into(), Self::FIRST_PORT.into(), 65_535, "1,024 to 65,535")?;
        }
        range("limits.pids", self.limits.pids.into(), 8, 4096, "8 to 4,096")?;
        if self.link.cap_bps < self.link.guaranteed_bps {
            let (cap, guaranteed) = (self.link.cap_bps, self.link.guaranteed_bps);
            return Err(RspecError::CapBelowGuarantee { cap, guaranteed });
        }
        if self.interval.end <= self.interval.start {
            let Interval { start, end } = self.interval;
            return Err(RspecError::EndBeforeStart { start, end });
        }
        Ok(())
    }
}
