//! What can go wrong inside the node manager, and what of it callers are told.

use std::io;
use std::path::{Path, PathBuf};

use commonage_isolation::cgroup::CgroupError;
use commonage_nodemgr_api::error::{ApiError, Code};

/// A failure of the node itself; callers' mistakes are [`ApiError`]s from the start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database.
    #[error("the database {}: {source}; if the disk is sound, another nodemgr may be running", path.display())]
    Db {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: Box<redb::Error>,
    },
    /// A record that cannot be read.
    #[error(
        "record {key:?} in table {table} of the database is damaged: {source}; remove it or restore the database"
    )]
    Record {
        /// Which table.
        table: &'static str,
        /// Its key (rcaps are cut).
        key: String,
        /// Why.
        source: serde_json::Error,
    },
    /// A file.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// Verb.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A control group.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A helper program.
    #[error("{program} failed for {}: {message}", path.display())]
    Program {
        /// Which.
        program: PathBuf,
        /// On what.
        path: PathBuf,
        /// What it said.
        message: String,
    },
    /// A sliver's machine.
    #[error("the machine of {slice}: {message}")]
    Machine {
        /// Which sliver.
        slice: String,
        /// What happened.
        message: String,
    },
    /// A template.
    #[error("template {key}: {message}")]
    Template {
        /// Which.
        key: String,
        /// What happened.
        message: String,
    },
    /// The machine's facts.
    #[error("cannot tell how much {what} this node has ({}); say it with --{flag}", path.display())]
    Fact {
        /// What.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// The flag that says it instead.
        flag: &'static str,
    },
    /// A task ended early.
    #[error("a task of the node manager ended before its time: {0}")]
    Task(#[from] tokio::task::JoinError),
    /// No random numbers.
    #[error("the kernel gave no random numbers: {0}")]
    Random(#[from] getrandom::Error),
}

impl Error {
    /// A file's error.
    pub fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}

impl From<Error> for ApiError {
    fn from(e: Error) -> Self {
        Self::new(Code::Internal, e.to_string()).hint("try again; if it stays, tell whoever runs this node")
    }
}
