//! One sliver's connections.

use std::sync::Arc;
use std::time::Duration;

use commonage_isolation_api::SliceName;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc};
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

/// Serves the connections that `caller` makes until dropped, which also closes them, or until no more can come.
pub async fn serve<S>(mut calls: mpsc::Receiver<S>, manager: Arc<Manager>, caller: SliceName)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // Most slivers never call: what a call needs is made at the first.
    let mut router = None;
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let Some(stream) = calls.recv().await else { return };
        let router = router.get_or_insert_with(|| calls::router(Arc::clone(&manager), caller.clone()));
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
