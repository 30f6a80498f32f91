//! The exec server: one connection, one command, framed as in [`commonage_nodemgr_api::exec`].
//!
//! [`listen`] takes connections from the host only, over vsock; [`serve_connection`] is all that follows and works over any
//! stream socket. Each connection has a thread, so one that is slow holds up only itself.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use commonage_init::error::{Context as _, Result};
use commonage_nodemgr_api::guest::EXEC_PORT;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener};

use crate::children::Children;
use crate::log;

pub mod process;
mod session;

/// Commands that may run at a time, over all connections.
const MAX_SESSIONS: usize = 128;

/// Starts serving the host, from a thread that never ends.
///
/// # Errors
/// The port is taken, or the kernel has no vsock.
pub fn listen(children: &Children) -> Result<()> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, EXEC_PORT)
        .what(|| format!("listen on vsock port {EXEC_PORT}"))?;
    let children = children.clone();
    let running = Arc::new(AtomicUsize::new(0));
    let accept = move || {
        loop {
            match listener.accept() {
                Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => {
                    start(OwnedFd::from(stream), &children, &running);
                }
                // A process of the sliver itself, by loopback: it can run commands without our help.
                Ok(_) => {}
                Err(e) => {
                    log(format_args!("cannot accept a connection for a command: {e}"));
                    // Out of descriptors or memory: going on at once would only burn the processor.
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        }
    };
    std::thread::Builder::new().name("exec".into()).spawn(accept).what(|| "start a thread".into())?;
    Ok(())
}

fn start(connection: OwnedFd, children: &Children, running: &Arc<AtomicUsize>) {
    if running.fetch_add(1, Ordering::Relaxed) >= MAX_SESSIONS {
        running.fetch_sub(1, Ordering::Relaxed);
        log(format_args!("refused a command: {MAX_SESSIONS} run already"));
        return;
    }
    let (children, counter) = (children.clone(), running.clone());
    let serve = move || {
        if let Err(e) = serve_connection(connection, &children) {
            log(format_args!("a command's connection broke: {e}"));
        }
        counter.fetch_sub(1, Ordering::Relaxed);
    };
    if let Err(e) = std::thread::Builder::new().name("session".into()).spawn(serve) {
        running.fetch_sub(1, Ordering::Relaxed);
        log(format_args!("cannot start a thread for a command: {e}"));
    }
}

/// Runs the one command of a connection and returns when all is said, or the host has hung up.
///
/// # Errors
/// The connection broke, or the host does not speak the protocol.
pub fn serve_connection(connection: OwnedFd, children: &Children) -> io::Result<()> {
    session::Session::new(connection)?.run(children, &process::Account::of_root(Path::new("/etc/passwd")))
}
