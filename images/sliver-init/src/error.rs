//! What can go wrong when a machine becomes a sliver.

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused something, or a device is missing.
    #[error(transparent)]
    Kernel(#[from] commonage_init::Error),
    /// A file's path is not one that is laid.
    #[error("the file {path:?} is not laid: {why}")]
    Path {
        /// The path given.
        path: String,
        /// Why not.
        why: &'static str,
    },
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
