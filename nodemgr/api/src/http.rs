//! The node manager's local API: HTTP/1.1 with JSON bodies over vsock, host port [`PORT`].
//!
//! The socket a call arrives on is the caller's identity. Bodies over [`MAX_BODY`] are refused with 413.
//!
//! | call | who may | body → answer |
//! |---|---|---|
//! | `POST /v1/acquire` | privilege `acquire` | [`Acquire`] → [`Acquired`] |
//! | `POST /v1/bind` | whoever holds the rcap | [`Bind`] → [`Sliver`] |
//! | `POST /v1/release` | whoever holds the rcap, unbound | [`Release`] → `{}` |
//! | `GET /v1/rcaps/{rcap}` | whoever holds the rcap | → [`Acquired`] |
//! | `GET /v1/rcaps` | anyone: what the caller acquired | → `[Acquired]` |
//! | `POST /v1/renew` | whoever holds the rcap, with privilege `acquire` | [`Renew`] → [`Acquired`] |
//! | `GET /v1/slivers` | anyone: slivers the caller bound, and itself | → `[Sliver]` |
//! | `PUT /v1/slivers/{slice}/config` | who bound it | [`SliverConfig`] → [`Sliver`] |
//! | `DELETE /v1/slivers/{slice}` | who bound it | → `{}`; machine, ports, memory, disk and rcap are gone |
//! | `POST /v1/slivers/{slice}/exec` | who bound it | [`Exec`] → [`ExecResult`] |
//! | `GET /v1/slivers/{slice}/metrics` | who bound it, and itself | → [`Metrics`]: what its machine has done and takes |
//! | `GET /v1/node` | anyone | → [`Node`] |
//! | `GET /v1/network` | anyone: its own traffic | → [`Network`] |

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

pub use commonage_isolation_api::PortGrant;
use commonage_isolation_api::{NodeId, Rcap, Rspec, SliceName};
pub use commonage_vmm_api::Metrics;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::Bytes;

/// vsock port on the host.
pub const PORT: u32 = 806;
/// Largest request body, bytes.
pub const MAX_BODY: usize = 1 << 20;

/// Asks for a right to resources.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acquire {
    /// What is wanted.
    pub rspec: Rspec,
}

/// A granted right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acquired {
    /// The right.
    pub rcap: Rcap,
    /// What it is a right to.
    pub rspec: Rspec,
    /// The ports it names.
    pub ports: PortGrant,
    /// The slice it is bound to.
    pub bound_to: Option<SliceName>,
}

/// Makes the sliver of a slice from a right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bind {
    /// The slice. A node has at most one sliver of each.
    pub slice: SliceName,
    /// The right.
    pub rcap: Rcap,
    /// How the sliver starts.
    pub config: SliverConfig,
}

/// How a sliver starts and who may log in.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SliverConfig {
    /// Name of a base the node has, like `debian` or `mini`. Fixed once bound.
    pub base: String,
    /// OpenSSH public keys, one a string, of those who may log in.
    #[serde(default)]
    pub ssh_keys: Vec<String>,
    /// `rc.vinit`: run at each start by `/bin/sh` when it has no `#!` line.
    #[serde(default)]
    pub boot_script: String,
    /// Files laid before the boot script runs.
    #[serde(default)]
    pub files: Vec<File>,
    /// Whether its machine is started again when it ends.
    #[serde(default, skip_serializing_if = "RestartPolicy::is_default")]
    pub restart: RestartPolicy,
}

/// Whether a sliver's machine is started again when it ends by itself: after a wait of 1 s to a minute, which grows while it lives shortly.
/// Whatever this says, one that its node took down starts again with the node, and one that is stopped starts when it is configured anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// However it ended.
    #[default]
    Always,
    /// When it failed (panic, triple fault, killed) or rebooted; not when it halted or powered itself off.
    OnFailure,
    /// Not at all, not even when it rebooted.
    Never,
}

impl RestartPolicy {
    /// All, with their names.
    const NAMES: [(Self, &str); 3] =
        [(Self::Always, "always"), (Self::OnFailure, "on-failure"), (Self::Never, "never")];

    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::NAMES.iter().find(|(policy, _)| policy == self).map_or("", |(_, name)| name))
    }
}

impl FromStr for RestartPolicy {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::NAMES.iter().find(|(_, name)| *name == text).map(|(policy, _)| *policy);
        found.ok_or_else(|| format!("{text:?} is no restart policy: always, on-failure or never"))
    }
}

/// A file to lay in a sliver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Absolute path in the sliver.
    pub path: String,
    /// Permission bits, like 0o600.
    pub mode: u32,
    /// Contents.
    pub contents: Bytes,
}

/// Gives a right back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// The right.
    pub rcap: Rcap,
}

/// Moves a right's end, and optionally changes its share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Renew {
    /// The right.
    pub rcap: Rcap,
    /// Its new end.
    pub end: Timestamp,
    /// Its new share, thousandths.
    pub share: Option<u32>,
}

/// How far a sliver is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum SliverState {
    /// Bound; its interval has not begun.
    Pending,
    /// Its machine is booting, or its boot script runs.
    Starting,
    /// The boot script has ended with this status.
    Running {
        /// Exit status of the boot script; 0 without one, 128 + n for signal n.
        boot_script_exit: i32,
    },
    /// Its machine ended and will be started again.
    Failed {
        /// What happened, with the last console lines.
        reason: String,
    },
    /// Its machine ended and stays so, as its configuration's `restart` wants, until it is configured anew or deleted.
    Stopped {
        /// What happened, with the last console lines.
        reason: String,
    },
}

/// A sliver as the node manager sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sliver {
    /// Its slice.
    pub slice: SliceName,
    /// Its state.
    pub status: SliverState,
    /// Its right.
    pub rcap: Rcap,
    /// What it may use.
    pub rspec: Rspec,
    /// Its ports.
    pub ports: PortGrant,
    /// How it starts, without the contents of its files.
    pub config: SliverConfig,
}

/// Runs a command in a sliver as root and waits, at most `timeout_s`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Standard input.
    #[serde(default)]
    pub stdin: Bytes,
    /// Seconds: 1 to 300; 60 when absent.
    pub timeout_s: Option<u32>,
}

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecResult {
    /// Exit status; 128 + n when signal n ended it.
    pub exit: i32,
    /// Standard output, at most 256 KiB.
    pub stdout: Bytes,
    /// Standard error, at most 256 KiB.
    pub stderr: Bytes,
    /// Whether output was cut.
    pub truncated: bool,
}

/// What can be had: on the whole, or still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Memory for guests, MiB.
    pub memory_mib: u64,
    /// Disk for slivers, MiB.
    pub disk_mib: u64,
    /// Outgoing bandwidth that may be guaranteed, bits a second.
    pub link_bps: u64,
    /// Ports.
    pub ports: u32,
    /// Processes.
    pub pids: u64,
}

/// The node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its identifier.
    pub node: NodeId,
    /// Its one address.
    pub address: Ipv4Addr,
    /// The caller's slice, as the node manager knows it.
    pub caller: String,
    /// Version of the node's software.
    pub version: String,
    /// The SSH front door's host key, as an OpenSSH public key.
    pub ssh_host_key: String,
    /// Bases it has.
    pub bases: Vec<String>,
    /// What it has in all.
    pub capacity: Capacity,
    /// What is free now.
    pub free: Capacity,
    /// Unix time, so that a guest can set its clock.
    pub now: Timestamp,
}

/// What net-demux counted of the caller's traffic since its ring was attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Frames it sent that went on.
    pub tx_frames: u64,
    /// Bytes of those.
    pub tx_bytes: u64,
    /// Frames delivered to it.
    pub rx_frames: u64,
    /// Bytes of those.
    pub rx_bytes: u64,
    /// Frames dropped, by reason.
    pub drops: BTreeMap<String, u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node manager that does not know the field refuses it, so it is said only when it says something.
    #[test]
    fn a_restart_policy_has_one_name_everywhere() {
        for (policy, name) in RestartPolicy::NAMES {
            assert_eq!((policy.to_string().as_str(), name.parse()), (name, Ok(policy)));
            assert_eq!(serde_json::to_string(&policy).unwrap(), format!("{name:?}"));
        }
        "sometimes".parse::<RestartPolicy>().unwrap_err();
        assert!(!serde_json::to_string(&SliverConfig::default()).unwrap().contains("restart"));
    }
}
