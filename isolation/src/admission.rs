//! Admission: may this rspec be granted beside what was granted already, at every moment of its interval?
//!
//! Pure functions of capacity, commitments and time. Memory (MiB), disk (MiB), guaranteed bandwidth (bits a second) and
//! processes add up to at most the node's capacity at every moment; ports belong to one at a time. Shares and caps are
//! relative, so they never run short. An interval that began in the past counts from now.
//! Memory is what guests are promised; what a machine's process itself needs ([`crate::cgroup::OVERHEAD_MIB`] at most, a
//! few MiB in practice) comes out of the reserve that capacity leaves to the host.

use std::fmt;

use commonage_isolation_api::{Interval, PortGrant, Rspec, RspecError};
use jiff::Timestamp;

use crate::ports::{self, Claim, PortError, PortRange};

/// What a node has to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Memory for guests, MiB.
    pub memory_mib: u64,
    /// Disk for slivers, MiB.
    pub disk_mib: u64,
    /// Outgoing bandwidth that may be guaranteed, bits a second.
    pub link_bps: u64,
    /// Processes.
    pub pids: u64,
    /// Ports that blocks are cut from.
    pub ports: PortRange,
}

/// What is still free at every moment of an interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Free {
    /// Memory for guests, MiB.
    pub memory_mib: u64,
    /// Disk for slivers, MiB.
    pub disk_mib: u64,
    /// Outgoing bandwidth, bits a second.
    pub link_bps: u64,
    /// Processes.
    pub pids: u64,
    /// Ports of the range that blocks are cut from.
    pub ports: u32,
}

/// Something that was granted.
#[derive(Debug, Clone, Copy)]
pub struct Commitment<'a> {
    /// For messages: who holds it, like `slice princeton_codeen`.
    pub holder: &'a str,
    /// What was granted.
    pub rspec: &'a Rspec,
    /// Its ports.
    pub ports: &'a PortGrant,
}

/// An rspec that fits, with its ports. Made by [`admit`] and [`readmit`] only, and only this can be bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted<T> {
    rspec: T,
    ports: PortGrant,
}

impl<T> Admitted<T> {
    /// What was admitted.
    pub fn rspec(&self) -> &T {
        &self.rspec
    }

    /// Its ports.
    pub fn ports(&self) -> &PortGrant {
        &self.ports
    }

    /// Both.
    pub fn into_parts(self) -> (T, PortGrant) {
        (self.rspec, self.ports)
    }
}

/// What adds up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Resource {
    /// Memory, MiB.
    Memory,
    /// Disk, MiB.
    Disk,
    /// Guaranteed bandwidth, bits a second.
    Link,
    /// Processes.
    Pids,
}

impl Resource {
    /// All, in the order they are checked.
    pub const ALL: [Self; 4] = [Self::Memory, Self::Disk, Self::Link, Self::Pids];

    fn of(self, rspec: &Rspec) -> u64 {
        match self {
            Self::Memory => rspec.memory_mib.into(),
            Self::Disk => rspec.disk_mib.into(),
            Self::Link => rspec.link.guaranteed_bps,
            Self::Pids => rspec.limits.pids.into(),
        }
    }

    fn capacity(self, c: &Capacity) -> u64 {
        match self {
            Self::Memory => c.memory_mib,
            Self::Disk => c.disk_mib,
            Self::Link => c.link_bps,
            Self::Pids => c.pids,
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Memory | Self::Disk => "MiB",
            Self::Link => "bit/s",
            Self::Pids => "processes",
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory_mib",
            Self::Disk => "disk_mib",
            Self::Link => "link.guaranteed_bps",
            Self::Pids => "limits.pids",
        })
    }
}

/// Why an rspec is not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is wrong in itself.
    #[error(transparent)]
    Rspec(#[from] RspecError),
    /// It is over before it begins.
    #[error("rspec.interval ended at {end} and it is {now} now; ask for an end in the future")]
    Past {
        /// Its end.
        end: Timestamp,
        /// The node's time.
        now: Timestamp,
    },
    /// The node has not that much, at some moment of the interval.
    #[error(
        "rspec.{resource}: {asked} {} asked, {free} free at {at}, when least is; ask for at most {free}{}",
        resource.unit(),
        frees_at.map(|t| format!(", or for a later interval: some is given back at {t}")).unwrap_or_default()
    )]
    Short {
        /// What is short.
        resource: Resource,
        /// How much was asked.
        asked: u64,
        /// How much is free: the least over the interval.
        free: u64,
        /// When.
        at: Timestamp,
        /// When some of it becomes free after that.
        frees_at: Option<Timestamp>,
    },
    /// Ports.
    #[error("rspec.ports: {0}")]
    Ports(#[from] PortError),
}

/// Admits a new rspec and chooses its ports.
///
/// # Errors
/// What is wrong or short: how much was asked, how much is free, what to do.
pub fn admit(
    capacity: &Capacity,
    commitments: &[Commitment<'_>],
    rspec: Rspec,
    now: Timestamp,
) -> Result<Admitted<Rspec>, Refused> {
    let claims = check(capacity, commitments, &rspec, now)?;
    let ports = ports::allocate(capacity.ports, &claims, &rspec.ports)?;
    Ok(Admitted { rspec, ports })
}

/// Admits an rspec that has its ports already: a renewed one, or one from before a restart. `others` are without itself.
///
/// # Errors
/// As [`admit`].
pub fn readmit(
    capacity: &Capacity,
    others: &[Commitment<'_>],
    rspec: Rspec,
    ports: PortGrant,
    now: Timestamp,
) -> Result<Admitted<Rspec>, Refused> {
    let claims = check(capacity, others, &rspec, now)?;
    ports::check(capacity.ports, &claims, &ports)?;
    Ok(Admitted { rspec, ports })
}

/// What is free at every moment of `interval`.
pub fn free(capacity: &Capacity, commitments: &[Commitment<'_>], interval: Interval) -> Free {
    let left = |r: Resource| {
        let used = peak(commitments, interval, r).0;
        u64::try_from(i128::from(r.capacity(capacity)) - used).unwrap_or(0)
    };
    Free {
        memory_mib: left(Resource::Memory),
        disk_mib: left(Resource::Disk),
        link_bps: left(Resource::Link),
        pids: left(Resource::Pids),
        ports: ports::free(capacity.ports, &claims(commitments, interval)),
    }
}

fn check<'a>(
    capacity: &Capacity,
    commitments: &[Commitment<'a>],
    rspec: &Rspec,
    now: Timestamp,
) -> Result<Vec<Claim<'a>>, Refused> {
    rspec.check()?;
    if rspec.interval.end <= now {
        return Err(Refused::Past { end: rspec.interval.end, now });
    }
    let interval = Interval { start: rspec.interval.start.max(now), end: rspec.interval.end };
    for resource in Resource::ALL {
        let (used, at) = peak(commitments, interval, resource);
        let free = u64::try_from(i128::from(resource.capacity(capacity)) - used).unwrap_or(0);
        let asked = resource.of(rspec);
        if asked > free {
            let ends =
                commitments.iter().filter(|c| c.rspec.interval.contains(at) && resource.of(c.rspec) > 0);
            let frees_at = ends.map(|c| c.rspec.interval.end).min();
            return Err(Refused::Short { resource, asked, free, at, frees_at });
        }
    }
    Ok(claims(commitments, interval))
}

fn claims<'a>(commitments: &[Commitment<'a>], interval: Interval) -> Vec<Claim<'a>> {
    let standing = commitments.iter().filter(|c| c.rspec.interval.overlaps(&interval));
    standing.map(|c| Claim { holder: c.holder, ports: c.ports, until: c.rspec.interval.end }).collect()
}

/// The most of a resource that is in use at one moment of the interval, and the first such moment.
fn peak(commitments: &[Commitment<'_>], interval: Interval, resource: Resource) -> (i128, Timestamp) {
    let mut changes: Vec<(Timestamp, i128)> = Vec::new();
    for c in commitments.iter().filter(|c| c.rspec.interval.overlaps(&interval)) {
        let amount = i128::from(resource.of(c.rspec));
        changes.push((c.rspec.interval.start.max(interval.start), amount));
        changes.push((c.rspec.interval.end, -amount));
    }
    // At the same moment what is given back comes first: intervals do not contain their end.
    changes.sort_unstable();
    let (mut used, mut most, mut at) = (0, 0, interval.start);
    for (t, change) in changes {
        used += change;
        if used > most && t < interval.end {
            (most, at) = (used, t);
        }
    }
    (most, at)
}

#[cfg(test)]
#[path = "admission_test.rs"]
mod tests;
