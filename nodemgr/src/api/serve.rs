//! One sliver's connections.

use std::sync::Arc;
use std::time::Duration;

use commonage_isolation_api::SliceName;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::calls;
use crate::manager::Manager;

/// Connections of one sliver at a time; more wait.
const CONNECTIONS: usize = 16;
/// How long a request's head may take, and how long a connection may idle.
const HEAD_WAIT: Duration = Duration::from_secs(30);
/// How long a connection may last: the longest command plus some.
const CONNECTION_WAIT: Duration = Duration::from_secs(360);
/// Longest request head, bytes.
const MAX_HEAD: usize = 16 * 1024;

/// Serves `caller` until dropped, which also closes its connections.
pub async fn serve(listener: UnixListener, manager: Arc<Manager>, caller: SliceName) {
    let router = calls::router(manager, caller.clone());
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of descriptors, most likely: they come back.
                tracing::warn!("{caller}: cannot accept a call: {e}");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_WAIT)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router.clone()));
        connections.spawn(async move {
            // A connection that breaks is its sliver's affair.
            tokio::time::timeout(CONNECTION_WAIT, connection).await.ok();
            drop(slot);
        });
        while connections.try_join_next().is_some() {}
    }
}
