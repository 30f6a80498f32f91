//! The server: state directory, TLS, connections, stopping.
//!
//! Every connection is mutual TLS 1.3 and HTTP/1.1. A client of another CA does not get past the handshake; whom the CA signed but
//! the database does not know gets 401. Connections, handshakes and heads of requests have limits.

use std::convert::Infallible;
use std::fs::{self, File, TryLockError};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use commonage_plc_api::rest::{CreatePrincipal, Role};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::SignedDuration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tower::Service as _;

use crate::db::{Db, principals};
use crate::error::{Error, Result};
use crate::files::Files;
use crate::http::{App, PeerKey, router};
use crate::pki::{Keys, key_sha256};

const MAX_CONNECTIONS: usize = 4096;
const HANDSHAKE: Duration = Duration::from_secs(10);
/// For a request's head, and so also how long a connection may be idle.
const HEAD: Duration = Duration::from_secs(60);
/// For calls under way when plcd stops.
const LAST_CALLS: Duration = Duration::from_secs(10);

/// How to serve.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where everything is kept.
    pub state: PathBuf,
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Names and addresses that clients use for PLC, besides 127.0.0.1, localhost and the one listened on. The first one is written to
    /// the administrator's profile, and from there to whatever is made with it.
    pub names: Vec<String>,
    /// How far an owner may extend a slice.
    pub max_lifetime: SignedDuration,
}

/// A running server. Dropped, it stops without waiting for anybody.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    accepting: JoinHandle<()>,
    expiring: JoinHandle<()>,
    db: Db,
    _lock: File,
}

impl Server {
    /// Opens the state directory and begins to serve.
    ///
    /// # Errors
    /// The state directory or the address can't be used.
    pub async fn start(config: Config) -> Result<Self> {
        let Config { state, listen, names, max_lifetime } = config;
        let lock = open_state(&state)?;
        let bad = |source| Error::Listen { address: listen.to_string(), source };
        let listener = TcpListener::bind(listen).await.map_err(bad)?;
        let address =
            listener.local_addr().map_err(|source| Error::Listen { address: listen.to_string(), source })?;
        let here = if address.ip().is_unspecified() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { address.ip() };
        // The first name is how the administrator's profile, and so whatever is made with it, calls PLC.
        let port = address.port();
        let url = match names.first() {
            Some(name) if !name.contains(':') => format!("https://{name}:{port}"),
            Some(name) => format!("https://[{name}]:{port}"),
            None => format!("https://{}", SocketAddr::new(here, port)),
        };
        let keys = Keys::open(&state, &all_names(names, here))?;
        let admin = keys.admin(&state, &url)?;
        let db = Db::open(&state.join("plc.sqlite")).await?;
        ensure_admin(&db, &admin).await?;
        let files = Files::open(&state).await?;
        let tls = TlsAcceptor::from(Arc::new(keys.tls()?));
        let (stop, stopping) = watch::channel(false);
        let app = App { db: db.clone(), keys, files, max_lifetime, stopping: stopping.clone() };
        let accepting = tokio::spawn(accept(listener, tls, router(Arc::new(app)), stopping));
        let expiring = tokio::spawn(crate::expiry::run(db.clone()));
        Ok(Self { address, stop, accepting, expiring, db, _lock: lock })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no more calls, lets those under way end (long polls at once), and closes the database.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        let _ = (&mut self.accepting).await;
        self.expiring.abort();
        self.db.close().await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
        self.expiring.abort();
    }
}

/// Makes the state directory if need be; while the answer is held no other plcd can have it.
fn open_state(state: &Path) -> Result<File> {
    fs::create_dir_all(state).map_err(Error::file("making", state))?;
    // The database is made by SQLite, with the mode that the umask leaves: nobody else gets as far.
    fs::set_permissions(state, fs::Permissions::from_mode(0o700)).map_err(Error::file("closing", state))?;
    let path = state.join("lock");
    let lock = File::create(&path).map_err(Error::file("making", &path))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(Error::InUse(state.display().to_string())),
        Err(TryLockError::Error(e)) => Err(Error::file("locking", &path)(e)),
    }
}

fn all_names(mut names: Vec<String>, here: IpAddr) -> Vec<String> {
    names.extend(["127.0.0.1".to_owned(), "localhost".to_owned(), here.to_string()]);
    names.sort();
    names.dedup();
    names
}

/// The first administrator, as long as there is none at all.
async fn ensure_admin(db: &Db, key_sha256: &str) -> Result<()> {
    let mut tx = db.write().await?;
    let all = principals::list(tx.conn()).await?;
    if all.iter().any(|p| p.roles.contains(&Role::Admin)) {
        return Ok(());
    }
    let name = "admin".parse().map_err(Error::corrupt("name"))?;
    let admin = CreatePrincipal { name, site: None, roles: [Role::Admin].into(), csr: String::new() };
    principals::create(&mut tx, &admin, key_sha256).await?;
    tx.commit().await
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, router: Router, stopping: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut stop = stopping.clone();
    loop {
        while connections.try_join_next().is_some() {}
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            _ = stop.changed() => break,
            next = next => next,
        };
        match accepted {
            Ok((tcp, peer)) => {
                let (tls, router, stopping) = (tls.clone(), router.clone(), stopping.clone());
                connections.spawn(async move {
                    let _place = place;
                    if let Err(e) = connection(tcp, tls, router, stopping).await {
                        tracing::debug!(%peer, error = %e, "connection ended");
                    }
                });
            }
            Err(e) => {
                // Out of descriptors, most likely: others must end first.
                tracing::warn!(error = %e, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_CALLS, all).await.is_err() {
        tracing::warn!("some calls did not end in time");
    }
}

async fn connection(
    tcp: TcpStream,
    tls: TlsAcceptor,
    router: Router,
    mut stopping: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    tcp.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE, tls.accept(tcp)).await??;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|c| c.first());
    let peer = PeerKey(certificate.map(key_sha256).transpose()?.unwrap_or_default());
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        let mut router = router.clone();
        async move {
            Ok::<_, Infallible>(router.call(request.map(Body::new)).await.unwrap_or_else(|e| match e {}))
        }
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(stream), service);
    let mut serving = pin!(serving);
    tokio::select! {
        ended = serving.as_mut() => return Ok(ended?),
        _ = stopping.changed() => serving.as_mut().graceful_shutdown(),
    }
    Ok(serving.await?)
}
