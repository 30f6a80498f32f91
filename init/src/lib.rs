//! What the first processes share: boot-cd, node-init and sliver-init are all PID 1 of something.
//!
//! Each module is a pure part (parsing, protocol machines, plans: values and time passed in) and a thin shell around
//! the kernel's interface. Nothing here starts a thread or keeps global state; every call is synchronous.

pub mod clock;
pub mod console;
pub mod cpio;
pub mod dhcp;
pub mod error;
pub mod first_process;
pub mod interface;
pub mod kexec;
pub mod modules;
pub mod mounts;
pub mod netlink;
pub mod poll;
pub mod power;
pub mod signals;
pub mod supervisor;
pub mod tap;
pub mod uevent;

pub use error::{Error, Result};
