//! A client of PLC over mutual TLS.
//!
//! Only the given CA is trusted, never the system's. The caller's certificate says who it is. Every call has a time limit, and
//! every error says what to do. Host names are resolved without the C library (it isn't there in a static binary), so `/etc/hosts`
//! and `/etc/resolv.conf` count and nothing else.
//!
//! - [`Client`]: every call of `commonage_plc_api::rest` and `::node`;
//! - [`Client::boot`] and the files: `boot.rs`;
//! - [`identity`]: keys and certificate signing requests.
#![forbid(unsafe_code)]

mod boot;
mod calls;
mod error;
pub mod identity;
mod transport;

pub use error::Error;
pub use transport::Client;

/// What the calls return.
pub type Result<T> = std::result::Result<T, Error>;
