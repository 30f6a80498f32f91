//! One method a call of PLC, in the order of `commonage_plc_api::rest`.
//!
//! Every one may fail with whatever [`crate::Error`] holds; who may call what is told there and checked by PLC.
#![allow(clippy::missing_errors_doc, reason = "all fail alike: said once above")]

use std::collections::BTreeSet;

use commonage_isolation_api::{NodeId, Privilege, SiteName, SliceName};
use commonage_plc_api::node::{Desired, Status};
use commonage_plc_api::rest::{
    AddSshKey, BootState, CreateNode, CreatePrincipal, CreateSite, CreateSlice, CurrentScript, IssuedNode,
    IssuedPrincipal, Me, Node, Principal, PrincipalName, PublicInfo, PublishScript, SetNodes, SetOwners,
    SetPrivileges, SetResources, SetSiteShares, Site, Slice, SshKey,
};
use reqwest::Method;

use crate::{Client, Result};

/// Who is asking, and whom.
impl Client {
    /// Who the caller is.
    pub async fn me(&self) -> Result<Me> {
        self.get("v1/me").await
    }

    /// PLC's CA and online key.
    pub async fn info(&self) -> Result<PublicInfo> {
        self.get("v1/ca").await
    }
}

/// Sites.
impl Client {
    /// Makes a site.
    pub async fn create_site(&self, site: &CreateSite) -> Result<Site> {
        self.send(Method::POST, "v1/sites", site).await
    }

    /// All sites.
    pub async fn sites(&self) -> Result<Vec<Site>> {
        self.get("v1/sites").await
    }

    /// One site.
    pub async fn site(&self, site: &SiteName) -> Result<Site> {
        self.get(&format!("v1/sites/{site}")).await
    }

    /// Changes a site's shares.
    pub async fn set_site_shares(&self, site: &SiteName, shares: u32) -> Result<Site> {
        self.send(Method::PUT, &format!("v1/sites/{site}/shares"), &SetSiteShares { shares }).await
    }
}

/// Principals and their SSH keys.
impl Client {
    /// Makes a principal and its certificate.
    pub async fn create_principal(&self, principal: &CreatePrincipal) -> Result<IssuedPrincipal> {
        self.send(Method::POST, "v1/principals", principal).await
    }

    /// The principals that the caller may see.
    pub async fn principals(&self) -> Result<Vec<Principal>> {
        self.get("v1/principals").await
    }

    /// One principal.
    pub async fn principal(&self, name: &PrincipalName) -> Result<Principal> {
        self.get(&format!("v1/principals/{name}")).await
    }

    /// Deletes a principal; slices lose it as owner.
    pub async fn delete_principal(&self, name: &PrincipalName) -> Result<()> {
        self.delete(&format!("v1/principals/{name}")).await
    }

    /// Adds an SSH key: an OpenSSH public key line.
    pub async fn add_ssh_key(&self, name: &PrincipalName, key: &str) -> Result<SshKey> {
        let body = AddSshKey { key: key.to_owned() };
        self.send(Method::POST, &format!("v1/principals/{name}/ssh-keys"), &body).await
    }

    /// A principal's SSH keys.
    pub async fn ssh_keys(&self, name: &PrincipalName) -> Result<Vec<SshKey>> {
        self.get(&format!("v1/principals/{name}/ssh-keys")).await
    }

    /// Removes the SSH key with this [`SshKey::id`].
    pub async fn remove_ssh_key(&self, name: &PrincipalName, id: &str) -> Result<()> {
        self.delete(&format!("v1/principals/{name}/ssh-keys/{id}")).await
    }
}

/// Nodes.
impl Client {
    /// Makes a node and its certificate.
    pub async fn create_node(&self, node: &CreateNode) -> Result<IssuedNode> {
        self.send(Method::POST, "v1/nodes", node).await
    }

    /// All nodes.
    pub async fn nodes(&self) -> Result<Vec<Node>> {
        self.get("v1/nodes").await
    }

    /// One node.
    pub async fn node(&self, node: &NodeId) -> Result<Node> {
        self.get(&format!("v1/nodes/{node}")).await
    }

    /// Deletes a node; slices lose it.
    pub async fn delete_node(&self, node: &NodeId) -> Result<()> {
        self.delete(&format!("v1/nodes/{node}")).await
    }
}

/// Slices.
impl Client {
    /// Makes a slice in the database.
    pub async fn create_slice(&self, name: &SliceName) -> Result<Slice> {
        self.send(Method::POST, "v1/slices", &CreateSlice { name: name.clone() }).await
    }

    /// The slices that the caller may see.
    pub async fn slices(&self) -> Result<Vec<Slice>> {
        self.get("v1/slices").await
    }

    /// One slice.
    pub async fn slice(&self, name: &SliceName) -> Result<Slice> {
        self.get(&format!("v1/slices/{name}")).await
    }

    /// One slice, as soon as its revision is another than `after`, or after `wait_s` seconds (at most 600) as it is.
    pub async fn slice_after(&self, name: &SliceName, after: u64, wait_s: u32) -> Result<Slice> {
        self.get_waiting(&format!("v1/slices/{name}"), after, wait_s).await
    }

    /// Removes a slice, and its slivers from their nodes.
    pub async fn delete_slice(&self, name: &SliceName) -> Result<()> {
        self.delete(&format!("v1/slices/{name}")).await
    }

    /// Says who is responsible for a slice.
    pub async fn set_owners(&self, name: &SliceName, owners: BTreeSet<PrincipalName>) -> Result<Slice> {
        self.send(Method::PUT, &format!("v1/slices/{name}/owners"), &SetOwners { owners }).await
    }

    /// Says how a slice's slivers start.
    pub async fn set_state(&self, name: &SliceName, state: &BootState) -> Result<Slice> {
        self.send(Method::PUT, &format!("v1/slices/{name}/state"), state).await
    }

    /// Assigns share and time, or renews.
    pub async fn set_resources(&self, name: &SliceName, resources: &SetResources) -> Result<Slice> {
        self.send(Method::PUT, &format!("v1/slices/{name}/resources"), resources).await
    }

    /// Makes a slice run on exactly these nodes.
    pub async fn instantiate_slice(&self, name: &SliceName, nodes: BTreeSet<NodeId>) -> Result<Slice> {
        self.send(Method::PUT, &format!("v1/slices/{name}/nodes"), &SetNodes { nodes }).await
    }

    /// Gives a slice privileges at the node manager.
    pub async fn set_privileges(&self, name: &SliceName, privileges: BTreeSet<Privilege>) -> Result<Slice> {
        let body = SetPrivileges { privileges };
        self.send(Method::PUT, &format!("v1/slices/{name}/privileges"), &body).await
    }
}

/// What a node calls.
impl Client {
    /// What should be on the calling node, as soon as its revision is another than `after`, or after `wait_s` seconds (at most 600).
    pub async fn desired(&self, after: u64, wait_s: u32) -> Result<Desired> {
        self.get_waiting("v1/node/desired", after, wait_s).await
    }

    /// Reports what is on the calling node.
    pub async fn put_status(&self, status: &Status) -> Result<()> {
        let _: serde_json::Value = self.send(Method::PUT, "v1/node/status", status).await?;
        Ok(())
    }
}

/// The boot script.
impl Client {
    /// Makes a signed boot script current.
    pub async fn publish_script(&self, script: &PublishScript) -> Result<CurrentScript> {
        self.send(Method::PUT, "v1/boot/script", script).await
    }

    /// The current boot script.
    pub async fn current_script(&self) -> Result<CurrentScript> {
        self.get("v1/boot/script").await
    }
}
