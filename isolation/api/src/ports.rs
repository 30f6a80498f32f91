//! Ports of the node's one address that belong to a sliver.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Ports of the node's address that were granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortGrant {
    /// First port of the block, TCP and UDP.
    pub first: u16,
    /// Last port of the block, inclusive.
    pub last: u16,
    /// Exact TCP ports outside the block.
    #[serde(default)]
    pub tcp: BTreeSet<u16>,
    /// Exact UDP ports outside the block.
    #[serde(default)]
    pub udp: BTreeSet<u16>,
}

impl PortGrant {
    /// Whether `port` is owned for `protocol`.
    pub fn owns(&self, protocol: Protocol, port: u16) -> bool {
        (self.first..=self.last).contains(&port) || self.exact(protocol).contains(&port)
    }

    /// The exact ports for `protocol`.
    pub fn exact(&self, protocol: Protocol) -> &BTreeSet<u16> {
        match protocol {
            Protocol::Tcp => &self.tcp,
            Protocol::Udp => &self.udp,
        }
    }
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}
