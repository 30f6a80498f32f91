//! The exec server: one connection, one command, framed as in [`commonage_nodemgr_api::exec`].
//!
//! [`listen`] takes connections from the host only, over vsock; [`serve_connection`] is all that follows and works over any
//! stream socket. Each connection has a thread to itself, so one that is slow holds up only itself. One thread more than are busy waits for the
//! next: a clone's first command finds it there.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use commonage_init::error::{Context as _, Result};
use commonage_nodemgr_api::guest::EXEC_PORT;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener};

use crate::children::Children;
use crate::log;

pub mod process;
mod session;

/// Commands that may run at a time, over all connections.
const MAX_SESSIONS: usize = 128;
/// Threads that wait for a command when there is none.
const SPARE: usize = 1;

/// The server: connections that nobody serves yet, and the threads that will.
struct Server {
    children: Children,
    /// Whether the machine is a sliver, in which commands can be run.
    configured: Arc<AtomicBool>,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    connections: VecDeque<OwnedFd>,
    threads: usize,
    idle: usize,
}

/// Starts serving the host, from threads that never end. Until `configured`, commands are refused.
///
/// # Errors
/// The port is taken, the kernel has no vsock, or no thread.
pub fn listen(children: &Children, configured: &Arc<AtomicBool>) -> Result<()> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, EXEC_PORT)
        .what(|| format!("listen on vsock port {EXEC_PORT}"))?;
    let server = Arc::new(Server {
        children: children.clone(),
        configured: configured.clone(),
        state: Mutex::default(),
        arrived: Condvar::new(),
    });
    server.clone().hire().what(|| "start a thread".into())?;
    let accept = move || {
        loop {
            match listener.accept() {
                Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => server.clone().assign(stream.into()),
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
    crate::thread("exec", accept).what(|| "start a thread".into())
}

impl Server {
    /// Gives a connection to a thread that waits, or to a new one.
    fn assign(self: Arc<Self>, connection: OwnedFd) {
        let (enough, full) = {
            let mut state = self.lock();
            let waiting = state.connections.len();
            let (enough, full) = (waiting < state.idle, state.threads >= MAX_SESSIONS);
            if enough || !full {
                state.connections.push_back(connection);
            }
            (enough, full)
        };
        if enough {
            self.arrived.notify_one();
        } else if full {
            log(format_args!("refused a command: {MAX_SESSIONS} run already"));
        } else if let Err(e) = self.clone().hire() {
            log(format_args!("cannot start a thread for a command: {e}"));
            self.lock().connections.pop_back();
        }
    }

    fn hire(self: Arc<Self>) -> io::Result<()> {
        self.lock().threads += 1;
        let server = self.clone();
        crate::thread("session", move || server.work()).inspect_err(|_| self.lock().threads -= 1)
    }

    /// Serves connections, one after the other, until enough others wait for the next.
    fn work(&self) {
        while let Some(connection) = self.next() {
            let served = if self.configured.load(Ordering::Acquire) {
                serve_connection(connection, &self.children)
            } else {
                session::refuse(&connection, "this machine has no identity yet: it runs no commands")
            };
            if let Err(e) = served {
                log(format_args!("a command's connection broke: {e}"));
            }
        }
    }

    fn next(&self) -> Option<OwnedFd> {
        let mut state = self.lock();
        state.idle += 1;
        let next = loop {
            if let Some(connection) = state.connections.pop_front() {
                break Some(connection);
            }
            if state.idle > SPARE {
                state.threads -= 1;
                break None;
            }
            state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        state.idle -= 1;
        next
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // State is consistent whenever the lock is let go of.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs the one command of a connection and returns when all is said, or the host has hung up.
///
/// # Errors
/// The connection broke, or the host does not speak the protocol.
pub fn serve_connection(connection: OwnedFd, children: &Children) -> io::Result<()> {
    session::Session::new(connection)?.run(children, &process::Account::of_root(Path::new("/etc/passwd")))
}
