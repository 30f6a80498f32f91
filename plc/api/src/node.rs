//! What a node's agent pulls from PLC and reports to it. The caller is the node whose certificate made the connection.
//!
//! | call | body → answer |
//! |---|---|
//! | `GET /v1/node/desired?after=R&wait_s=S` | → [`Desired`], as soon as its revision exceeds R, or after S seconds (at most 600) with the present one |
//! | `PUT /v1/node/status` | [`Status`] → `{}` |

use std::net::Ipv4Addr;

use commonage_isolation_api::{Rspec, SliceName};
use commonage_nodemgr_api::http::{PortGrant, SliverConfig};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Everything that should be on the node. What is not named should not be there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Desired {
    /// Grows with each change that concerns the node.
    pub revision: u64,
    /// Its slivers.
    pub slivers: Vec<DesiredSliver>,
}

/// One sliver as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DesiredSliver {
    /// Its slice.
    #[schema(value_type = String)]
    pub slice: SliceName,
    /// What it may use.
    #[schema(value_type = Object)]
    pub rspec: Rspec,
    /// How it starts.
    #[schema(value_type = Object)]
    pub config: SliverConfig,
}

/// What is on the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// The revision this was reached for (or attempted).
    pub revision: u64,
    /// The node's one address.
    #[schema(value_type = String)]
    pub address: Ipv4Addr,
    /// The SSH front door's host key, an OpenSSH public key.
    pub ssh_host_key: String,
    /// Version of the node's software.
    pub version: String,
    /// Its slivers, also those that could not be made.
    pub slivers: Vec<SliverReport>,
}

/// One sliver as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SliverReport {
    /// Its slice.
    #[schema(value_type = String)]
    pub slice: SliceName,
    /// How far it is.
    #[serde(flatten)]
    pub state: SliverOutcome,
    /// Its ports, once granted.
    #[schema(value_type = Option<Object>)]
    pub ports: Option<PortGrant>,
}

/// How far a sliver is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum SliverOutcome {
    /// PLC wants it; the node has not reported yet.
    Pending,
    /// Booting, or its boot script runs.
    Starting,
    /// Its boot script has ended.
    Running {
        /// With this status.
        boot_script_exit: i32,
    },
    /// It could not be made, or fails to run.
    Failed {
        /// Why, and what to do.
        reason: String,
    },
    /// Its machine ended and is not started again, as its slice wants.
    Stopped {
        /// How it ended.
        reason: String,
    },
}
