//! The crate's one error: what was tried, on which thing, and what the kernel said.

use std::io;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused something.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried, on which thing.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A device that a sliver always has did not appear.
    #[error("{0} has not appeared; the machine's configuration lacks it, or the kernel its driver")]
    NoDevice(String),
    /// A file's path is not one that is laid.
    #[error("the file {path:?} is not laid: {why}")]
    Path {
        /// The path given.
        path: String,
        /// Why not.
        why: &'static str,
    },
    /// The network could not be configured.
    #[error(transparent)]
    Network(#[from] commonage_init::error::Error),
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Adds what was tried to an error of the kernel.
pub trait Context<T> {
    /// `what` completes the sentence "cannot …".
    ///
    /// # Errors
    /// The same error, told.
    fn what(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn what(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::Io { what: what(), source: e.into() })
    }
}
