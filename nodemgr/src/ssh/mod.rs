//! The SSH front door: the login name is the slice, the key one of the slice's, the commands run in its sliver.
//!
//! What always holds: nobody gets further than authentication without a key that the [`Directory`] lists *at that moment*, and each
//! new session asks it again. Nothing runs on the node itself: a session is carried, byte for byte, to the sliver's init through
//! [`crate::exec`]. What a peer can make the node keep in memory is bounded: connections ([`Limits`]), sessions a connection, and input
//! that a command does not take (see [`gate`]). File transfer subsystems and forwarding of ports are refused.

mod bridge;
mod gate;
mod handler;
mod host_key;
mod keys;
mod turnstile;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use russh::server::Config;
use russh::{Disconnect, MethodKind, MethodSet, SshId};
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::directory::Directory;
use gate::{Gate, Gated};
use handler::Visitor;
pub use host_key::HostKey;
use turnstile::{Entry, Turnstile};

/// Why the front door cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SshError {
    /// The host key's file cannot be read or written.
    #[error("the SSH host key {path}: {source}; the state partition may be full or read-only")]
    HostKeyFile {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no host key.
    #[error(
        "the SSH host key {path} cannot be used: {why}; remove it and a new one is made, which users' known_hosts will not know"
    )]
    HostKey {
        /// The file.
        path: String,
        /// Why.
        why: String,
    },
}

/// What strangers can make the node do.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at a time, of everybody.
    pub connections: usize,
    /// Connections at a time that have not logged in.
    pub strangers: usize,
    /// Of those, from one address.
    pub strangers_from_one: usize,
    /// Connections at a time that are logged in to one slice.
    pub of_one_slice: usize,
    /// How long logging in may take.
    pub login: Duration,
    /// Sessions at a time on one connection.
    pub sessions: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            strangers: 64,
            strangers_from_one: 16,
            of_one_slice: 16,
            login: Duration::from_secs(60),
            sessions: 16,
        }
    }
}

/// A peer that is silent for so long is asked by TCP whether it lives, this often, so many times. By TCP and not by SSH, because while
/// a command takes no input the peer's SSH answers wait in the same stream behind that input.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(20), 6);

/// Serves everybody who connects, until the listener fails for good. Must run inside a tokio runtime.
pub async fn serve(
    listener: TcpListener,
    host_key: HostKey,
    directory: impl Directory,
) -> std::io::Result<()> {
    serve_within(listener, host_key, directory, Limits::default()).await
}

/// Like [`serve`], within other limits.
///
/// # Errors
/// The listener's socket is unusable.
pub async fn serve_within(
    listener: TcpListener,
    host_key: HostKey,
    directory: impl Directory,
    limits: Limits,
) -> std::io::Result<()> {
    // A listener that has no address is closed or no socket at all; every other failure to accept passes.
    listener.local_addr()?;
    let config = Arc::new(config(host_key));
    let directory: Arc<dyn Directory> = Arc::new(directory);
    let connections = Arc::new(Semaphore::new(limits.connections));
    let strangers = Arc::new(Semaphore::new(limits.strangers));
    let (sources, slices) = (Turnstile::new(), Turnstile::new());
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                tracing::warn!("cannot accept an SSH connection: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Over the limit the newcomer is dropped: those who are in stay in.
        let (Ok(connection), Ok(stranger), Some(from)) = (
            connections.clone().try_acquire_owned(),
            strangers.clone().try_acquire_owned(),
            sources.enter(peer.ip(), limits.strangers_from_one),
        ) else {
            tracing::debug!(%peer, "dropped an SSH connection: there are too many");
            continue;
        };
        let (config, directory) = (config.clone(), directory.clone());
        let (stranger, slices) = (Stranger { _permit: stranger, _from: from }, slices.clone());
        tokio::spawn(async move {
            let _connection = connection;
            attend(stream, peer, config, directory, slices, limits, stranger).await;
        });
    }
}

fn config(host_key: HostKey) -> Config {
    Config {
        server_id: SshId::Standard("SSH-2.0-Commonage".into()),
        // Keyboard-interactive never lets anybody in: it is how a client without a good key is told what to do.
        methods: MethodSet::from(&[MethodKind::PublicKey, MethodKind::KeyboardInteractive][..]),
        auth_rejection_time: Duration::from_millis(200),
        auth_rejection_time_initial: Some(Duration::ZERO),
        max_auth_attempts: 20,
        keys: vec![host_key.into_private()],
        window_size: gate::WINDOW,
        // Sessions live as long as their commands; the login has a limit of its own.
        inactivity_timeout: None,
        nodelay: true,
        ..Config::default()
    }
}

/// A place among those who have not logged in.
struct Stranger {
    _permit: OwnedSemaphorePermit,
    _from: Entry<IpAddr>,
}

/// One connection, until it ends.
async fn attend(
    stream: TcpStream,
    peer: SocketAddr,
    config: Arc<Config>,
    directory: Arc<dyn Directory>,
    slices: Turnstile<String>,
    limits: Limits,
    stranger: Stranger,
) {
    if let Err(e) = keep_alive(&stream) {
        tracing::debug!(%peer, "cannot set the connection's options: {e}");
    }
    let gate = Gate::new();
    let logged_in = Arc::new(tokio::sync::Notify::new());
    let visitor = Visitor::new(peer, directory, slices, limits, gate.clone(), logged_in.clone());
    let session = async {
        let session = russh::server::run_stream(config, Gated::new(stream, gate.clone()), visitor).await?;
        let handle = session.handle();
        tokio::pin!(session);
        tokio::select! {
            done = &mut session => return done,
            why = gate.overrun() => {
                tracing::info!(%peer, "ended an SSH connection: {why}");
                let _ = handle.disconnect(Disconnect::ByApplication, why.to_owned(), String::new()).await;
            }
        }
        // The reason is on its way; a peer that does not read it is cut off.
        if tokio::time::timeout(Duration::from_secs(5), &mut session).await.is_err() {
            gate.cut();
        }
        Ok(())
    };
    tokio::pin!(session);
    let done = tokio::select! {
        done = &mut session => done,
        () = logged_in.notified() => {
            drop(stranger);
            session.await
        }
        () = tokio::time::sleep(limits.login) => {
            tracing::debug!(%peer, "did not log in in time");
            Ok(())
        }
    };
    // The session runs in a task of russh's own: without its stream it ends.
    gate.cut();
    if let Err(e) = done {
        tracing::debug!(%peer, "an SSH connection ended: {e}");
    }
}

fn keep_alive(stream: &TcpStream) -> std::io::Result<()> {
    let (idle, interval, count) = KEEPALIVE;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, idle)?;
    sockopt::set_tcp_keepintvl(stream, interval)?;
    sockopt::set_tcp_keepcnt(stream, count)?;
    // A peer that acknowledges nothing we send is dead just as well.
    let patience = idle + interval * count;
    Ok(sockopt::set_tcp_user_timeout(stream, u32::try_from(patience.as_millis()).unwrap_or(u32::MAX))?)
}
