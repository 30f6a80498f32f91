//! Nodes: who they are, how they last booted, what they last reported.

use std::collections::BTreeMap;

use commonage_isolation_api::{NodeId, SiteName, SliceName};
use commonage_plc_api::boot::Facts;
use commonage_plc_api::node::{SliverOutcome, SliverReport, Status};
use commonage_plc_api::rest::{Node, NodeBoot, NodeStatus};
use sqlx::SqliteConnection;

use super::{Tx, desired, integer, json, name, number, principals, time, to_json};
use crate::error::{Result, conflict, not_found};

/// Longest reason of a failure that is kept, bytes.
const MAX_REASON: usize = 4096;

#[derive(sqlx::FromRow)]
struct Row {
    id: String,
    site: String,
    hostname: String,
    revision: i64,
    created: i64,
    boot_at: Option<i64>,
    boot_release: Option<String>,
    boot_facts: Option<String>,
    status_at: Option<i64>,
    status_revision: Option<i64>,
    status_address: Option<String>,
    status_host_key: Option<String>,
    status_version: Option<String>,
}

async fn read(db: &mut SqliteConnection, row: Row) -> Result<Node> {
    let boot = match (row.boot_at, row.boot_release, row.boot_facts) {
        (Some(at), Some(release), Some(facts)) => {
            Some(NodeBoot { at: time(at)?, release, facts: json(&facts)? })
        }
        _ => None,
    };
    let status = match (row.status_at, row.status_revision, row.status_host_key, row.status_version) {
        (Some(at), Some(revision), Some(ssh_host_key), Some(version)) => Some(NodeStatus {
            at: time(at)?,
            revision: number(revision)?,
            ssh_host_key,
            version,
            slivers: reports(db, &row.id).await?.into_values().collect(),
        }),
        _ => None,
    };
    Ok(Node {
        node: name(&row.id)?,
        site: name(&row.site)?,
        hostname: row.hostname,
        revision: number(row.revision)?,
        address: row.status_address.as_deref().map(name).transpose()?,
        boot,
        status,
        created: time(row.created)?,
    })
}

async fn reports(db: &mut SqliteConnection, node: &str) -> Result<BTreeMap<SliceName, SliverReport>> {
    let rows: Vec<String> = sqlx::query_scalar("SELECT report FROM reports WHERE node = ? ORDER BY slice")
        .bind(node)
        .fetch_all(db)
        .await?;
    rows.iter().map(|text| json::<SliverReport>(text).map(|r| (r.slice.clone(), r))).collect()
}

/// All, by host name.
pub async fn list(db: &mut SqliteConnection) -> Result<Vec<Node>> {
    let rows: Vec<Row> = sqlx::query_as("SELECT * FROM nodes ORDER BY hostname").fetch_all(&mut *db).await?;
    let mut nodes = Vec::with_capacity(rows.len());
    for row in rows {
        nodes.push(read(&mut *db, row).await?);
    }
    Ok(nodes)
}

/// One.
///
/// # Errors
/// There is none, or the database fails.
pub async fn get(db: &mut SqliteConnection, node: &NodeId) -> Result<Node> {
    let row: Option<Row> = sqlx::query_as("SELECT * FROM nodes WHERE id = ?")
        .bind(node.as_str())
        .fetch_optional(&mut *db)
        .await?;
    let missing = || not_found(format!("there is no node {node}"), "list the nodes to see which there are");
    read(db, row.ok_or_else(missing)?).await
}

/// Makes one.
///
/// # Errors
/// The key or the host name is taken, or the database fails.
pub async fn create(
    tx: &mut Tx,
    node: &NodeId,
    site: &SiteName,
    hostname: &str,
    key_sha256: &str,
) -> Result<Node> {
    principals::key_is_new(tx.conn(), key_sha256).await?;
    let now = tx.now().as_millisecond();
    let made = sqlx::query(
        "INSERT INTO nodes (id, site, hostname, key_sha256, revision, created) VALUES (?, ?, ?, ?, 1, ?) \
         ON CONFLICT DO NOTHING",
    )
    .bind(node.as_str())
    .bind(site.as_str())
    .bind(hostname)
    .bind(key_sha256)
    .bind(now)
    .execute(tx.conn())
    .await?;
    if made.rows_affected() == 0 {
        let message = format!("there is a node named {hostname} already");
        return Err(conflict(message, "choose another host name, or delete that node first").into());
    }
    get(tx.conn(), node).await
}

/// Deletes one; its slices lose it.
///
/// # Errors
/// The database fails.
pub async fn delete(tx: &mut Tx, node: &NodeId) -> Result<()> {
    let slices = desired::wanted(tx.conn(), node).await?;
    desired::touch_node(tx, node).await?;
    sqlx::query("DELETE FROM nodes WHERE id = ?").bind(node.as_str()).execute(tx.conn()).await?;
    for (slice, _) in slices {
        desired::touch_slice(tx, &slice).await?;
    }
    Ok(())
}

/// Records that a node asked how to boot.
///
/// # Errors
/// The database fails.
pub async fn booted(tx: &mut Tx, node: &NodeId, release: &str, facts: &Facts) -> Result<()> {
    let now = tx.now().as_millisecond();
    sqlx::query("UPDATE nodes SET boot_at = ?, boot_release = ?, boot_facts = ? WHERE id = ?")
        .bind(now)
        .bind(release)
        .bind(to_json(facts)?)
        .bind(node.as_str())
        .execute(tx.conn())
        .await?;
    Ok(())
}

/// Records a report, and raises the revision of every slice that looks different now.
///
/// # Errors
/// There is no such node, or the database fails.
pub async fn reported(tx: &mut Tx, node: &NodeId, status: &Status) -> Result<()> {
    let before = get(tx.conn(), node).await?;
    let old = reports(tx.conn(), node.as_str()).await?;
    let new: BTreeMap<_, _> = status.slivers.iter().map(|r| (r.slice.clone(), clipped(r))).collect();
    // A node that claims to be ahead (PLC was restored from a backup) has not seen what is wanted now.
    let revision = if status.revision > before.revision { 0 } else { status.revision };
    let now = tx.now().as_millisecond();
    sqlx::query(
        "UPDATE nodes SET status_at = ?, status_revision = ?, status_address = ?, status_host_key = ?, \
         status_version = ? WHERE id = ?",
    )
    .bind(now)
    .bind(integer(revision))
    .bind(status.address.to_string())
    .bind(&status.ssh_host_key)
    .bind(&status.version)
    .bind(node.as_str())
    .execute(tx.conn())
    .await?;
    if old != new {
        sqlx::query("DELETE FROM reports WHERE node = ?").bind(node.as_str()).execute(tx.conn()).await?;
        for report in new.values() {
            sqlx::query("INSERT INTO reports (node, slice, report) VALUES (?, ?, ?)")
                .bind(node.as_str())
                .bind(report.slice.as_str())
                .bind(to_json(report)?)
                .execute(tx.conn())
                .await?;
        }
    }
    let was = before.status.as_ref();
    let moved =
        before.address != Some(status.address) || was.is_none_or(|s| s.ssh_host_key != status.ssh_host_key);
    for (slice, wanted) in desired::wanted(tx.conn(), node).await? {
        let current = |at: Option<u64>| at.is_some_and(|r| r >= wanted);
        let turned = current(was.map(|s| s.revision)) != current(Some(revision));
        if moved || turned || old.get(&slice) != new.get(&slice) {
            desired::touch_slice(tx, &slice).await?;
        }
    }
    Ok(())
}

fn clipped(report: &SliverReport) -> SliverReport {
    let mut report = report.clone();
    if let SliverOutcome::Failed { reason } | SliverOutcome::Stopped { reason } = &mut report.state {
        let end = (0..=MAX_REASON).rev().find(|i| reason.is_char_boundary(*i)).unwrap_or(0);
        reason.truncate(end);
    }
    report
}
