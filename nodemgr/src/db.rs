//! The node's durable state: rights, slivers and the next user id, in one redb file.
//!
//! [`Db::commit`] returns after the changes are on the disk (fsync), all of them or none; only then is a caller answered.
//! Values are JSON, so a newer node manager reads what an older one wrote.

use std::path::{Path, PathBuf};

use redb::{Database, Durability, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use serde::de::DeserializeOwned;

use crate::book::{Change, Grant, SliverRecord};
use crate::error::Error;

const RCAPS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("rcaps");
const SLIVERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("slivers");
const COUNTERS: TableDefinition<'_, &str, u32> = TableDefinition::new("counters");
const NEXT_UID: &str = "next-uid";

/// The database, open.
#[derive(Debug)]
pub struct Db {
    db: Database,
    path: PathBuf,
}

impl Db {
    /// Opens it, making it first when it is not there. After a crash it is as of the last commit.
    ///
    /// # Errors
    /// It cannot be read, or another process has it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |e: redb::Error| Error::Db { path: path.to_owned(), source: Box::new(e) };
        let db = Database::create(path).map_err(|e| failed(e.into()))?;
        let this = Self { db, path: path.to_owned() };
        // The tables exist from now on, so that reading never meets a database without them.
        this.write(|_| Ok(()))?;
        Ok(this)
    }

    /// Everything, as changes to an empty book.
    ///
    /// # Errors
    /// It cannot be read, or a record is damaged.
    pub fn load(&self) -> Result<Vec<Change>, Error> {
        let read = || -> Result<_, redb::Error> {
            let txn = self.db.begin_read()?;
            let rows =
                |table: TableDefinition<'_, &str, &[u8]>| -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
                    let mut rows = Vec::new();
                    for row in txn.open_table(table)?.iter()? {
                        let (key, value) = row?;
                        rows.push((key.value().to_owned(), value.value().to_vec()));
                    }
                    Ok(rows)
                };
            let next_uid = txn.open_table(COUNTERS)?.get(NEXT_UID)?.map(|v| v.value());
            Ok((rows(RCAPS)?, rows(SLIVERS)?, next_uid))
        };
        let (rcaps, slivers, next_uid) = read().map_err(|e| self.failed(e))?;
        let mut changes = Vec::new();
        for (key, value) in rcaps {
            changes.push(Change::PutGrant(parse::<Grant>("rcaps", &key, &value)?));
        }
        for (key, value) in slivers {
            changes.push(Change::PutSliver(parse::<SliverRecord>("slivers", &key, &value)?));
        }
        changes.extend(next_uid.map(Change::NextUid));
        Ok(changes)
    }

    /// Makes changes durable. Blocks on the disk.
    ///
    /// # Errors
    /// The disk failed: none of the changes was made.
    pub fn commit(&self, changes: &[Change]) -> Result<(), Error> {
        let mut puts = Vec::new();
        for change in changes {
            puts.push(match change {
                Change::PutGrant(g) => Some(json("rcaps", &cut(&g.rcap.to_string()), g)?),
                Change::PutSliver(s) => Some(json("slivers", s.slice.as_str(), s)?),
                _ => None,
            });
        }
        self.write(|txn| {
            let mut rcaps = txn.open_table(RCAPS)?;
            let mut slivers = txn.open_table(SLIVERS)?;
            let mut counters = txn.open_table(COUNTERS)?;
            for (change, value) in changes.iter().zip(&puts) {
                let value = value.as_deref().unwrap_or_default();
                match change {
                    Change::PutGrant(g) => drop(rcaps.insert(g.rcap.to_string().as_str(), value)?),
                    Change::RemoveGrant(rcap) => drop(rcaps.remove(rcap.to_string().as_str())?),
                    Change::PutSliver(s) => drop(slivers.insert(s.slice.as_str(), value)?),
                    Change::RemoveSliver(slice) => drop(slivers.remove(slice.as_str())?),
                    Change::NextUid(uid) => drop(counters.insert(NEXT_UID, uid)?),
                }
            }
            Ok(())
        })
    }

    fn write(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), Error> {
        let run = || -> Result<(), redb::Error> {
            let mut txn = self.db.begin_write()?;
            txn.set_durability(Durability::Immediate)?;
            txn.open_table(RCAPS)?;
            txn.open_table(SLIVERS)?;
            txn.open_table(COUNTERS)?;
            change(&txn)?;
            txn.commit()?;
            Ok(())
        };
        run().map_err(|e| self.failed(e))
    }

    fn failed(&self, e: redb::Error) -> Error {
        Error::Db { path: self.path.clone(), source: Box::new(e) }
    }
}

fn parse<T: DeserializeOwned>(table: &'static str, key: &str, value: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(value).map_err(|source| Error::Record { table, key: cut(key), source })
}

fn json<T: serde::Serialize>(table: &'static str, key: &str, value: &T) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(value).map_err(|source| Error::Record { table, key: key.to_owned(), source })
}

/// An rcap is a secret: messages show its first four digits.
fn cut(key: &str) -> String {
    if key.contains('_') { key.to_owned() } else { format!("{}…", key.chars().take(4).collect::<String>()) }
}

#[cfg(test)]
#[path = "db_test.rs"]
mod tests;
