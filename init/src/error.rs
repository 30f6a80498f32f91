//! The crate's one error: what was tried, on which thing, and what the kernel or the peer said.

use std::{io, path::Path};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a call.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried, with the thing's name: `mount proc at /proc`.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// There is no such interface.
    #[error("there is no network interface {0}; check that its driver is loaded")]
    NoLink(String),
    /// Something that a device or the kernel said makes no sense.
    #[error("cannot read {what}: {why}")]
    Malformed {
        /// Where it came from.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// Something that should have happened by now has not.
    #[error("{0}")]
    TimedOut(String),
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The errno, if the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

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

/// Reads a whole file as text.
///
/// # Errors
/// With the path.
pub fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    std::fs::read_to_string(path).what(|| format!("read {}", path.display()))
}

/// Writes a whole file; for `/proc` and `/sys` in one `write`.
///
/// # Errors
/// With the path.
pub fn write(path: impl AsRef<Path>, contents: impl AsRef<[u8]>) -> Result<()> {
    let path = path.as_ref();
    std::fs::write(path, contents).what(|| format!("write {}", path.display()))
}
