//! The database: one SQLite file. Every acknowledged change is on disk (WAL, `synchronous = FULL`).
//!
//! Writers go one at a time, each in one transaction; a change and the revisions it moves are committed together, then those who
//! wait for them are woken. Times are milliseconds since 1970 UTC.

pub mod boot;
pub mod desired;
pub mod nodes;
pub mod principals;
pub mod sites;
pub mod slices;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Sqlite, SqliteConnection, Transaction};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::error::{Error, Result};
use crate::wake::{Topic, Wakers};

/// Migrations in order. One that was released is never changed.
const MIGRATIONS: [&str; 2] =
    [include_str!("../../migrations/0001_init.sql"), include_str!("../../migrations/0002_restart.sql")];
const READERS: u32 = 8;

/// The database.
#[derive(Debug, Clone)]
pub struct Db {
    pool: SqlitePool,
    writer: Arc<Mutex<()>>,
    wakers: Wakers,
}

/// A transaction that writes. Dropped without [`Tx::commit`], nothing happened.
#[derive(Debug)]
pub struct Tx {
    inner: Transaction<'static, Sqlite>,
    changed: BTreeSet<Topic>,
    wakers: Wakers,
    now: Timestamp,
    _one_at_a_time: OwnedMutexGuard<()>,
}

impl Db {
    /// Opens or makes the database, and brings it to the present version.
    ///
    /// # Errors
    /// The file can't be used, or is newer than this program.
    pub async fn open(path: &Path) -> Result<Self> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        let pool = SqlitePoolOptions::new()
            .max_connections(READERS + 1)
            .acquire_timeout(Duration::from_secs(20))
            .connect_with(options)
            .await?;
        migrate(&pool).await?;
        Ok(Self { pool, writer: Arc::default(), wakers: Wakers::default() })
    }

    /// A transaction that reads one consistent state.
    ///
    /// # Errors
    /// The database fails.
    pub async fn read(&self) -> Result<Transaction<'static, Sqlite>> {
        Ok(self.pool.begin().await?)
    }

    /// A transaction that writes, at the present time.
    ///
    /// # Errors
    /// The database fails.
    pub async fn write(&self) -> Result<Tx> {
        let guard = Arc::clone(&self.writer).lock_owned().await;
        let inner = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let (changed, wakers) = (BTreeSet::new(), self.wakers.clone());
        Ok(Tx { inner, changed, wakers, now: now(), _one_at_a_time: guard })
    }

    /// Those who wait for changes.
    pub fn wakers(&self) -> &Wakers {
        &self.wakers
    }

    /// Ends all connections, so that the write-ahead log is folded in.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

impl Tx {
    /// The connection.
    pub fn conn(&mut self) -> &mut SqliteConnection {
        &mut self.inner
    }

    /// When it happens.
    pub fn now(&self) -> Timestamp {
        self.now
    }

    /// Notes that something changed that others may wait for.
    pub fn changed(&mut self, topic: Topic) {
        self.changed.insert(topic);
    }

    /// Makes it happen, on disk, and wakes who waits for it.
    ///
    /// # Errors
    /// The database fails; nothing happened.
    pub async fn commit(self) -> Result<()> {
        // A caller that hangs up drops its call; a commit that has begun must still wake the others.
        let committed = tokio::spawn(async move {
            self.inner.commit().await?;
            self.wakers.wake(&self.changed);
            Ok::<(), sqlx::Error>(())
        });
        committed.await.map_err(|e| sqlx::Error::Io(std::io::Error::other(e)))??;
        Ok(())
    }
}

async fn migrate(pool: &SqlitePool) -> Result<()> {
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    let version: i64 = sqlx::query_scalar("PRAGMA user_version").fetch_one(&mut *tx).await?;
    let found = usize::try_from(version).map_err(Error::corrupt("version"))?;
    let known = MIGRATIONS.len();
    if found > known {
        return Err(Error::TooNew { found, known });
    }
    for sql in MIGRATIONS.iter().skip(found) {
        sqlx::raw_sql(*sql).execute(&mut *tx).await?;
    }
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("PRAGMA user_version = {known}"))).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(())
}

/// The present time, to the millisecond, as the database keeps it.
pub fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}

/// A time as the database keeps it.
pub(crate) fn time(ms: i64) -> Result<Timestamp> {
    Timestamp::from_millisecond(ms).map_err(Error::corrupt("time"))
}

/// A number that is never negative.
pub(crate) fn number<T: TryFrom<i64>>(n: i64) -> Result<T>
where
    T::Error: std::fmt::Display,
{
    T::try_from(n).map_err(Error::corrupt("number"))
}

/// A revision or a count as the database keeps it.
pub(crate) fn integer(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// A name or an id.
pub(crate) fn name<T: std::str::FromStr>(text: &str) -> Result<T>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(Error::corrupt("name"))
}

/// A value kept as JSON.
pub(crate) fn json<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(Error::corrupt("document"))
}

/// A value to keep as JSON.
pub(crate) fn to_json<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(Error::corrupt("document"))
}
