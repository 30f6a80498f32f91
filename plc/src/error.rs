//! Why a call failed, inside; what the caller is told, outside.
//!
//! What the caller did wrong is an [`ApiError`] and goes out as it is. What failed here goes to the log with all its facts, and
//! out as "PLC failed".

use axum::Json;
use axum::response::{IntoResponse, Response};
use commonage_plc_api::{ApiError, Code, ErrorBody};

/// Why something failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller asked for what it can't have.
    #[error(transparent)]
    Refused(#[from] ApiError),
    /// The database failed.
    #[error("the database failed: {0} (is the disk full or the state directory damaged?)")]
    Database(#[from] sqlx::Error),
    /// The database holds what it never should.
    #[error(
        "the database holds a {what} that cannot be read: {why} (restore the state directory from a backup)"
    )]
    Corrupt {
        /// Which kind of value.
        what: &'static str,
        /// The parser's words.
        why: String,
    },
    /// The database was written by a newer plcd.
    #[error("the database has version {found}, this plcd knows versions up to {known}: run the newer plcd")]
    TooNew {
        /// Its version.
        found: usize,
        /// The newest known.
        known: usize,
    },
    /// A file of the state directory could not be used.
    #[error("{what} {path}: {source} (look at the state directory's permissions and free space)")]
    File {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// Two plcd over one state directory.
    #[error("another plcd uses the state directory {0}: stop it, or give this one another --state")]
    InUse(String),
    /// Keys and certificates.
    #[error("{what} failed: {why}")]
    Pki {
        /// What was being done.
        what: &'static str,
        /// Why.
        why: String,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source} (is another server there? give another --listen)")]
    Listen {
        /// The address.
        address: String,
        /// The system's error.
        source: std::io::Error,
    },
}

/// What functions here return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A file could not be used.
    pub fn file(what: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self::File { what, path, source }
    }

    /// A value in the database that cannot be read.
    pub fn corrupt<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |why| Self::Corrupt { what, why: why.to_string() }
    }

    /// What the caller is told.
    pub fn outside(self) -> ApiError {
        match self {
            Self::Refused(e) => e,
            inside => {
                tracing::error!(error = %inside, "a call failed here");
                ApiError::new(Code::Internal, "PLC failed to do that; nothing was changed")
                    .hint("try again; if it goes on, an administrator finds the reason in plcd's log")
            }
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let error = self.outside();
        let status = axum::http::StatusCode::from_u16(error.code.status())
            .unwrap_or(axum::http::StatusCode::INTERNAL_SERVER_ERROR);
        tracing::debug!(code = ?error.code, %error, "refused");
        (status, Json(ErrorBody { error })).into_response()
    }
}

/// A value that is not well formed or out of range.
pub fn invalid(message: impl Into<String>, hint: impl Into<String>) -> ApiError {
    ApiError::new(Code::Invalid, message).hint(hint)
}

/// A thing that is not there.
pub fn not_found(message: impl Into<String>, hint: impl Into<String>) -> ApiError {
    ApiError::new(Code::NotFound, message).hint(hint)
}

/// A thing that is there already, or in a state that does not allow the call.
pub fn conflict(message: impl Into<String>, hint: impl Into<String>) -> ApiError {
    ApiError::new(Code::Conflict, message).hint(hint)
}
