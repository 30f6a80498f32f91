//! The node manager: the only thing on a node that creates slivers and binds resources.
//!
//! It listens on no network but for the SSH front door; slivers call it over their own Unix socket, which is their identity.
//! `main.rs` only reads the command line and wires these modules together.
#![deny(unsafe_code)]

pub mod directory;
pub mod exec;
pub mod ssh;
