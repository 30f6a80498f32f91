//! The current boot script.

use commonage_nodemgr_api::Bytes;
use commonage_plc_api::rest::{CurrentScript, PublishScript};
use sha2::{Digest as _, Sha256};
use sqlx::SqliteConnection;

use super::{Tx, time};
use crate::error::{Result, not_found};

/// The script that nodes get, with its signature.
#[derive(Debug, Clone)]
pub struct Published {
    /// What is known of it.
    pub current: CurrentScript,
    /// Its bytes.
    pub script: Vec<u8>,
    /// By the offline key.
    pub signature: Vec<u8>,
}

/// The current one.
///
/// # Errors
/// There is none, or the database fails.
pub async fn current(db: &mut SqliteConnection) -> Result<Published> {
    type Row = (Vec<u8>, Vec<u8>, Vec<u8>, String, String, i64);
    let row: Option<Row> = sqlx::query_as(
        "SELECT script, signature, offline_key, release, sha256, published FROM boot_script WHERE only = 1",
    )
    .fetch_optional(db)
    .await?;
    let missing = || {
        not_found(
            "no boot script was published yet",
            "an administrator publishes one: `commonage release publish`",
        )
    };
    let (script, signature, offline_key, release, sha256, published) = row.ok_or_else(missing)?;
    let current =
        CurrentScript { release, sha256, offline_key: Bytes(offline_key), published: time(published)? };
    Ok(Published { current, script, signature })
}

/// Makes one current.
///
/// # Errors
/// The database fails.
pub async fn publish(tx: &mut Tx, new: &PublishScript, release: &str) -> Result<CurrentScript> {
    let now = tx.now().as_millisecond();
    sqlx::query("INSERT OR REPLACE INTO boot_script VALUES (1, ?, ?, ?, ?, ?, ?)")
        .bind(&new.script.0)
        .bind(&new.signature.0)
        .bind(&new.offline_key.0)
        .bind(release)
        .bind(hex::encode(Sha256::digest(&new.script.0)))
        .bind(now)
        .execute(tx.conn())
        .await?;
    Ok(current(tx.conn()).await?.current)
}
