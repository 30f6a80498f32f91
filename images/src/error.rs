//! What can go wrong while building, in words that say what to do next.

use std::io;
use std::path::{Path, PathBuf};

/// Result of a build step.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Debian packages are missing and this process may not install them.
    #[error(
        "these Debian packages are needed and not installed; run as root:\n\n    apt-get install --no-install-recommends {}\n",
        packages.join(" ")
    )]
    MissingPackages {
        /// Names.
        packages: Vec<String>,
    },
    /// A child process failed.
    #[error("{what} failed ({status}); the whole log is {}; it ends:\n{tail}", log.display())]
    Command {
        /// What was being done.
        what: String,
        /// How it ended.
        status: String,
        /// Where everything it printed is.
        log: PathBuf,
        /// The last lines of that.
        tail: String,
    },
    /// A program could not be started.
    #[error("{what}: cannot start {program}: {source}; is it installed?")]
    Spawn {
        /// What was to be done.
        what: String,
        /// Which program.
        program: String,
        /// The system's reason.
        source: io::Error,
    },
    /// A file operation failed.
    #[error("cannot {verb} {}: {source}", path.display())]
    Io {
        /// What was tried: `read`, `write`, …
        verb: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Kconfig did not accept what the sliver kernel needs.
    #[error(
        "{} is not what `make olddefconfig` made of it: {}. Some dependency is missing from the fragment, or the option is gone from this kernel version",
        fragment,
        problems.join(", ")
    )]
    KernelConfig {
        /// The fragment's name.
        fragment: &'static str,
        /// One a lost or unwanted option.
        problems: Vec<String>,
    },
    /// A tool answered something that cannot be used.
    #[error("{what}: {why}")]
    Unexpected {
        /// What was asked.
        what: String,
        /// What is wrong with the answer, and what to do.
        why: String,
    },
}

impl Error {
    /// The process's exit code for this error: 2 when the person must install packages first, otherwise 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::MissingPackages { .. } => 2,
            _ => 1,
        }
    }

    pub(crate) fn unexpected(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Unexpected { what: what.into(), why: why.into() }
    }
}

/// Adds the verb and the path to an `io::Error`.
pub(crate) trait IoContext<T> {
    fn doing(self, verb: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for Result<T, E> {
    fn doing(self, verb: &'static str, path: &Path) -> Result<T> {
        self.map_err(|e| Error::Io { verb, path: path.to_owned(), source: e.into() })
    }
}
