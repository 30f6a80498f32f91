//! What nodes should run, and the revisions that tell them of changes.
//!
//! Invariants:
//! - a slice's `rspec_share` is not NULL exactly while it is active (instantiated, with resources, not expired at the last [`settle`]),
//!   and then is its part of its site's shares;
//! - whatever [`desired`] answers for a node depends on the database only, and every change of it raises the node's revision in the same transaction.

use std::collections::BTreeSet;

use commonage_isolation_api::{Interval, NodeId, Ports, Rspec, SiteName, SliceName};
use commonage_nodemgr_api::http::SliverConfig;
use commonage_plc_api::node::{Desired, DesiredSliver};
use commonage_plc_api::{ApiError, Code};
use jiff::{SignedDuration, Timestamp};
use sqlx::SqliteConnection;

use super::{Tx, integer, json, name, number, time};
use crate::error::{Error, Result, not_found};
use crate::shares;
use crate::wake::Topic;

/// An interval begins a little before it was asked for, so that a node whose clock is behind does not wait.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_mins(5);

/// Recomputes who is active at a site and with which share. Whoever changes has its nodes told. Called after every change of a
/// slice's resources or existence and of site shares, and when a slice expires.
///
/// # Errors
/// The site has more active slices than thousandths of shares, or the database fails.
pub async fn settle(tx: &mut Tx, site: &SiteName) -> Result<()> {
    let site_shares: i64 = sqlx::query_scalar("SELECT shares FROM sites WHERE name = ?")
        .bind(site.as_str())
        .fetch_one(tx.conn())
        .await?;
    type Row = (String, Option<i64>, Option<i64>, bool, Option<i64>);
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT name, share, ends, instantiated IS NOT NULL, rspec_share FROM slices WHERE site = ? ORDER BY name",
    )
    .bind(site.as_str())
    .fetch_all(tx.conn())
    .await?;
    let now = tx.now().as_millisecond();
    let weight = |(_, share, ends, instantiated, _): &Row| {
        (*share).filter(|_| *instantiated && ends.is_some_and(|end| now < end))
    };
    let weights: Vec<u32> = rows.iter().filter_map(weight).map(number).collect::<Result<_>>()?;
    let parts = shares::divide(number(site_shares)?, &weights).ok_or_else(|| {
        let message = format!("site {site} has too few shares for {} active slices", weights.len());
        ApiError::new(Code::OverCapacity, message).hint("delete slices, or ask PLC for more site shares")
    })?;
    let mut parts = parts.into_iter().map(i64::from);
    for row in &rows {
        let part = if weight(row).is_some() { parts.next() } else { None };
        if part != row.4 {
            sqlx::query("UPDATE slices SET rspec_share = ? WHERE name = ?")
                .bind(part)
                .bind(&row.0)
                .execute(tx.conn())
                .await?;
            touch(tx, &name(&row.0)?).await?;
        }
    }
    tx.changed(Topic::Expiry);
    Ok(())
}

/// Raises a slice's revision and those of all its nodes.
///
/// # Errors
/// The database fails.
pub async fn touch(tx: &mut Tx, slice: &SliceName) -> Result<()> {
    touch_slice(tx, slice).await?;
    let nodes: Vec<String> = sqlx::query_scalar("SELECT node FROM slice_nodes WHERE slice = ?")
        .bind(slice.as_str())
        .fetch_all(tx.conn())
        .await?;
    for node in &nodes {
        let revision = touch_node(tx, &name(node)?).await?;
        sqlx::query("UPDATE slice_nodes SET wanted = ? WHERE slice = ? AND node = ?")
            .bind(integer(revision))
            .bind(slice.as_str())
            .bind(node)
            .execute(tx.conn())
            .await?;
    }
    Ok(())
}

/// Raises a slice's revision only: what is known of it changed, not what is wanted.
///
/// # Errors
/// The database fails.
pub async fn touch_slice(tx: &mut Tx, slice: &SliceName) -> Result<()> {
    sqlx::query("UPDATE slices SET revision = revision + 1 WHERE name = ?")
        .bind(slice.as_str())
        .execute(tx.conn())
        .await?;
    tx.changed(Topic::Slice(slice.clone()));
    Ok(())
}

/// Raises a node's revision.
///
/// # Errors
/// The database fails.
pub async fn touch_node(tx: &mut Tx, node: &NodeId) -> Result<u64> {
    let revision: i64 =
        sqlx::query_scalar("UPDATE nodes SET revision = revision + 1 WHERE id = ? RETURNING revision")
            .bind(node.as_str())
            .fetch_one(tx.conn())
            .await?;
    tx.changed(Topic::Node(node.clone()));
    number(revision)
}

/// Settles every site with a slice whose time is over. Answers when the next one's is.
///
/// # Errors
/// The database fails.
pub async fn expire(tx: &mut Tx) -> Result<Option<Timestamp>> {
    let sites: Vec<String> =
        sqlx::query_scalar("SELECT DISTINCT site FROM slices WHERE rspec_share IS NOT NULL AND ends <= ?")
            .bind(tx.now().as_millisecond())
            .fetch_all(tx.conn())
            .await?;
    for site in &sites {
        settle(tx, &name(site)?).await?;
        tracing::info!(%site, "slices expired");
    }
    let next: Option<i64> = sqlx::query_scalar("SELECT min(ends) FROM slices WHERE rspec_share IS NOT NULL")
        .fetch_one(tx.conn())
        .await?;
    next.map(time).transpose()
}

/// A node's present revision.
///
/// # Errors
/// There is no such node, or the database fails.
pub async fn revision(db: &mut SqliteConnection, node: &NodeId) -> Result<u64> {
    let revision: Option<i64> = sqlx::query_scalar("SELECT revision FROM nodes WHERE id = ?")
        .bind(node.as_str())
        .fetch_optional(db)
        .await?;
    let missing =
        || not_found(format!("PLC knows no node {node}"), "run `commonage node create` and write a new CD");
    number(revision.ok_or_else(missing)?)
}

#[derive(sqlx::FromRow)]
struct Row {
    name: String,
    boot_script: String,
    base: String,
    restart: String,
    rspec_share: i64,
    instantiated: i64,
    ends: i64,
    memory_mib: i64,
    disk_mib: i64,
    ports: String,
    privileges: String,
}

/// Everything that should be on a node.
///
/// # Errors
/// There is no such node, or the database fails.
pub async fn desired(db: &mut SqliteConnection, node: &NodeId) -> Result<Desired> {
    let revision = revision(&mut *db, node).await?;
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT name, boot_script, base, restart, rspec_share, instantiated, ends, memory_mib, disk_mib, ports, privileges \
         FROM slices JOIN slice_nodes ON slice = name WHERE node = ? AND rspec_share IS NOT NULL ORDER BY name",
    )
    .bind(node.as_str())
    .fetch_all(&mut *db)
    .await?;
    let mut slivers = Vec::with_capacity(rows.len());
    for row in rows {
        let keys: Vec<String> = sqlx::query_scalar(
            "SELECT DISTINCT line FROM ssh_keys JOIN slice_owners USING (principal) WHERE slice = ? ORDER BY id",
        )
        .bind(&row.name)
        .fetch_all(&mut *db)
        .await?;
        slivers.push(sliver(row, keys)?);
    }
    Ok(Desired { revision, slivers })
}

fn sliver(row: Row, ssh_keys: Vec<String>) -> Result<DesiredSliver> {
    let resources = Sizes {
        memory_mib: number(row.memory_mib)?,
        disk_mib: number(row.disk_mib)?,
        ports: json(&row.ports)?,
    };
    let start = time(row.instantiated)?.saturating_sub(CLOCK_SKEW).map_err(Error::corrupt("time"))?;
    let mut rspec = rspec(number(row.rspec_share)?, resources, Interval { start, end: time(row.ends)? });
    rspec.privileges = json(&row.privileges)?;
    let config = SliverConfig {
        base: row.base,
        ssh_keys,
        boot_script: row.boot_script,
        files: Vec::new(),
        restart: name(&row.restart)?,
    };
    Ok(DesiredSliver { slice: name(&row.name)?, rspec, config })
}

/// What set_resources may say beyond share and time.
#[derive(Debug, Clone)]
pub struct Sizes {
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Disk, MiB.
    pub disk_mib: u32,
    /// Ports.
    pub ports: Ports,
}

impl Default for Sizes {
    fn default() -> Self {
        let Rspec { memory_mib, disk_mib, ports, .. } =
            Rspec::modest(Interval { start: Timestamp::UNIX_EPOCH, end: Timestamp::MAX });
        Self { memory_mib, disk_mib, ports }
    }
}

/// PLC 1's policy engine: the rspec of a sliver. What nobody can say is modest.
pub fn rspec(share: u32, sized: Sizes, interval: Interval) -> Rspec {
    let Sizes { memory_mib, disk_mib, ports } = sized;
    Rspec { share, memory_mib, disk_mib, ports, ..Rspec::modest(interval) }
}

/// The slices that have a sliver on a node, with the revision that each sliver's report must have reached.
pub(super) async fn wanted(db: &mut SqliteConnection, node: &NodeId) -> Result<Vec<(SliceName, u64)>> {
    let rows: Vec<(String, i64)> = sqlx::query_as("SELECT slice, wanted FROM slice_nodes WHERE node = ?")
        .bind(node.as_str())
        .fetch_all(db)
        .await?;
    rows.into_iter().map(|(slice, wanted)| Ok((name(&slice)?, number(wanted)?))).collect()
}

/// Removes a slice from nodes, telling them.
pub(super) async fn leave(tx: &mut Tx, slice: &SliceName, nodes: &BTreeSet<NodeId>) -> Result<()> {
    for node in nodes {
        sqlx::query("DELETE FROM slice_nodes WHERE slice = ? AND node = ?")
            .bind(slice.as_str())
            .bind(node.as_str())
            .execute(tx.conn())
            .await?;
        touch_node(tx, node).await?;
    }
    Ok(())
}
