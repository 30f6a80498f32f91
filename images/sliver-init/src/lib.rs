//! What PID 1 of a sliver does, as modules that `main.rs` puts in order.
//!
//! A sliver is mostly a clone: a machine that was booted once, up to "waiting for identity", and copied while it waited. So everything that
//! needs no identity is done before ([`identity::Nameless::prepare`], [`warm`]): clones share it, and each need not do it again. And whatever
//! would make one sliver different from another is left for after: nothing draws random numbers that matter, opens the disk, sends a frame or
//! uses a TCP or UDP socket before.
//!
//! [`root`] makes the root file system over the [`disk`], [`control`] speaks with the node manager, [`identity`] applies what it says,
//! [`boot_script`] runs the tenant's `rc.vinit`, [`exec`] runs commands, [`power`] ends it all. Every process is started through
//! [`children::Children`], the one place that reaps. The host is trusted here; the tenant's processes are not, but they are root in
//! their own machine: nothing in this crate protects a sliver from itself, only from losing what it must report.
#![deny(unsafe_code)]

use std::io;

pub mod boot_script;
pub mod children;
pub mod control;
pub mod disk;
pub mod error;
pub mod exec;
pub mod files;
pub mod host_key;
pub mod identity;
pub mod network;
pub mod power;
pub mod root;
#[expect(unsafe_code, reason = "no safe interface offers code between fork and exec, or crediting entropy")]
pub mod sys;
pub mod warm;

/// Stack of a thread, bytes. Ours go neither deep nor keep buffers there.
const STACK: usize = 128 * 1024;

/// Writes a line to the console, where the host keeps it.
pub fn log(message: impl std::fmt::Display) {
    use std::io::Write as _;
    // A console that cannot be written is no reason to stop.
    let _ = writeln!(io::stderr(), "sliver-init: {message}");
}

/// Starts a thread that nobody waits for.
fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.into()).stack_size(STACK).spawn(run).map(drop)
}
