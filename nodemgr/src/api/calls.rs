//! The calls, as [`commonage_nodemgr_api::http`] lists them. Who may do what is decided in [`crate::book`]; this only translates.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::routing::{delete, get, post, put};
use axum::{Json, Router};
use commonage_isolation_api::{Rcap, SliceName};
use commonage_nodemgr_api::error::ApiError;
use commonage_nodemgr_api::http::{
    Acquire, Acquired, Bind, Exec, ExecResult, Metrics, Network, Node, Release, Renew, Sliver, SliverConfig,
};
use serde::Serialize;

use super::body::{Failure, JsonBody, Param, no_such_call};
use super::run;
use crate::manager::Manager;

/// One sliver's view of the node manager.
#[derive(Debug, Clone)]
struct Api {
    manager: Arc<Manager>,
    caller: Arc<SliceName>,
}

/// `{}`.
#[derive(Debug, Serialize)]
struct Nothing {}

type Answer<T> = Result<Json<T>, Failure>;

/// The API as `caller` has it.
pub fn router(manager: Arc<Manager>, caller: SliceName) -> Router {
    Router::new()
        .route("/v1/acquire", post(acquire))
        .route("/v1/bind", post(bind))
        .route("/v1/release", post(release))
        .route("/v1/renew", post(renew))
        .route("/v1/rcaps", get(rcaps))
        .route("/v1/rcaps/{rcap}", get(rcap))
        .route("/v1/slivers", get(slivers))
        .route("/v1/slivers/{slice}", delete(remove))
        .route("/v1/slivers/{slice}/config", put(configure))
        .route("/v1/slivers/{slice}/exec", post(exec))
        .route("/v1/slivers/{slice}/metrics", get(metrics))
        .route("/v1/node", get(node))
        .route("/v1/network", get(network))
        .fallback(no_such_call)
        .method_not_allowed_fallback(no_such_call)
        // Bodies are bounded where they are read.
        .layer(DefaultBodyLimit::disable())
        .with_state(Api { manager, caller: Arc::new(caller) })
}

async fn acquire(State(api): State<Api>, JsonBody(ask): JsonBody<Acquire>) -> Answer<Acquired> {
    answer(api.manager.acquire(&api.caller, ask).await)
}

async fn bind(State(api): State<Api>, JsonBody(ask): JsonBody<Bind>) -> Answer<Sliver> {
    answer(api.manager.bind(&api.caller, ask).await)
}

async fn release(State(api): State<Api>, JsonBody(ask): JsonBody<Release>) -> Answer<Nothing> {
    answer(api.manager.release(ask.rcap).await.map(|()| Nothing {}))
}

async fn renew(State(api): State<Api>, JsonBody(ask): JsonBody<Renew>) -> Answer<Acquired> {
    answer(api.manager.renew(&api.caller, ask).await)
}

async fn rcaps(State(api): State<Api>) -> Json<Vec<Acquired>> {
    Json(api.manager.book().acquired_by(&api.caller))
}

async fn rcap(State(api): State<Api>, Param(rcap): Param<Rcap>) -> Answer<Acquired> {
    let found = api.manager.book().get(&rcap).map(|grant| grant.view());
    answer(found)
}

async fn slivers(State(api): State<Api>) -> Json<Vec<Sliver>> {
    Json(api.manager.visible(&api.caller))
}

async fn configure(
    State(api): State<Api>,
    Param(slice): Param<SliceName>,
    JsonBody(config): JsonBody<SliverConfig>,
) -> Answer<Sliver> {
    answer(api.manager.configure(&api.caller, slice, config).await)
}

async fn remove(State(api): State<Api>, Param(slice): Param<SliceName>) -> Answer<Nothing> {
    answer(api.manager.delete(&api.caller, slice).await.map(|()| Nothing {}))
}

async fn exec(
    State(api): State<Api>,
    Param(slice): Param<SliceName>,
    JsonBody(ask): JsonBody<Exec>,
) -> Answer<ExecResult> {
    answer(run::run(&api.manager, &api.caller, &slice, ask).await)
}

async fn metrics(State(api): State<Api>, Param(slice): Param<SliceName>) -> Answer<Metrics> {
    answer(api.manager.metrics(&api.caller, &slice).await)
}

async fn node(State(api): State<Api>) -> Json<Node> {
    Json(api.manager.node(&api.caller))
}

async fn network(State(api): State<Api>) -> Answer<Network> {
    answer(api.manager.network(&api.caller).await)
}

fn answer<T>(result: Result<T, ApiError>) -> Answer<T> {
    result.map(Json).map_err(Failure)
}

#[cfg(test)]
#[path = "calls_test.rs"]
mod tests;
