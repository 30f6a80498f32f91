//! The one shape every error has on the wire: `{"error": {"code": …, "message": …, "hint": …}}`.

use serde::{Deserialize, Serialize};

/// The kind of an error, for programs. Its HTTP status is [`Code::status`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The request is not well formed or a value is out of range.
    Invalid,
    /// The caller did not say who it is.
    Unauthenticated,
    /// The caller may not do that.
    Forbidden,
    /// No such thing.
    NotFound,
    /// It exists already, or is in a state that does not allow it.
    Conflict,
    /// The body is larger than the API takes.
    TooLarge,
    /// The node or the site has not that much left.
    OverCapacity,
    /// It failed here; trying again may help.
    Internal,
    /// A part it needs is away for the moment; try again.
    Unavailable,
}

impl Code {
    /// The HTTP status.
    pub fn status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::Unauthenticated => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::Conflict | Self::OverCapacity => 409,
            Self::TooLarge => 413,
            Self::Internal => 500,
            Self::Unavailable => 503,
        }
    }
}

/// An error as it goes over the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}{}", hint.as_deref().map(|h| format!(" ({h})")).unwrap_or_default())]
pub struct ApiError {
    /// For programs.
    pub code: Code,
    /// What happened, to which thing.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ApiError {
    /// An error without advice.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    /// With advice.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// The body of an error response.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ApiError,
}
