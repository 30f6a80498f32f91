//! The boot server: which script a node runs, and the files it installs.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Body as RawBody;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use commonage_nodemgr_api::Bytes;
use commonage_plc_api::boot::{
    BootRequest, BootResponse, Grant, ImageFile, Script, Step, sign_grant, verify_script,
};
use commonage_plc_api::rest::{BootFile, CurrentScript, PublishScript};
use commonage_plc_api::{ApiError, Code};
use futures_util::StreamExt as _;
use jiff::SignedDuration;

use super::extract::{Body, Named, Who};
use super::openapi::Errors;
use super::{App, Shared};
use crate::db::{boot as stored, nodes, now};
use crate::error::{Error, Result, conflict, invalid};
use crate::permit::Caller;

/// How long a node may take to begin what it was granted.
const GRANT: SignedDuration = SignedDuration::from_mins(10);
/// A nonce's length, bytes.
const NONCE: usize = 32;
/// Most that is kept of a node's facts, as JSON, bytes.
const MAX_FACTS: usize = 64 << 10;
/// A refused upload is read so far, so that the refusal arrives before the connection is cut.
const DRAIN: usize = 4 << 20;

/// A node asks how to boot.
#[utoipa::path(post, path = "/v1/boot", tag = "node side", request_body = BootRequest, responses((status = 200, body = BootResponse), Errors))]
pub async fn boot(
    State(app): Shared,
    Who(caller): Who,
    Body(request): Body<BootRequest>,
) -> Result<Json<BootResponse>> {
    let node = caller.node()?;
    if *node != request.node {
        let message = format!("the certificate is node {node}'s, the request says node {}", request.node);
        let hint = "the CD's configuration is mixed up: run `commonage node create` and write a new CD";
        return Err(ApiError::new(Code::Forbidden, message).hint(hint).into());
    }
    if request.nonce.0.len() != NONCE {
        return Err(invalid("the nonce is not 32 bytes", "write a CD of this version").into());
    }
    if serde_json::to_vec(&request.facts).map_or(0, |f| f.len()) > MAX_FACTS {
        return Err(invalid("the facts are larger than 64 KiB", "send fewer").into());
    }
    let mut tx = app.db.write().await?;
    let published = stored::current(tx.conn()).await?;
    let release = published.current.release.clone();
    nodes::booted(&mut tx, node, &release, &request.facts).await?;
    tx.commit().await?;
    let now = now();
    let grant = Grant {
        node: node.clone(),
        nonce: request.nonce,
        script_sha256: published.current.sha256,
        expires: now.checked_add(GRANT).map_err(Error::corrupt("time"))?,
        now,
    };
    let grant = serde_json::to_vec(&grant).map_err(Error::corrupt("grant"))?;
    tracing::info!(%node, release, "node boots");
    Ok(Json(BootResponse {
        script: Bytes(published.script),
        script_signature: Bytes(published.signature),
        grant_signature: sign_grant(&app.keys.online, &grant),
        grant: Bytes(grant),
    }))
}

/// The current boot script. Principals.
#[utoipa::path(get, path = "/v1/boot/script", tag = "boot", responses((status = 200, body = CurrentScript), Errors))]
pub async fn script(State(app): Shared, Who(caller): Who) -> Result<Json<CurrentScript>> {
    caller.principal()?;
    let mut db = app.db.read().await?;
    Ok(Json(stored::current(&mut db).await?.current))
}

/// Makes a signed boot script current; every file it installs must be there. Admins.
#[utoipa::path(put, path = "/v1/boot/script", tag = "boot", request_body = PublishScript, responses((status = 200, body = CurrentScript), Errors))]
pub async fn publish(
    State(app): Shared,
    Who(caller): Who,
    Body(new): Body<PublishScript>,
) -> Result<Json<CurrentScript>> {
    caller.admin()?;
    verify_script(&new.offline_key.0, &new.script.0, &new.signature.0).map_err(|_| {
        let hint = "sign exactly these bytes with the offline key whose public half you send";
        invalid("the script is not signed by this offline key", hint)
    })?;
    let script: Script = serde_json::from_slice(&new.script.0)
        .map_err(|e| invalid(format!("the script cannot be read: {e}"), "sign a script of this version"))?;
    check(&app, &script).await?;
    let mut tx = app.db.write().await?;
    let current = stored::publish(&mut tx, &new, &script.release).await?;
    tx.commit().await?;
    tracing::info!(release = current.release, sha256 = current.sha256, "boot script published");
    Ok(Json(current))
}

/// A boot file's bytes. Nodes; admins.
#[utoipa::path(get, path = "/v1/boot/files/{sha256}", tag = "boot", params(("sha256" = String, Path)), responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), Errors))]
pub async fn get_file(
    State(app): Shared,
    Who(caller): Who,
    Named(sha256): Named<String>,
) -> Result<Response> {
    if !matches!(caller, Caller::Node(_)) {
        caller.admin()?;
    }
    let (body, size) = app.files.read(&sha256).await?;
    let headers = [(CONTENT_TYPE, "application/octet-stream".to_owned()), (CONTENT_LENGTH, size.to_string())];
    Ok((headers, body).into_response())
}

/// Puts a boot file; it is kept if its SHA-256 is that of the path. Admins.
#[utoipa::path(put, path = "/v1/boot/files/{sha256}", tag = "boot", params(("sha256" = String, Path)), request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses((status = 200, body = BootFile), Errors))]
pub async fn put_file(
    State(app): Shared,
    Who(caller): Who,
    Named(sha256): Named<String>,
    request: Request,
) -> Result<Json<BootFile>> {
    let body = request.into_body();
    if let Err(refused) = caller.admin() {
        drain(body).await;
        return Err(refused.into());
    }
    Ok(Json(app.files.put(&sha256, body).await?))
}

async fn drain(body: RawBody) {
    let mut left = DRAIN;
    let mut body = body.into_data_stream();
    while let Some(Ok(chunk)) = body.next().await {
        match left.checked_sub(chunk.len()) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}

/// Whether a node could run the script: files are there with their sizes, and what is started is installed.
async fn check(app: &App, script: &Script) -> Result<()> {
    let mut installed: BTreeMap<&str, &ImageFile> = BTreeMap::new();
    let mut missing = Vec::new();
    for step in &script.steps {
        match step {
            Step::Partition { .. } => {}
            Step::Install { files } => {
                for (name, file) in files {
                    if app.files.size(&file.sha256).await? != Some(file.size) {
                        missing.push(format!("{name} ({}, {} bytes)", file.sha256, file.size));
                    }
                    installed.insert(name, file);
                }
            }
            Step::Kexec { kernel, initramfs, .. } => {
                for name in [kernel, initramfs] {
                    if !installed.contains_key(name.as_str()) {
                        let message = format!("the script starts {name}, which no earlier step installs");
                        return Err(invalid(message, "add it to the install step").into());
                    }
                }
            }
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let message = format!("PLC does not have these files of the script: {}", missing.join(", "));
    Err(conflict(message, "put them first (PUT /v1/boot/files/…)").into())
}
