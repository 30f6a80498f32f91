//! Slices: the six operations of PLC version 1 on the database, and what is shown of them.
//!
//! Who may call is decided before (`permit`); values are checked before (`http::slices`).

use std::collections::BTreeSet;

use commonage_isolation_api::{NodeId, Privilege, SliceName};
use commonage_plc_api::node::{SliverOutcome, SliverReport};
use commonage_plc_api::rest::{BootState, Phase, PrincipalName, Resources, Slice, SliceSliver};
use sqlx::SqliteConnection;

use super::desired::{self, leave, settle, touch};
use super::{Tx, integer, json, name, number, time, to_json};
use crate::error::{Result, conflict, not_found};
use crate::wake::Topic;

#[derive(sqlx::FromRow)]
struct Row {
    name: String,
    site: String,
    revision: i64,
    created: i64,
    boot_script: String,
    base: String,
    es_slice: Option<String>,
    restart: String,
    share: Option<i64>,
    ends: Option<i64>,
    memory_mib: Option<i64>,
    disk_mib: Option<i64>,
    ports: Option<String>,
    privileges: String,
    instantiated: Option<i64>,
    rspec_share: Option<i64>,
}

#[derive(sqlx::FromRow)]
struct SliverRow {
    id: String,
    hostname: String,
    wanted: i64,
    status_revision: Option<i64>,
    status_address: Option<String>,
    status_host_key: Option<String>,
    report: Option<String>,
}

async fn read(db: &mut SqliteConnection, row: Row) -> Result<Slice> {
    let resources = match (row.share, row.ends, row.memory_mib, row.disk_mib, row.ports) {
        (Some(share), Some(end), Some(memory), Some(disk), Some(ports)) => Some(Resources {
            share: number(share)?,
            end: time(end)?,
            memory_mib: number(memory)?,
            disk_mib: number(disk)?,
            ports: json(&ports)?,
        }),
        _ => None,
    };
    let phase = match (row.instantiated, row.rspec_share) {
        (None, _) => Phase::Created,
        (Some(_), Some(_)) => Phase::Active,
        (Some(_), None) => Phase::Expired,
    };
    let owners: Vec<String> =
        sqlx::query_scalar("SELECT principal FROM slice_owners WHERE slice = ? ORDER BY principal")
            .bind(&row.name)
            .fetch_all(&mut *db)
            .await?;
    let rows: Vec<SliverRow> = sqlx::query_as(
        "SELECT id, hostname, wanted, status_revision, status_address, status_host_key, report \
         FROM slice_nodes JOIN nodes ON nodes.id = slice_nodes.node \
         LEFT JOIN reports ON reports.node = slice_nodes.node AND reports.slice = slice_nodes.slice \
         WHERE slice_nodes.slice = ? ORDER BY hostname",
    )
    .bind(&row.name)
    .fetch_all(db)
    .await?;
    Ok(Slice {
        site: name(&row.site)?,
        revision: number(row.revision)?,
        phase,
        owners: owners.iter().map(|o| name(o)).collect::<Result<_>>()?,
        state: BootState {
            boot_script: row.boot_script,
            base: row.base,
            es_slice: row.es_slice.as_deref().map(name).transpose()?,
            restart: name(&row.restart)?,
        },
        resources,
        rspec_share: row.rspec_share.map(number).transpose()?,
        privileges: json(&row.privileges)?,
        slivers: rows.into_iter().map(|r| sliver(&row.name, r)).collect::<Result<_>>()?,
        created: time(row.created)?,
        name: name(&row.name)?,
    })
}

fn sliver(slice: &str, row: SliverRow) -> Result<SliceSliver> {
    let report = row.report.as_deref().map(json::<SliverReport>).transpose()?;
    let current = row.status_revision.is_some_and(|r| r >= row.wanted);
    let (outcome, ports) = report.map_or((SliverOutcome::Pending, None), |r| (r.state, r.ports));
    Ok(SliceSliver {
        node: name(&row.id)?,
        hostname: row.hostname,
        ssh: row.status_address.as_ref().map(|a| format!("ssh {slice}@{a}")),
        address: row.status_address.as_deref().map(name).transpose()?,
        outcome,
        current,
        ports,
        ssh_host_key: row.status_host_key,
    })
}

/// All, by name.
pub async fn list(db: &mut SqliteConnection) -> Result<Vec<Slice>> {
    let rows: Vec<Row> = sqlx::query_as("SELECT * FROM slices ORDER BY name").fetch_all(&mut *db).await?;
    let mut slices = Vec::with_capacity(rows.len());
    for row in rows {
        slices.push(read(&mut *db, row).await?);
    }
    Ok(slices)
}

/// One.
///
/// # Errors
/// There is none, or the database fails.
pub async fn get(db: &mut SqliteConnection, slice: &SliceName) -> Result<Slice> {
    let row: Option<Row> = sqlx::query_as("SELECT * FROM slices WHERE name = ?")
        .bind(slice.as_str())
        .fetch_optional(&mut *db)
        .await?;
    let missing = || not_found(format!("there is no slice {slice}"), "a PI of its site creates it");
    read(db, row.ok_or_else(missing)?).await
}

/// create_slice.
///
/// # Errors
/// It exists, or the database fails.
pub async fn create(tx: &mut Tx, slice: &SliceName) -> Result<Slice> {
    let now = tx.now().as_millisecond();
    let state = BootState::default();
    // Revisions begin at the time, so that a slice that is made again is never taken for the one deleted.
    let made = sqlx::query(
        "INSERT INTO slices (name, site, revision, created, boot_script, base, privileges) \
         VALUES (?, ?, ?, ?, ?, ?, '[]') ON CONFLICT DO NOTHING",
    )
    .bind(slice.as_str())
    .bind(slice.site().as_str())
    .bind(now)
    .bind(now)
    .bind(state.boot_script)
    .bind(state.base)
    .execute(tx.conn())
    .await?;
    if made.rows_affected() == 0 {
        return Err(conflict(format!("slice {slice} exists already"), "choose another name").into());
    }
    get(tx.conn(), slice).await
}

/// delete_slice.
///
/// # Errors
/// The database fails.
pub async fn delete(tx: &mut Tx, slice: &Slice) -> Result<()> {
    leave(tx, &slice.name, &nodes_of(slice)).await?;
    sqlx::query("DELETE FROM slices WHERE name = ?").bind(slice.name.as_str()).execute(tx.conn()).await?;
    tx.changed(Topic::Slice(slice.name.clone()));
    settle(tx, &slice.site).await
}

/// set_owners.
///
/// # Errors
/// An owner is no principal, or the database fails.
pub async fn set_owners(tx: &mut Tx, slice: &SliceName, owners: &BTreeSet<PrincipalName>) -> Result<()> {
    sqlx::query("DELETE FROM slice_owners WHERE slice = ?").bind(slice.as_str()).execute(tx.conn()).await?;
    for owner in owners {
        super::principals::get(tx.conn(), owner).await?;
        sqlx::query("INSERT INTO slice_owners (slice, principal) VALUES (?, ?)")
            .bind(slice.as_str())
            .bind(owner.as_str())
            .execute(tx.conn())
            .await?;
    }
    touch(tx, slice).await
}

/// set_state.
///
/// # Errors
/// The database fails.
pub async fn set_state(tx: &mut Tx, slice: &SliceName, state: &BootState) -> Result<()> {
    sqlx::query("UPDATE slices SET boot_script = ?, base = ?, es_slice = ?, restart = ? WHERE name = ?")
        .bind(&state.boot_script)
        .bind(&state.base)
        .bind(state.es_slice.as_ref().map(|s| s.as_str()))
        .bind(state.restart.to_string())
        .bind(slice.as_str())
        .execute(tx.conn())
        .await?;
    touch(tx, slice).await
}

/// set_resources.
///
/// # Errors
/// The database fails.
pub async fn set_resources(tx: &mut Tx, slice: &SliceName, to: &Resources) -> Result<()> {
    sqlx::query(
        "UPDATE slices SET share = ?, ends = ?, memory_mib = ?, disk_mib = ?, ports = ? WHERE name = ?",
    )
    .bind(to.share)
    .bind(to.end.as_millisecond())
    .bind(to.memory_mib)
    .bind(to.disk_mib)
    .bind(to_json(&to.ports)?)
    .bind(slice.as_str())
    .execute(tx.conn())
    .await?;
    touch(tx, slice).await?;
    settle(tx, &slice.site()).await
}

/// instantiate_slice. Nodes that stay see no change unless shares move.
///
/// # Errors
/// A node does not exist, or the database fails.
pub async fn instantiate(tx: &mut Tx, slice: &Slice, nodes: &BTreeSet<NodeId>) -> Result<()> {
    let present = nodes_of(slice);
    leave(tx, &slice.name, &present.difference(nodes).cloned().collect()).await?;
    for node in nodes.difference(&present) {
        super::nodes::get(tx.conn(), node).await?;
        let wanted = desired::touch_node(tx, node).await?;
        sqlx::query("INSERT INTO slice_nodes (slice, node, wanted) VALUES (?, ?, ?)")
            .bind(slice.name.as_str())
            .bind(node.as_str())
            .bind(integer(wanted))
            .execute(tx.conn())
            .await?;
    }
    let now = tx.now().as_millisecond();
    sqlx::query("UPDATE slices SET instantiated = coalesce(instantiated, ?) WHERE name = ?")
        .bind(now)
        .bind(slice.name.as_str())
        .execute(tx.conn())
        .await?;
    desired::touch_slice(tx, &slice.name).await?;
    settle(tx, &slice.site).await
}

/// Gives privileges.
///
/// # Errors
/// The database fails.
pub async fn set_privileges(tx: &mut Tx, slice: &SliceName, privileges: &BTreeSet<Privilege>) -> Result<()> {
    sqlx::query("UPDATE slices SET privileges = ? WHERE name = ?")
        .bind(to_json(privileges)?)
        .bind(slice.as_str())
        .execute(tx.conn())
        .await?;
    touch(tx, slice).await
}

fn nodes_of(slice: &Slice) -> BTreeSet<NodeId> {
    slice.slivers.iter().map(|s| s.node.clone()).collect()
}
