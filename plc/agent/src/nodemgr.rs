//! The node manager's local API, called over vsock.

use std::time::Duration;

use commonage_isolation_api::{Rcap, Rspec, SliceName};
use commonage_nodemgr_api::error::{ApiError, ErrorBody};
use commonage_nodemgr_api::http::{
    Acquire, Acquired, Bind, Node, PORT, Release, Renew, Sliver, SliverConfig,
};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_vsock::{VsockAddr, VsockStream};

/// vsock context id of the host.
const HOST_CID: u32 = 2;
/// Largest answer, bytes.
const MAX_ANSWER: usize = 16 << 20;
/// Making a sliver's disk may take a while on a busy node; nothing takes longer.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The node manager said no.
    #[error("{0}")]
    Api(#[from] ApiError),
    /// It could not be asked.
    #[error("the node manager does not answer ({0}); it may be restarting")]
    Transport(String),
    /// Not even asked.
    #[error("{0}")]
    Refused(String),
}

/// The node manager of this node.
#[derive(Debug)]
pub struct NodeManager;

impl NodeManager {
    /// The node and the caller.
    pub async fn node(&self) -> Result<Node, CallError> {
        self.call(Method::GET, "/v1/node", None::<&()>).await
    }

    /// The slivers this agent bound, and itself.
    pub async fn slivers(&self) -> Result<Vec<Sliver>, CallError> {
        self.call(Method::GET, "/v1/slivers", None::<&()>).await
    }

    /// The rights this agent acquired.
    pub async fn rcaps(&self) -> Result<Vec<Acquired>, CallError> {
        self.call(Method::GET, "/v1/rcaps", None::<&()>).await
    }

    /// Acquires a right.
    pub async fn acquire(&self, rspec: Rspec) -> Result<Acquired, CallError> {
        self.call(Method::POST, "/v1/acquire", Some(&Acquire { rspec })).await
    }

    /// Makes a sliver.
    pub async fn bind(&self, slice: SliceName, rcap: Rcap, config: SliverConfig) -> Result<(), CallError> {
        let sliver: Sliver = self.call(Method::POST, "/v1/bind", Some(&Bind { slice, rcap, config })).await?;
        tracing::debug!("{} is bound", sliver.slice);
        Ok(())
    }

    /// Gives a right back.
    pub async fn release(&self, rcap: Rcap) -> Result<(), CallError> {
        self.call::<_, serde_json::Value>(Method::POST, "/v1/release", Some(&Release { rcap }))
            .await
            .map(drop)
    }

    /// Moves a right's end and changes its share.
    pub async fn renew(&self, rcap: Rcap, end: Timestamp, share: u32) -> Result<(), CallError> {
        let body = Renew { rcap, end, share: Some(share) };
        self.call::<_, Acquired>(Method::POST, "/v1/renew", Some(&body)).await.map(drop)
    }

    /// Changes keys and boot script.
    pub async fn configure(&self, slice: &SliceName, config: SliverConfig) -> Result<(), CallError> {
        self.call::<_, Sliver>(Method::PUT, &format!("/v1/slivers/{slice}/config"), Some(&config))
            .await
            .map(drop)
    }

    /// Removes a sliver.
    pub async fn delete(&self, slice: &SliceName) -> Result<(), CallError> {
        let path = format!("/v1/slivers/{slice}");
        self.call::<(), serde_json::Value>(Method::DELETE, &path, None).await.map(drop)
    }

    async fn call<B: Serialize, A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<A, CallError> {
        match tokio::time::timeout(TIMEOUT, exchange(method, path, body)).await {
            Ok(result) => result,
            Err(_) => Err(CallError::Transport(format!("no answer to {path} in {} s", TIMEOUT.as_secs()))),
        }
    }
}

async fn exchange<B: Serialize, A: DeserializeOwned>(
    method: Method,
    path: &str,
    body: Option<&B>,
) -> Result<A, CallError> {
    let transport = |e: &dyn std::fmt::Display| CallError::Transport(e.to_string());
    let stream = VsockStream::connect(VsockAddr::new(HOST_CID, PORT)).await.map_err(|e| transport(&e))?;
    // One connection a call: they are few, and none outlives a restart of the node manager.
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| transport(&e))?;
    let connection = tokio::spawn(connection);
    let bytes = match body {
        Some(body) => serde_json::to_vec(body).map_err(|e| transport(&e))?,
        None => Vec::new(),
    };
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "node")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(bytes)))
        .map_err(|e| transport(&e))?;
    let response = sender.send_request(request).await.map_err(|e| transport(&e))?;
    let status = response.status();
    let answer = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|e| transport(&e))?;
    drop(sender);
    // It ends by itself once the sender is gone; how does not matter any more.
    let _ = connection.await;
    let answer = answer.to_bytes();
    if status.is_success() {
        serde_json::from_slice(&answer).map_err(|e| transport(&e))
    } else {
        let body: ErrorBody = serde_json::from_slice(&answer)
            .map_err(|_| CallError::Transport(format!("HTTP status {status}")))?;
        Err(body.error.into())
    }
}
