//! The API: routes, who calls, and how bodies come in. One file a resource; each handler reads its values, asks `permit`, and
//! makes one transaction.

mod boot;
mod extract;
mod nodes;
pub mod openapi;
mod principals;
mod sites;
mod slices;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{delete, get, post, put};
use axum::{Json, Router};
use commonage_plc_api::rest::{MAX_WAIT_S, Me, PublicInfo, Wait};
use commonage_plc_api::{ApiError, Code};
use jiff::SignedDuration;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::db::{Db, principals as stored};
use crate::error::{Error, Result, invalid, not_found};
use crate::files::Files;
use crate::permit::Caller;
use crate::pki::Keys;
use crate::wake::Topic;
use extract::Who;
use openapi::{Empty, Errors};

/// What the handlers share.
#[derive(Debug)]
pub struct App {
    /// The database.
    pub db: Db,
    /// PLC's keys.
    pub keys: Keys,
    /// Boot files.
    pub files: Files,
    /// How far an owner may extend a slice.
    pub max_lifetime: SignedDuration,
    /// Turns true when plcd stops: long polls answer then.
    pub stopping: watch::Receiver<bool>,
}

/// SHA-256 of the public key the TLS connection proved; put into each request by the server.
#[derive(Debug, Clone)]
pub struct PeerKey(pub String);

type Shared = State<Arc<App>>;

/// All calls.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/me", get(me))
        .route("/v1/ca", get(info))
        .route("/v1/sites", get(sites::list).post(sites::create))
        .route("/v1/sites/{site}", get(sites::get))
        .route("/v1/sites/{site}/shares", put(sites::set_shares))
        .route("/v1/principals", get(principals::list).post(principals::create))
        .route("/v1/principals/{name}", get(principals::get).delete(principals::delete))
        .route("/v1/principals/{name}/ssh-keys", get(principals::list_keys).post(principals::add_key))
        .route("/v1/principals/{name}/ssh-keys/{id}", delete(principals::remove_key))
        .route("/v1/nodes", get(nodes::list).post(nodes::create))
        .route("/v1/nodes/{node}", get(nodes::get).delete(nodes::delete))
        .route("/v1/slices", get(slices::list).post(slices::create))
        .route("/v1/slices/{slice}", get(slices::get).delete(slices::delete))
        .route("/v1/slices/{slice}/owners", put(slices::set_owners))
        .route("/v1/slices/{slice}/state", put(slices::set_state))
        .route("/v1/slices/{slice}/resources", put(slices::set_resources))
        .route("/v1/slices/{slice}/nodes", put(slices::instantiate))
        .route("/v1/slices/{slice}/privileges", put(slices::set_privileges))
        .route("/v1/node/desired", get(nodes::desired))
        .route("/v1/node/status", put(nodes::report))
        .route("/v1/boot", post(boot::boot))
        .route("/v1/boot/script", get(boot::script).put(boot::publish))
        .route("/v1/boot/files/{sha256}", get(boot::get_file).put(boot::put_file))
        .fallback(no_such_call)
        .method_not_allowed_fallback(no_such_call)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), identify))
        .with_state(app)
}

/// Nobody gets further whom the database does not know now: a certificate alone is nothing.
async fn identify(State(app): Shared, mut request: Request, next: Next) -> Result<Response> {
    let key = request.extensions().get::<PeerKey>().map(|k| k.0.clone()).unwrap_or_default();
    let mut db = app.db.read().await?;
    let caller = stored::caller(&mut db, &key).await?;
    drop(db);
    let unknown = || {
        ApiError::new(Code::Unauthenticated, "PLC knows nobody with the key of this certificate; it may have been deleted").hint(
            "a node: run `commonage node create` and write a new CD; anybody else: ask a PI of the site to run \
             `commonage principal create`",
        )
    };
    let caller = caller.ok_or_else(unknown)?;
    tracing::debug!(caller = who(&caller), method = %request.method(), path = request.uri().path(), "call");
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
}

fn who(caller: &Caller) -> &str {
    match caller {
        Caller::Principal(p) => p.name.as_str(),
        Caller::Node(node) => node.as_str(),
    }
}

async fn no_such_call(request: Request) -> Error {
    let call = format!("there is no call {} {}", request.method(), request.uri().path());
    not_found(call, "the calls are listed by `plcd openapi`").into()
}

/// Who the caller is.
#[utoipa::path(get, path = "/v1/me", tag = "plc", responses((status = 200, body = Me), Errors))]
async fn me(Who(caller): Who) -> Json<Me> {
    Json(match caller {
        Caller::Principal(p) => Me::Principal(p),
        Caller::Node(node) => Me::Node { node },
    })
}

/// PLC's CA and online key.
#[utoipa::path(get, path = "/v1/ca", tag = "plc", responses((status = 200, body = PublicInfo), Errors))]
async fn info(State(app): Shared) -> Json<PublicInfo> {
    Json(PublicInfo {
        ca_pem: app.keys.ca_pem.clone(),
        online_key: commonage_nodemgr_api::Bytes(app.keys.online.verifying_key().to_bytes().to_vec()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// Reads again and again until the revision is another than the caller's, or the time is over.
async fn poll<T, F>(
    app: &App,
    topic: Topic,
    wait: Wait,
    revision: impl Fn(&T) -> u64,
    read: impl Fn() -> F,
) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let wait_s = wait.wait_s.unwrap_or(0);
    if wait_s > MAX_WAIT_S {
        let message = format!("wait_s is {wait_s}, the most is {MAX_WAIT_S}");
        return Err(invalid(message, "wait less and ask again").into());
    }
    // Subscribed before reading: what changes in between is seen.
    let mut changes = app.db.wakers().subscribe(topic);
    let mut stopping = app.stopping.clone();
    let deadline = Instant::now() + Duration::from_secs(wait_s.into());
    loop {
        changes.mark_unchanged();
        let value = read().await?;
        let news = wait.after != Some(revision(&value));
        if news || Instant::now() >= deadline || *stopping.borrow() {
            return Ok(value);
        }
        tokio::select! {
            _ = changes.changed() => {}
            _ = stopping.changed() => return Ok(value),
            () = tokio::time::sleep_until(deadline) => return Ok(value),
        }
    }
}

fn done() -> Json<Empty> {
    Json(Empty {})
}
