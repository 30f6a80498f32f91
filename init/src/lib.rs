//! What the first processes share: boot-cd, node-init and sliver-init are all PID 1 of something.
//!
//! Each module is a pure part (parsing, protocol machines, plans: values and time passed in) and a thin shell around
//! the kernel's interface. Nothing here starts a thread or keeps global state; every call is synchronous.

pub mod error;
pub mod netlink;

pub use error::{Error, Result};
