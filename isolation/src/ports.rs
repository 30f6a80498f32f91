//! The one allocator of the node's ports.
//!
//! Blocks come from a [`PortRange`] (20000..=60999 by default), exact reservations from [`Rspec::FIRST_PORT`] up to that range's
//! last port: the ports above it are the host's own for outgoing connections. No port of a protocol belongs to two claims
//! at once. A block is taken where it fits first, so that long gaps stay long.

use commonage_isolation_api::{PortGrant, Ports, Protocol, Rspec};
use jiff::Timestamp;

/// Ports that blocks are cut from, inclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// First.
    pub first: u16,
    /// Last.
    pub last: u16,
}

impl PortRange {
    /// 20000..=60999: below are exact reservations, above the host's own ports.
    pub const DEFAULT: Self = Self { first: 20_000, last: 60_999 };

    /// How many ports.
    pub fn len(&self) -> u32 {
        (u32::from(self.last) + 1).saturating_sub(self.first.into())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A claim that stands in the interval asked for.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// For messages: who holds it.
    pub holder: &'a str,
    /// Its ports.
    pub ports: &'a PortGrant,
    /// When it ends.
    pub until: Timestamp,
}

/// Why ports cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// Nobody can have it.
    #[error("port {port}/{protocol} is out of range: exact ports are {first} to {last}, the others are the node's own", first = Rspec::FIRST_PORT)]
    OutOfRange {
        /// Which port.
        port: u16,
        /// Which protocol.
        protocol: Protocol,
        /// Last port that can be had.
        last: u16,
    },
    /// Another has it.
    #[error(
        "port {port}/{protocol} is taken by {holder} until {until}; choose another port or a later interval"
    )]
    Taken {
        /// Which port.
        port: u16,
        /// Which protocol.
        protocol: Protocol,
        /// By whom.
        holder: String,
        /// How long.
        until: Timestamp,
    },
    /// No gap is long enough.
    #[error(
        "a block of {asked} ports was asked, the longest free one in that interval has {longest}; ask for a shorter block"
    )]
    NoBlock {
        /// How many were asked.
        asked: u16,
        /// How many there are in a row.
        longest: u32,
    },
}

/// Ports for `wanted` beside `claims`.
///
/// # Errors
/// Which port or block cannot be had, and why.
pub fn allocate(range: PortRange, claims: &[Claim<'_>], wanted: &Ports) -> Result<PortGrant, PortError> {
    for protocol in Protocol::ALL {
        let exact = if protocol == Protocol::Tcp { &wanted.tcp } else { &wanted.udp };
        for &port in exact {
            check_port(range, claims, protocol, port)?;
        }
    }
    let own = wanted.tcp.iter().chain(&wanted.udp).map(|&port| (port, port));
    let gaps = gaps(range, claims, own);
    let Some(&(first, _)) = gaps.iter().find(|(_, len)| *len >= wanted.block.into()) else {
        let longest = gaps.iter().map(|(_, len)| *len).max().unwrap_or(0);
        return Err(PortError::NoBlock { asked: wanted.block, longest });
    };
    let last = first.saturating_add(wanted.block.saturating_sub(1));
    Ok(PortGrant { first, last, tcp: wanted.tcp.clone(), udp: wanted.udp.clone() })
}

/// Whether ports that were granted before stand beside `claims` too.
///
/// # Errors
/// The first port that does not.
pub fn check(range: PortRange, claims: &[Claim<'_>], grant: &PortGrant) -> Result<(), PortError> {
    for protocol in Protocol::ALL {
        for port in grant.exact(protocol).iter().copied().chain(grant.first..=grant.last) {
            check_port(range, claims, protocol, port)?;
        }
    }
    Ok(())
}

/// How many ports of the range belong to nobody, whatever the protocol.
pub fn free(range: PortRange, claims: &[Claim<'_>]) -> u32 {
    gaps(range, claims, std::iter::empty()).iter().map(|(_, len)| len).sum()
}

fn check_port(
    range: PortRange,
    claims: &[Claim<'_>],
    protocol: Protocol,
    port: u16,
) -> Result<(), PortError> {
    if port < Rspec::FIRST_PORT || port > range.last {
        return Err(PortError::OutOfRange { port, protocol, last: range.last });
    }
    match claims.iter().find(|c| c.ports.owns(protocol, port)) {
        Some(c) => Err(PortError::Taken { port, protocol, holder: c.holder.to_owned(), until: c.until }),
        None => Ok(()),
    }
}

/// The runs of the range that nobody owns: first port and length, ascending.
fn gaps(range: PortRange, claims: &[Claim<'_>], own: impl Iterator<Item = (u16, u16)>) -> Vec<(u16, u32)> {
    let of_claim = |c: &Claim<'_>| {
        let PortGrant { first, last, tcp, udp } = c.ports;
        std::iter::once((*first, *last)).chain(tcp.iter().chain(udp).map(|&p| (p, p))).collect::<Vec<_>>()
    };
    let mut taken: Vec<(u16, u16)> = claims.iter().flat_map(of_claim).chain(own).collect();
    taken.sort_unstable();
    let (mut gaps, mut next) = (Vec::new(), u32::from(range.first));
    let end = u32::from(range.last) + 1;
    for (first, last) in taken {
        let first = u32::from(first).min(end);
        if first > next {
            // `next` is at most 65,535 here because it is below a port.
            gaps.push((next as u16, first - next));
        }
        next = next.max(u32::from(last) + 1);
    }
    if next < end {
        gaps.push((next as u16, end - next));
    }
    gaps
}
