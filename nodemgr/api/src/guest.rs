//! What the node manager and `sliver-init` say to each other over the sliver's lifetime.
//!
//! `sliver-init` listens on guest vsock port [`CONTROL_PORT`]. When it does, it knocks: it connects to the same port of the host, writes
//! [`Knock::Waiting`] and closes; nothing else is ever said there. So a host that booted a machine knows when it can be talked to (or
//! snapshotted: nothing in it is any sliver's yet), and one that cloned or adopted a machine need not wait. A knock that fails is no error.
//!
//! The host connects to the guest; the guest sends [`FromGuest::Hello`]; the node manager answers
//! [`FromHost::Identity`]; the guest reports [`FromGuest::Configured`], then [`FromGuest::BootScriptDone`]. When the
//! connection breaks (the node manager restarted) the host connects again, and the guest says hello with `configured: true` and, if the boot
//! script has ended, its status; it is then sent [`FromHost::Welcome`] only. A new connection takes the place of the old.
//! One JSON value a line, at most [`MAX_LINE`] bytes.
//! Commands run over separate connections to guest port [`EXEC_PORT`]: see [`crate::exec`]. Whoever connects to guest port
//! `POWER_PORT` of the machine's protocol asks it to shut down.

use std::net::Ipv4Addr;

use commonage_isolation_api::{NodeId, SliceName};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::Bytes;
use crate::http::{File, PortGrant};

/// vsock port of the guest where `sliver-init` listens, and of the host where it knocks.
pub const CONTROL_PORT: u32 = 807;
/// vsock port in the guest where commands are run.
pub const EXEC_PORT: u32 = 808;
/// Longest line, bytes: the files of an identity must fit.
pub const MAX_LINE: usize = 4 << 20;
/// The gateway every guest sees, and its MAC address.
pub const GATEWAY: (Ipv4Addr, [u8; 6]) =
    (Ipv4Addr::new(169, 254, 1, 1), [0x02, 0xff, 0xff, 0xff, 0xff, 0xff]);

/// Said at the host's port, once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Knock {
    /// The machine is up to "waiting for identity".
    Waiting,
}

/// Guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FromGuest {
    /// First line of each connection.
    Hello {
        /// Whether an identity was applied already.
        configured: bool,
        /// Status of the boot script, if it has ended.
        boot_script_exit: Option<i32>,
    },
    /// The identity is in force: network, keys, files, clock, entropy; commands may be run.
    Configured,
    /// The boot script ended (at once with 0 when there is none).
    BootScriptDone {
        /// Exit status; 128 + n when signal n ended it.
        exit: i32,
    },
    /// The identity could not be applied.
    Failed {
        /// What happened.
        message: String,
    },
}

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FromHost {
    /// Who the guest is.
    Identity(Box<Identity>),
    /// The host knows it; go on.
    Welcome,
    /// The machine was saved and goes on now, perhaps much later: sent after [`FromHost::Welcome`]. No answer.
    Resumed {
        /// Wall clock.
        now: Timestamp,
        /// 32 or more bytes from the host's random source, credited to the guest's.
        entropy: Bytes,
    },
}

/// Who a sliver is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its slice, also its host name (underscore as a hyphen).
    pub slice: SliceName,
    /// Its node.
    pub node: NodeId,
    /// Its network interface's MAC address: a clone's interface still has its template's.
    pub mac: [u8; 6],
    /// Size of its disk, bytes: a clone's kernel may still believe its template's.
    pub disk_bytes: u64,
    /// The node's one address.
    pub address: Ipv4Addr,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Its ports.
    pub ports: PortGrant,
    /// Who may log in: written to `/root/.ssh/authorized_keys` for the tenant's own use.
    pub ssh_keys: Vec<String>,
    /// `rc.vinit`.
    pub boot_script: String,
    /// Files to lay first.
    pub files: Vec<File>,
    /// Wall clock.
    pub now: Timestamp,
    /// 32 or more bytes from the host's random source, credited to the guest's.
    pub entropy: Bytes,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ends are updated at different times, so the lines are part of the contract.
    #[test]
    fn lines_are_what_they_were() {
        let line = |v: &FromGuest| serde_json::to_string(v).unwrap();
        let hello = FromGuest::Hello { configured: true, boot_script_exit: Some(3) };
        assert_eq!(line(&hello), r#"{"type":"hello","configured":true,"boot_script_exit":3}"#);
        assert_eq!(line(&FromGuest::Configured), r#"{"type":"configured"}"#);
        assert_eq!(line(&FromGuest::BootScriptDone { exit: 0 }), r#"{"type":"boot-script-done","exit":0}"#);
        assert_eq!(serde_json::from_str::<FromHost>(r#"{"type":"welcome"}"#).unwrap(), FromHost::Welcome);
        assert_eq!(serde_json::to_string(&Knock::Waiting).unwrap(), r#"{"type":"waiting"}"#);
    }
}
