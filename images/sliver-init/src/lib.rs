//! What PID 1 of a sliver does, as modules that `main.rs` puts in order.
//!
//! [`root`] makes the root file system, [`control`] speaks with the node manager, [`identity`] applies what it says,
//! [`boot_script`] runs the tenant's `rc.vinit`, [`exec`] runs commands, [`power`] ends it all. Every process is started through
//! [`children::Children`], the one place that reaps. The host is trusted here; the tenant's processes are not, but they are root in
//! their own machine: nothing in this crate protects a sliver from itself, only from losing what it must report.
#![deny(unsafe_code)]

pub mod boot_script;
pub mod children;
pub mod control;
pub mod error;
pub mod exec;
pub mod files;
pub mod identity;
pub mod network;
pub mod power;
pub mod root;
#[expect(unsafe_code, reason = "no safe interface offers code between fork and exec, or crediting entropy")]
pub mod sys;

/// Writes a line to the console, where the host keeps it.
pub fn log(message: impl std::fmt::Display) {
    use std::io::Write as _;
    // A console that cannot be written is no reason to stop.
    let _ = writeln!(std::io::stderr(), "sliver-init: {message}");
}
