//! What crosses the node manager's sockets.
//!
//! - [`http`]: the HTTP/JSON API that slivers call on vsock port [`http::PORT`] of the host.
//! - [`guest`]: what the node manager and `sliver-init` say to each other.
//! - [`exec`]: the framed protocol of one command run inside a sliver.
//! - [`error`]: the one shape every error has on the wire, here and at PLC.
#![forbid(unsafe_code)]

pub mod error;
pub mod exec;
pub mod guest;
pub mod http;
mod text;

pub use text::Bytes;
