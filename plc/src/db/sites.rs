//! Sites.

use commonage_isolation_api::SiteName;
use commonage_plc_api::rest::Site;
use sqlx::SqliteConnection;

use super::{Tx, desired, name, number, time};
use crate::error::{Result, conflict, not_found};

type Row = (String, i64, i64);

fn read((site, shares, created): Row) -> Result<Site> {
    Ok(Site { name: name(&site)?, shares: number(shares)?, created: time(created)? })
}

/// All, by name.
pub async fn list(db: &mut SqliteConnection) -> Result<Vec<Site>> {
    let rows: Vec<Row> =
        sqlx::query_as("SELECT name, shares, created FROM sites ORDER BY name").fetch_all(db).await?;
    rows.into_iter().map(read).collect()
}

/// One.
///
/// # Errors
/// There is none, or the database fails.
pub async fn get(db: &mut SqliteConnection, site: &SiteName) -> Result<Site> {
    let row: Option<Row> = sqlx::query_as("SELECT name, shares, created FROM sites WHERE name = ?")
        .bind(site.as_str())
        .fetch_optional(db)
        .await?;
    let missing = || not_found(format!("there is no site {site}"), "an administrator of PLC creates sites");
    read(row.ok_or_else(missing)?)
}

/// Makes one.
///
/// # Errors
/// It exists, or the database fails.
pub async fn create(tx: &mut Tx, site: &SiteName, shares: u32) -> Result<Site> {
    let now = tx.now().as_millisecond();
    let made =
        sqlx::query("INSERT INTO sites (name, shares, created) VALUES (?, ?, ?) ON CONFLICT DO NOTHING")
            .bind(site.as_str())
            .bind(shares)
            .bind(now)
            .execute(tx.conn())
            .await?;
    if made.rows_affected() == 0 {
        return Err(conflict(format!("site {site} exists already"), "choose another name").into());
    }
    get(tx.conn(), site).await
}

/// Changes its shares, and so its slices' shares on their nodes.
///
/// # Errors
/// There is none, it has too many slices for so few shares, or the database fails.
pub async fn set_shares(tx: &mut Tx, site: &SiteName, shares: u32) -> Result<Site> {
    sqlx::query("UPDATE sites SET shares = ? WHERE name = ?")
        .bind(shares)
        .bind(site.as_str())
        .execute(tx.conn())
        .await?;
    let changed = get(tx.conn(), site).await?;
    desired::settle(tx, site).await?;
    Ok(changed)
}
