//! Principals, their SSH keys, and whose key a certificate's is.

use std::collections::BTreeSet;

use commonage_isolation_api::SliceName;
use commonage_plc_api::rest::{CreatePrincipal, MAX_SSH_KEYS, Principal, PrincipalName, Role, SshKey};
use commonage_plc_api::{ApiError, Code};
use sqlx::SqliteConnection;

use super::{Tx, desired, name, time};
use crate::error::{Result, conflict, not_found};
use crate::permit::Caller;
use crate::ssh_key;

type Row = (String, Option<String>, bool, bool, bool, String, i64);
const COLUMNS: &str = "name, site, is_admin, is_pi, is_user, key_sha256, created";

fn read((who, site, admin, pi, user, key_sha256, created): Row) -> Result<Principal> {
    let roles = [(admin, Role::Admin), (pi, Role::Pi), (user, Role::User)];
    Ok(Principal {
        name: name(&who)?,
        site: site.as_deref().map(name).transpose()?,
        roles: roles.into_iter().filter_map(|(has, role)| has.then_some(role)).collect(),
        key_sha256,
        created: time(created)?,
    })
}

/// Who has the public key with this SHA-256.
pub async fn caller(db: &mut SqliteConnection, key_sha256: &str) -> Result<Option<Caller>> {
    let row: Option<Row> =
        sqlx::query_as(sqlx::AssertSqlSafe(format!("SELECT {COLUMNS} FROM principals WHERE key_sha256 = ?")))
            .bind(key_sha256)
            .fetch_optional(&mut *db)
            .await?;
    if let Some(row) = row {
        return Ok(Some(Caller::Principal(read(row)?)));
    }
    let node: Option<String> = sqlx::query_scalar("SELECT id FROM nodes WHERE key_sha256 = ?")
        .bind(key_sha256)
        .fetch_optional(db)
        .await?;
    node.map(|id| Ok(Caller::Node(name(&id)?))).transpose()
}

/// Makes sure that nobody has the key yet.
///
/// # Errors
/// Somebody has, or the database fails.
pub async fn key_is_new(db: &mut SqliteConnection, key_sha256: &str) -> Result<()> {
    if caller(db, key_sha256).await?.is_some() {
        let message = "another principal or node has the key of this certificate request already";
        return Err(conflict(message, "make a new key: a key says who somebody is").into());
    }
    Ok(())
}

/// All, by name.
pub async fn list(db: &mut SqliteConnection) -> Result<Vec<Principal>> {
    let rows: Vec<Row> =
        sqlx::query_as(sqlx::AssertSqlSafe(format!("SELECT {COLUMNS} FROM principals ORDER BY name")))
            .fetch_all(db)
            .await?;
    rows.into_iter().map(read).collect()
}

/// One.
///
/// # Errors
/// There is none, or the database fails.
pub async fn get(db: &mut SqliteConnection, who: &PrincipalName) -> Result<Principal> {
    let row: Option<Row> =
        sqlx::query_as(sqlx::AssertSqlSafe(format!("SELECT {COLUMNS} FROM principals WHERE name = ?")))
            .bind(who.as_str())
            .fetch_optional(db)
            .await?;
    let missing = || {
        not_found(format!("there is no principal {who}"), "a PI of the site or an administrator creates it")
    };
    read(row.ok_or_else(missing)?)
}

/// Makes one.
///
/// # Errors
/// The name or the key is taken, or the database fails.
pub async fn create(tx: &mut Tx, new: &CreatePrincipal, key_sha256: &str) -> Result<Principal> {
    key_is_new(tx.conn(), key_sha256).await?;
    let now = tx.now().as_millisecond();
    let sql =
        format!("INSERT INTO principals ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING");
    let made = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(new.name.as_str())
        .bind(new.site.as_ref().map(|s| s.as_str()))
        .bind(new.roles.contains(&Role::Admin))
        .bind(new.roles.contains(&Role::Pi))
        .bind(new.roles.contains(&Role::User))
        .bind(key_sha256)
        .bind(now)
        .execute(tx.conn())
        .await?;
    if made.rows_affected() == 0 {
        let message = format!("principal {} exists already", new.name);
        return Err(conflict(message, "names are unique over all sites: choose another").into());
    }
    get(tx.conn(), &new.name).await
}

/// Deletes one; its slices lose it as owner.
///
/// # Errors
/// It is the last administrator, or the database fails.
pub async fn delete(tx: &mut Tx, who: &Principal) -> Result<()> {
    let others: i64 = sqlx::query_scalar("SELECT count(*) FROM principals WHERE is_admin AND name <> ?")
        .bind(who.name.as_str())
        .fetch_one(tx.conn())
        .await?;
    if who.roles.contains(&Role::Admin) && others == 0 {
        let message = format!("{} is the last administrator of PLC", who.name);
        return Err(conflict(message, "create another administrator first").into());
    }
    let owned = owned_by(tx.conn(), &who.name).await?;
    sqlx::query("DELETE FROM principals WHERE name = ?").bind(who.name.as_str()).execute(tx.conn()).await?;
    touch_all(tx, &owned).await
}

/// A principal's keys, by id.
pub async fn ssh_keys(db: &mut SqliteConnection, who: &PrincipalName) -> Result<Vec<SshKey>> {
    let lines: Vec<String> = sqlx::query_scalar("SELECT line FROM ssh_keys WHERE principal = ? ORDER BY id")
        .bind(who.as_str())
        .fetch_all(db)
        .await?;
    lines.iter().map(|line| Ok(ssh_key::parse(line)?)).collect()
}

/// Adds a key; the slivers of its slices get it.
///
/// # Errors
/// There are too many, or the database fails. Adding one again changes nothing.
pub async fn add_ssh_key(tx: &mut Tx, who: &PrincipalName, key: &SshKey) -> Result<()> {
    let present = ssh_keys(tx.conn(), who).await?;
    if present.iter().any(|k| k.id == key.id) {
        return Ok(());
    }
    if present.len() >= MAX_SSH_KEYS {
        let message = format!("{who} has {MAX_SSH_KEYS} SSH keys already, the most allowed");
        return Err(ApiError::new(Code::Conflict, message).hint("remove one first").into());
    }
    sqlx::query("INSERT INTO ssh_keys (principal, id, line) VALUES (?, ?, ?)")
        .bind(who.as_str())
        .bind(&key.id)
        .bind(&key.key)
        .execute(tx.conn())
        .await?;
    let owned = owned_by(tx.conn(), who).await?;
    touch_all(tx, &owned).await
}

/// Removes a key, also from the slivers of its slices.
///
/// # Errors
/// There is none, or the database fails.
pub async fn remove_ssh_key(tx: &mut Tx, who: &PrincipalName, id: &str) -> Result<()> {
    let gone = sqlx::query("DELETE FROM ssh_keys WHERE principal = ? AND id = ?")
        .bind(who.as_str())
        .bind(id)
        .execute(tx.conn())
        .await?;
    if gone.rows_affected() == 0 {
        return Err(not_found(format!("{who} has no such SSH key"), "list the keys to see their ids").into());
    }
    let owned = owned_by(tx.conn(), who).await?;
    touch_all(tx, &owned).await
}

/// The slices a principal owns.
pub async fn owned_by(db: &mut SqliteConnection, who: &PrincipalName) -> Result<BTreeSet<SliceName>> {
    let slices: Vec<String> = sqlx::query_scalar("SELECT slice FROM slice_owners WHERE principal = ?")
        .bind(who.as_str())
        .fetch_all(db)
        .await?;
    slices.iter().map(|s| name(s)).collect()
}

async fn touch_all(tx: &mut Tx, slices: &BTreeSet<SliceName>) -> Result<()> {
    for slice in slices {
        desired::touch(tx, slice).await?;
    }
    Ok(())
}
