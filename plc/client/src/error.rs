//! Why a call failed, and what to do about it.
//!
//! An error that PLC itself gave is passed on. Whatever prevented PLC from answering is explained from the causes below it.

use std::error::Error as StdError;
use std::io;

use commonage_plc_api::{ApiError, Code};
use rustls::{AlertDescription, CertificateError};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// PLC answered with an error.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// PLC could not be asked, or its answer not be read.
    #[error("{message} ({hint})")]
    Transport {
        /// What happened.
        message: String,
        /// What to do.
        hint: String,
        /// Whether it may work later without anybody doing anything.
        temporary: bool,
    },
    /// The CA, the certificate or the key cannot be used.
    #[error("the {what} cannot be used: {why}")]
    Identity {
        /// Which of them.
        what: &'static str,
        /// Why.
        why: String,
    },
    /// The address of PLC is not one.
    #[error("{url:?} is no address of PLC: {why} (it looks like https://plc.example.org:8443)")]
    Url {
        /// What was given.
        url: String,
        /// Why not.
        why: String,
    },
    /// A file that was fetched or sent is not what it should be.
    #[error("boot file {sha256} is damaged: {why} (fetch it again; if that fails too, put it again at PLC)")]
    Damaged {
        /// Its hash as asked for.
        sha256: String,
        /// What is wrong with it.
        why: String,
    },
    /// The local end of a transfer failed.
    #[error("{what}: {source}")]
    Local {
        /// What was being done.
        what: String,
        /// The system's error.
        source: io::Error,
    },
}

impl Error {
    /// Whether trying the same again later may help.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Api(e) => matches!(e.code, Code::Internal | Code::Unavailable),
            Self::Transport { temporary, .. } => *temporary,
            Self::Damaged { .. } => true,
            Self::Identity { .. } | Self::Url { .. } | Self::Local { .. } => false,
        }
    }

    /// PLC's code, if it was PLC that refused.
    pub fn code(&self) -> Option<Code> {
        if let Self::Api(e) = self { Some(e.code) } else { None }
    }

    /// Explains why `url` did not answer.
    pub(crate) fn transport(url: &str, error: &reqwest::Error) -> Self {
        let (message, hint, temporary) = explain(url, error);
        Self::Transport { message, hint, temporary }
    }

    /// PLC did not answer within `seconds`.
    pub(crate) fn silence(url: &str, seconds: u64) -> Self {
        Self::Transport {
            message: format!("PLC at {url} did not answer within {seconds} s"),
            hint: "look at plcd's log and at the network between; then try again".into(),
            temporary: true,
        }
    }

    /// PLC's answer was not what this version understands.
    pub(crate) fn unreadable(url: &str, why: impl std::fmt::Display) -> Self {
        Self::Transport {
            message: format!("the answer from {url} cannot be read: {why}"),
            hint: "is that PLC, and of the same version as this program?".into(),
            temporary: false,
        }
    }
}

fn explain(url: &str, error: &reqwest::Error) -> (String, String, bool) {
    for cause in causes(error) {
        if let Some(tls) = cause.downcast_ref::<rustls::Error>() {
            return explain_tls(url, tls);
        }
        if let Some(io) = cause.downcast_ref::<io::Error>()
            && let Some(found) = explain_io(url, io)
        {
            return found;
        }
    }
    if error.is_timeout() {
        let hint = "look at plcd's log and at the network between; then try again";
        return (format!("PLC at {url} did not answer in time"), hint.into(), true);
    }
    let words: Vec<String> = causes(error).map(ToString::to_string).collect();
    let why = words.last().cloned().unwrap_or_default();
    let hint = "is the address right, and is the name known to the name server?";
    (format!("PLC at {url} cannot be reached: {why}"), hint.into(), true)
}

fn explain_io(url: &str, error: &io::Error) -> Option<(String, String, bool)> {
    let (message, hint) = match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            (format!("nothing listens at {url}"), "start plcd there, or correct the address")
        }
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            (format!("there is no way to {url}"), "look at the network of this machine")
        }
        io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe => {
            (format!("PLC at {url} hung up"), "try again; if it goes on, look at plcd's log")
        }
        io::ErrorKind::TimedOut => (format!("PLC at {url} did not answer in time"), "try again"),
        _ => return None,
    };
    Some((message, hint.into(), true))
}

fn explain_tls(url: &str, error: &rustls::Error) -> (String, String, bool) {
    use CertificateError as C;
    let (message, hint) = match error {
        rustls::Error::InvalidCertificate(C::UnknownIssuer | C::BadSignature) => (
            format!("PLC at {url} is not signed by the CA this client was given"),
            "take ca.pem from the state directory of this PLC, or correct the address",
        ),
        rustls::Error::InvalidCertificate(C::NotValidForName | C::NotValidForNameContext { .. }) => (
            format!("the certificate of PLC at {url} is for other names"),
            "start plcd with --name and the name or address used here",
        ),
        rustls::Error::InvalidCertificate(
            C::Expired | C::ExpiredContext { .. } | C::NotValidYet | C::NotValidYetContext { .. },
        ) => (
            format!("the certificate of PLC at {url} is not valid at this machine's time"),
            "set this machine's clock; if it is right, restart plcd, which renews its certificate",
        ),
        rustls::Error::AlertReceived(
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::DecryptError
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRequired
            | AlertDescription::CertificateExpired
            | AlertDescription::AccessDenied,
        ) => (
            format!("PLC at {url} refuses this client's certificate ({error})"),
            "use a certificate that this PLC issued",
        ),
        other => (
            format!("no TLS connection with {url}: {other}"),
            "is that PLC's port, and https in the address?",
        ),
    };
    (message, hint.into(), false)
}

/// An error and what caused it, outermost first. `io::Error` hides the error it wraps from `source()`, so it is opened.
fn causes(error: &reqwest::Error) -> impl Iterator<Item = &(dyn StdError + 'static)> {
    std::iter::successors(Some(error as &(dyn StdError + 'static)), |&e| {
        match e.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => e.source(),
        }
    })
}
