//! Nodes: as principals see them, and what nodes themselves pull and report.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use commonage_isolation_api::{NodeId, SliceName};
use commonage_nodemgr_api::Bytes;
use commonage_plc_api::node::{Desired, Status};
use commonage_plc_api::rest::{CreateNode, IssuedNode, Node, Wait};
use commonage_plc_api::{ApiError, Code};

use super::extract::{Asked, Body, Named, Who};
use super::openapi::{Empty, Errors};
use super::{Shared, done, poll};
use crate::db::{desired as wanted, nodes as stored, principals, sites};
use crate::error::{Error, Result, invalid};
use crate::permit::{Caller, SliceCall};
use crate::wake::Topic;

/// Longest version or host key a node may report, bytes.
const MAX_TEXT: usize = 4096;

/// Makes a node and its certificate. Admins; PIs for their site.
#[utoipa::path(post, path = "/v1/nodes", tag = "nodes", request_body = CreateNode, responses((status = 200, body = IssuedNode), Errors))]
pub async fn create(
    State(app): Shared,
    Who(caller): Who,
    Body(new): Body<CreateNode>,
) -> Result<Json<IssuedNode>> {
    caller.keeper(&new.site)?;
    check_hostname(&new.hostname)?;
    let id: NodeId = uuid::Uuid::new_v4().to_string().parse().map_err(Error::corrupt("node id"))?;
    let issued = app.keys.issue(&new.csr, id.as_str())?;
    let mut tx = app.db.write().await?;
    sites::get(tx.conn(), &new.site).await?;
    let node = stored::create(&mut tx, &id, &new.site, &new.hostname, &issued.key_sha256).await?;
    tx.commit().await?;
    tracing::info!(node = %id, site = %new.site, hostname = new.hostname, "node created");
    Ok(Json(IssuedNode {
        node,
        certificate_pem: issued.pem,
        ca_pem: app.keys.ca_pem.clone(),
        online_key: Bytes(app.keys.online.verifying_key().to_bytes().to_vec()),
    }))
}

/// All nodes. Principals.
#[utoipa::path(get, path = "/v1/nodes", tag = "nodes", responses((status = 200, body = Vec<Node>), Errors))]
pub async fn list(State(app): Shared, Who(caller): Who) -> Result<Json<Vec<Node>>> {
    let me = caller.principal()?;
    let mut db = app.db.read().await?;
    let owned = principals::owned_by(&mut db, &me.name).await?;
    let nodes = stored::list(&mut db).await?;
    Ok(Json(nodes.into_iter().map(|n| seen_by(&caller, &owned, n)).collect()))
}

/// One node. Principals.
#[utoipa::path(get, path = "/v1/nodes/{node}", tag = "nodes", params(("node" = String, Path)), responses((status = 200, body = Node), Errors))]
pub async fn get(State(app): Shared, Who(caller): Who, Named(node): Named<NodeId>) -> Result<Json<Node>> {
    let me = caller.principal()?;
    let mut db = app.db.read().await?;
    let owned = principals::owned_by(&mut db, &me.name).await?;
    Ok(Json(seen_by(&caller, &owned, stored::get(&mut db, &node).await?)))
}

/// Deletes a node; its slices lose it, its certificate is worth nothing any more. Admins; PIs of its site.
#[utoipa::path(delete, path = "/v1/nodes/{node}", tag = "nodes", params(("node" = String, Path)), responses((status = 200, body = Empty), Errors))]
pub async fn delete(State(app): Shared, Who(caller): Who, Named(node): Named<NodeId>) -> Result<Json<Empty>> {
    caller.principal()?;
    let mut tx = app.db.write().await?;
    caller.keeper(&stored::get(tx.conn(), &node).await?.site)?;
    stored::delete(&mut tx, &node).await?;
    tx.commit().await?;
    tracing::info!(%node, "node deleted");
    Ok(done())
}

/// What should be on the calling node.
#[utoipa::path(get, path = "/v1/node/desired", tag = "node side", params(Wait), responses((status = 200, body = Desired), Errors))]
pub async fn desired(
    State(app): Shared,
    Who(caller): Who,
    Asked(wait): Asked<Wait>,
) -> Result<Json<Desired>> {
    let node = caller.node()?;
    let read = || {
        let (app, node) = (Arc::clone(&app), node.clone());
        async move {
            let mut db = app.db.read().await?;
            wanted::desired(&mut db, &node).await
        }
    };
    let topic = Topic::Node(node.clone());
    Ok(Json(poll(&app, topic, wait, |d: &Desired| d.revision, read).await?))
}

/// The calling node reports what is on it.
#[utoipa::path(put, path = "/v1/node/status", tag = "node side", request_body = Status, responses((status = 200, body = Empty), Errors))]
pub async fn report(State(app): Shared, Who(caller): Who, Body(status): Body<Status>) -> Result<Json<Empty>> {
    let node = caller.node()?;
    if status.version.len().max(status.ssh_host_key.len()) > MAX_TEXT {
        let message = "the version or the SSH host key is longer than 4,096 bytes";
        return Err(ApiError::new(Code::Invalid, message).into());
    }
    let mut tx = app.db.write().await?;
    stored::reported(&mut tx, node, &status).await?;
    tx.commit().await?;
    Ok(done())
}

fn seen_by(caller: &Caller, owned: &BTreeSet<SliceName>, mut node: Node) -> Node {
    if let (Ok(me), Some(status)) = (caller.principal(), &mut node.status) {
        status.slivers.retain(|report| {
            let owners = owned.contains(&report.slice).then(|| me.name.clone()).into_iter().collect();
            caller.may_call_slice(SliceCall::Read, &report.slice.site(), &owners).is_ok()
        });
    }
    node
}

fn check_hostname(name: &str) -> std::result::Result<(), ApiError> {
    let ok = (1..=253).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'-');
    if ok {
        return Ok(());
    }
    Err(invalid("that is no host name", "1 to 253 letters, digits, dots or hyphens, like node1.example.org"))
}
