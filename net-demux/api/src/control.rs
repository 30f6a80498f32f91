//! The control protocol: a Unix `SOCK_SEQPACKET` socket, one JSON value a packet, at most [`MAX_PACKET`] bytes.
//!
//! The client sends a [`Request`], net-demux answers each with one [`Response`]. [`Request::Attach`] carries three descriptors
//! (SCM_RIGHTS): the ring's memory, the event "guest sent", the event "guest may receive". net-demux keeps no state on disk: after a restart its client attaches everything again.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

pub use commonage_isolation_api::PortGrant;
use serde::{Deserialize, Serialize};

/// Largest packet on the control socket, bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// A sliver's number on its node: its Unix user id, unique among the living. 0 is the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SliverId(pub u32);

/// What the client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// The node's one address. Until it is known only the host's own traffic passes.
    SetAddress {
        /// The address.
        address: Ipv4Addr,
        /// Length of its prefix, bits: 1 to 32.
        prefix_len: u8,
        /// Next hop for what is outside the prefix.
        gateway: Option<Ipv4Addr>,
    },
    /// Connects a sliver. An attached sliver of the same id is replaced.
    Attach {
        /// Its number.
        sliver: SliverId,
        /// Its slice, for counters.
        slice: String,
        /// Its MAC address.
        mac: [u8; 6],
        /// Its ports. Refused as a whole if one belongs to another.
        ports: PortGrant,
    },
    /// Disconnects a sliver and frees its ports. Unknown ids are fine.
    Detach {
        /// Its number.
        sliver: SliverId,
    },
    /// What is attached, with counters; as many slivers, by ascending id, as fit into one packet.
    List,
    /// The same, of slivers with a greater id than this: how to read on. A list without slivers is the end.
    ListAfter {
        /// The last id already known.
        sliver: SliverId,
    },
}

/// What net-demux answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub enum Response {
    /// Done.
    Ok,
    /// Answer to [`Request::List`] and [`Request::ListAfter`].
    List {
        /// Changes with each start of net-demux.
        instance: u64,
        /// The address, once set.
        address: Option<Ipv4Addr>,
        /// Slivers by id.
        slivers: Vec<SliverStatus>,
        /// Frames dropped that belong to no sliver, by reason.
        drops: BTreeMap<String, u64>,
    },
    /// Refused.
    Error {
        /// What happened and what to do.
        message: String,
    },
}

/// An attached sliver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliverStatus {
    /// Its number.
    pub sliver: SliverId,
    /// Its slice.
    pub slice: String,
    /// Its ports.
    pub ports: PortGrant,
    /// Frames and bytes the sliver sent that went on.
    pub tx_frames: u64,
    /// Bytes of those.
    pub tx_bytes: u64,
    /// Frames delivered to the sliver.
    pub rx_frames: u64,
    /// Bytes of those.
    pub rx_bytes: u64,
    /// Frames dropped, by reason.
    pub drops: BTreeMap<String, u64>,
}
