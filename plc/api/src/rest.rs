//! The REST API for principals, under `/v1`, over mutual TLS. The caller is the principal whose certificate made the connection.
//!
//! PLC version 1 (PDN-04-017 §3.3): relative shares. Who may call what is exactly that section's; *PI* below is a PI of the
//! slice's (or node's) own site, *owner* an owner assigned to the slice. An admin keeps sites, principals and nodes, and reads everything;
//! slices belong to their sites, so an admin changes none, except for the privileges that PLC alone may give.
//!
//! | call | who may | body → answer |
//! |---|---|---|
//! | `GET /v1/me` | anyone known | → [`Me`] |
//! | `GET /v1/ca` | anyone known | → [`PublicInfo`] |
//! | `POST /v1/sites` | admin | [`CreateSite`] → [`Site`] |
//! | `GET /v1/sites`, `GET /v1/sites/{site}` | principals | → `[Site]`, [`Site`] |
//! | `PUT /v1/sites/{site}/shares` | admin | [`SetSiteShares`] → [`Site`] |
//! | `POST /v1/principals` | admin; PI for users of the own site | [`CreatePrincipal`] → [`IssuedPrincipal`] |
//! | `GET /v1/principals`, `GET /v1/principals/{name}` | admin all; PI the own site's; anyone itself | → `[Principal]`, [`Principal`] |
//! | `DELETE /v1/principals/{name}` | admin; PI for users of the own site | → `{}` |
//! | `POST /v1/principals/{name}/ssh-keys` | itself; its site's PI | [`AddSshKey`] → [`SshKey`] |
//! | `GET /v1/principals/{name}/ssh-keys` | itself; its site's PI; admin | → `[SshKey]` |
//! | `DELETE /v1/principals/{name}/ssh-keys/{id}` | itself; its site's PI | → `{}` |
//! | `POST /v1/nodes` | admin; PI for the own site | [`CreateNode`] → [`IssuedNode`] |
//! | `GET /v1/nodes`, `GET /v1/nodes/{node}` | principals | → `[Node]`, [`Node`] |
//! | `DELETE /v1/nodes/{node}` | admin; PI for the own site | → `{}` |
//! | `POST /v1/slices` (create_slice) | PI | [`CreateSlice`] → [`Slice`] |
//! | `GET /v1/slices`, `GET /v1/slices/{slice}` | admin all; PI the own site's; owner the own | → `[Slice]`, [`Slice`]; the second takes [`Wait`] |
//! | `DELETE /v1/slices/{slice}` (delete_slice) | PI, owner | → `{}` |
//! | `PUT /v1/slices/{slice}/owners` (set_owners) | PI, owner | [`SetOwners`] → [`Slice`] |
//! | `PUT /v1/slices/{slice}/state` (set_state) | PI, owner | [`BootState`] → [`Slice`] |
//! | `PUT /v1/slices/{slice}/resources` (set_resources) | PI; once instantiated also owner, within limits | [`SetResources`] → [`Slice`] |
//! | `PUT /v1/slices/{slice}/nodes` (instantiate_slice) | PI, owner | [`SetNodes`] → [`Slice`] |
//! | `PUT /v1/slices/{slice}/privileges` | admin | [`SetPrivileges`] → [`Slice`] |
//! | `PUT /v1/boot/files/{sha256}` | admin | the file's bytes → [`BootFile`] |
//! | `GET /v1/boot/files/{sha256}` | nodes, admin | → the file's bytes |
//! | `PUT /v1/boot/script` | admin | [`PublishScript`] → [`CurrentScript`] |
//! | `GET /v1/boot/script` | principals | → [`CurrentScript`] |
//!
//! What nodes call is in [`crate::node`] and [`crate::boot`]. JSON bodies over [`MAX_BODY`] are refused with 413.
//! Every error is an [`crate::ErrorBody`]. Times are UTC, RFC 3339.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use commonage_isolation_api::{NodeId, Ports, Privilege, SiteName, SliceName};
use commonage_nodemgr_api::Bytes;
use commonage_nodemgr_api::http::PortGrant;
pub use commonage_nodemgr_api::http::RestartPolicy;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::boot::Facts;
use crate::node::{SliverOutcome, SliverReport};

/// Largest JSON body, bytes.
pub const MAX_BODY: usize = 1 << 20;
/// Largest slice boot script, bytes.
pub const MAX_BOOT_SCRIPT: usize = 256 << 10;
/// Most SSH keys a principal may have.
pub const MAX_SSH_KEYS: usize = 16;
/// Longest a long poll waits, seconds.
pub const MAX_WAIT_S: u32 = 600;
/// Site shares a new site gets when nothing else is said.
pub const DEFAULT_SITE_SHARES: u32 = 100;
/// Bases a slice may start from.
pub const BASES: [&str; 2] = ["debian", "mini"];

/// A principal's name: 1 to 32 lower-case letters, digits, dots or hyphens, a letter first. Unique over all sites.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PrincipalName(String);

/// Not the form of a principal's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no principal's name: 1 to 32 lower-case letters, digits, dots or hyphens, a letter first")]
pub struct PrincipalNameError(String);

impl PrincipalName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PrincipalName {
    type Err = PrincipalNameError;
    fn from_str(s: &str) -> Result<Self, PrincipalNameError> {
        let ok = (1..=32).contains(&s.len())
            && s.starts_with(|c: char| c.is_ascii_lowercase())
            && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'.' || b == b'-');
        if ok { Ok(Self(s.to_owned())) } else { Err(PrincipalNameError(s.chars().take(40).collect())) }
    }
}

impl fmt::Display for PrincipalName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for PrincipalName {
    type Error = PrincipalNameError;
    fn try_from(s: String) -> Result<Self, PrincipalNameError> {
        s.parse()
    }
}

impl From<PrincipalName> for String {
    fn from(v: PrincipalName) -> String {
        v.0
    }
}

/// What a principal may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Keeps PLC: sites, PIs, nodes, the boot server.
    Admin,
    /// Responsible for a site: its users, nodes, slices.
    Pi,
    /// May own slices.
    User,
}

/// Who the caller is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Me {
    /// A principal.
    Principal(Principal),
    /// A node.
    Node {
        /// Which one.
        #[schema(value_type = String)]
        node: NodeId,
    },
}

/// What anyone needs to know of PLC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PublicInfo {
    /// The CA that all certificates come from, PEM.
    pub ca_pem: String,
    /// The online key that boot grants are signed with: 32 bytes, base64.
    #[schema(value_type = String, format = Byte)]
    pub online_key: Bytes,
    /// Version of PLC.
    pub version: String,
}

/// Makes a site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSite {
    /// Its name: 1 to 16 lower-case letters or digits, a letter first.
    #[schema(value_type = String)]
    pub name: SiteName,
    /// Its site shares, 1 to 10,000; 100 when absent.
    pub shares: Option<u32>,
}

/// Changes what a site gets of the whole testbed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetSiteShares {
    /// Site shares, 1 to 10,000.
    pub shares: u32,
}

/// A site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Site {
    /// Its name.
    #[schema(value_type = String)]
    pub name: SiteName,
    /// Its site shares.
    pub shares: u32,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
}

/// Makes a principal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreatePrincipal {
    /// The name.
    #[schema(value_type = String)]
    pub name: PrincipalName,
    /// The site; only an admin may be without.
    #[schema(value_type = Option<String>)]
    pub site: Option<SiteName>,
    /// At least one.
    pub roles: BTreeSet<Role>,
    /// A certificate signing request, PEM. Only its public key counts.
    pub csr: String,
}

/// A principal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Principal {
    /// The name.
    #[schema(value_type = String)]
    pub name: PrincipalName,
    /// The site.
    #[schema(value_type = Option<String>)]
    pub site: Option<SiteName>,
    /// Roles.
    pub roles: BTreeSet<Role>,
    /// SHA-256 of the public key (SubjectPublicKeyInfo), lower-case hexadecimal.
    pub key_sha256: String,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
}

/// A new principal and its certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IssuedPrincipal {
    /// The principal.
    pub principal: Principal,
    /// Its certificate, PEM.
    pub certificate_pem: String,
    /// The CA, PEM.
    pub ca_pem: String,
}

/// Adds an SSH key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddSshKey {
    /// One line as in `id_ed25519.pub`, without options.
    pub key: String,
}

/// An SSH key of a principal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SshKey {
    /// SHA-256 of the key, lower-case hexadecimal: its name in paths.
    pub id: String,
    /// The fingerprint as `ssh-keygen -l` shows it.
    pub fingerprint: String,
    /// The OpenSSH line.
    pub key: String,
}

/// Makes a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateNode {
    /// The site that hosts it.
    #[schema(value_type = String)]
    pub site: SiteName,
    /// For people; 1 to 253 letters, digits, dots or hyphens.
    pub hostname: String,
    /// A certificate signing request, PEM. Only its public key counts.
    pub csr: String,
}

/// A new node and its certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IssuedNode {
    /// The node.
    pub node: Node,
    /// Its certificate, PEM.
    pub certificate_pem: String,
    /// The CA, PEM.
    pub ca_pem: String,
    /// PLC's online key: 32 bytes, base64.
    #[schema(value_type = String, format = Byte)]
    pub online_key: Bytes,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Its identifier.
    #[schema(value_type = String)]
    pub node: NodeId,
    /// The site that hosts it.
    #[schema(value_type = String)]
    pub site: SiteName,
    /// For people.
    pub hostname: String,
    /// Revision of what PLC wants of it.
    pub revision: u64,
    /// Its address, as it last reported.
    #[schema(value_type = Option<String>)]
    pub address: Option<Ipv4Addr>,
    /// Its last boot.
    pub boot: Option<NodeBoot>,
    /// Its last report; slices that the caller may not see are left out.
    pub status: Option<NodeStatus>,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
}

/// The last time a node asked how to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeBoot {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// Which release it was given.
    pub release: String,
    /// What it is made of.
    pub facts: Facts,
}

/// What a node last reported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeStatus {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// The revision it reached or attempted.
    pub revision: u64,
    /// The SSH front door's host key, an OpenSSH public key.
    pub ssh_host_key: String,
    /// Version of the node's software.
    pub version: String,
    /// Its slivers.
    pub slivers: Vec<SliverReport>,
}

/// Makes a slice. It changes PLC's database only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSlice {
    /// `site_name`, the site being the caller's.
    #[schema(value_type = String)]
    pub name: SliceName,
}

/// Says who is responsible for a slice. Once it is instantiated, owners can log in with their SSH keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetOwners {
    /// All of them.
    #[schema(value_type = Vec<String>)]
    pub owners: BTreeSet<PrincipalName>,
}

/// How a slice's slivers start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootState {
    /// `rc.vinit`: run at each start, by `/bin/sh` when it has no `#!` line.
    #[serde(default)]
    pub boot_script: String,
    /// `debian` or `mini`.
    #[serde(default = "default_base")]
    pub base: String,
    /// The slice that keeps its software.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub es_slice: Option<SliceName>,
    /// Whether a sliver is started again when its machine ends: `always`, `on-failure` or `never`.
    #[serde(default)]
    #[schema(value_type = String)]
    pub restart: RestartPolicy,
}

fn default_base() -> String {
    BASES[0].to_owned()
}

impl Default for BootState {
    fn default() -> Self {
        Self {
            boot_script: String::new(),
            base: default_base(),
            es_slice: None,
            restart: RestartPolicy::default(),
        }
    }
}

/// Assigns a slice share for some time; of an instantiated slice, renews it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetResources {
    /// The slice share s_i, 1 to 1,000,000: the slice's weight among its site's slices.
    pub share: u32,
    /// Until when.
    #[schema(value_type = String, format = DateTime)]
    pub end: Timestamp,
    /// Guest memory of each sliver, MiB; absent: as it was, at first 128.
    pub memory_mib: Option<u32>,
    /// Disk of each sliver, MiB; absent: as it was, at first 1,024.
    pub disk_mib: Option<u32>,
    /// Ports of each sliver; absent: as they were, at first a block of 64.
    #[schema(value_type = Option<Object>)]
    pub ports: Option<Ports>,
}

/// The set of nodes a slice runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetNodes {
    /// All of them, of any site.
    #[schema(value_type = Vec<String>)]
    pub nodes: BTreeSet<NodeId>,
}

/// Gives a slice's slivers privileges at the node manager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetPrivileges {
    /// All of them.
    #[schema(value_type = Vec<String>)]
    pub privileges: BTreeSet<Privilege>,
}

/// How far a slice is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// In the database only.
    Created,
    /// Instantiated and not expired: it takes part in its site's shares.
    Active,
    /// Instantiated, but its time is over: its slivers are gone until it is renewed.
    Expired,
}

/// What a slice has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resources {
    /// The slice share s_i.
    pub share: u32,
    /// Until when.
    #[schema(value_type = String, format = DateTime)]
    pub end: Timestamp,
    /// Guest memory of each sliver, MiB.
    pub memory_mib: u32,
    /// Disk of each sliver, MiB.
    pub disk_mib: u32,
    /// Ports of each sliver.
    #[schema(value_type = Object)]
    pub ports: Ports,
}

/// A slice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Slice {
    /// Its name.
    #[schema(value_type = String)]
    pub name: SliceName,
    /// Its site.
    #[schema(value_type = String)]
    pub site: SiteName,
    /// Grows with each change of this answer; for [`Wait::after`].
    pub revision: u64,
    /// How far it is.
    pub phase: Phase,
    /// Its owners.
    #[schema(value_type = Vec<String>)]
    pub owners: BTreeSet<PrincipalName>,
    /// How its slivers start.
    pub state: BootState,
    /// What it has, once set.
    pub resources: Option<Resources>,
    /// rspec.share of its slivers, thousandths: (s_i / Σ s) × S over its site's active slices. Absent unless active.
    pub rspec_share: Option<u32>,
    /// Privileges of its slivers.
    #[schema(value_type = Vec<String>)]
    pub privileges: BTreeSet<Privilege>,
    /// Its slivers, one a node.
    pub slivers: Vec<SliceSliver>,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
}

impl Slice {
    /// Whether every sliver has come to rest as it is wanted now: running, failed or stopped, by a report about the present revision.
    pub fn settled(&self) -> bool {
        self.slivers.iter().all(|s| {
            let settled = !matches!(s.outcome, SliverOutcome::Pending | SliverOutcome::Starting);
            s.current && settled
        })
    }
}

/// A slice's sliver on one node, as the node last reported it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SliceSliver {
    /// The node.
    #[schema(value_type = String)]
    pub node: NodeId,
    /// The node's name.
    pub hostname: String,
    /// The node's address, once reported.
    #[schema(value_type = Option<String>)]
    pub address: Option<Ipv4Addr>,
    /// How far it is: `{"state": "pending" | "starting" | "running" | "failed", …}`.
    #[serde(flatten)]
    pub outcome: SliverOutcome,
    /// Whether the report is about what is wanted now, not about something older.
    pub current: bool,
    /// Its ports, once granted.
    #[schema(value_type = Option<Object>)]
    pub ports: Option<PortGrant>,
    /// How to log in, once the node's address is known: `ssh slice@address`.
    pub ssh: Option<String>,
    /// The node's SSH host key, an OpenSSH public key, once reported.
    pub ssh_host_key: Option<String>,
}

/// A long poll: answers as soon as the revision is another than `after`, or after `wait_s` seconds with the present one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, IntoParams, ToSchema)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Wait {
    /// The revision the caller has. Absent: answers at once.
    pub after: Option<u64>,
    /// Seconds, at most 600. Absent: answers at once.
    pub wait_s: Option<u32>,
}

/// A file that boot scripts can install.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BootFile {
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
    /// Bytes.
    pub size: u64,
}

/// Makes a boot script current. Every file it installs must have been put before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishScript {
    /// A [`crate::boot::Script`] as JSON, exactly as signed, base64.
    #[schema(value_type = String, format = Byte)]
    pub script: Bytes,
    /// By the offline key, base64.
    #[schema(value_type = String, format = Byte)]
    pub signature: Bytes,
    /// The offline key's public half: 32 bytes, base64. PLC checks the signature with it; nodes check with the one on their CD.
    #[schema(value_type = String, format = Byte)]
    pub offline_key: Bytes,
}

/// The boot script that nodes get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CurrentScript {
    /// Its release.
    pub release: String,
    /// SHA-256 of the script's bytes, lower-case hexadecimal.
    pub sha256: String,
    /// The offline key it is signed with: 32 bytes, base64.
    #[schema(value_type = String, format = Byte)]
    pub offline_key: Bytes,
    /// When it became current.
    #[schema(value_type = String, format = DateTime)]
    pub published: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_in_paths() {
        for good in ["a", "larry.peterson", "x-1", &"a".repeat(32)] {
            assert!(good.parse::<PrincipalName>().is_ok(), "{good}");
        }
        for bad in ["", "1a", ".a", "A", "a/b", "a b", "a%", "ä", &"a".repeat(33)] {
            assert!(bad.parse::<PrincipalName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_boot_state_has_defaults() {
        assert_eq!(serde_json::from_str::<BootState>("{}").unwrap(), BootState::default());
        assert_eq!(BootState::default().base, "debian");
    }
}
