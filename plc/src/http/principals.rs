//! Principals and their SSH keys.

use axum::Json;
use axum::extract::State;
use commonage_plc_api::ApiError;
use commonage_plc_api::rest::{
    AddSshKey, CreatePrincipal, IssuedPrincipal, Principal, PrincipalName, Role, SshKey,
};

use super::extract::{Body, Named, Named2, Who};
use super::openapi::{Empty, Errors};
use super::{Shared, done};
use crate::db::{principals as stored, sites};
use crate::error::{Result, invalid};
use crate::ssh_key;

/// Makes a principal and its certificate. Admins; PIs for users of their site.
#[utoipa::path(post, path = "/v1/principals", tag = "principals", request_body = CreatePrincipal, responses((status = 200, body = IssuedPrincipal), Errors))]
pub async fn create(
    State(app): Shared,
    Who(caller): Who,
    Body(new): Body<CreatePrincipal>,
) -> Result<Json<IssuedPrincipal>> {
    caller.may_keep_principal(new.site.as_ref(), &new.roles)?;
    check_roles(&new)?;
    let issued = app.keys.issue(&new.csr, new.name.as_str())?;
    let mut tx = app.db.write().await?;
    if let Some(site) = &new.site {
        sites::get(tx.conn(), site).await?;
    }
    let principal = stored::create(&mut tx, &new, &issued.key_sha256).await?;
    tx.commit().await?;
    tracing::info!(name = %principal.name, roles = ?principal.roles, "principal created");
    Ok(Json(IssuedPrincipal { principal, certificate_pem: issued.pem, ca_pem: app.keys.ca_pem.clone() }))
}

/// The principals that the caller may see: admins all, PIs their site's, anyone itself.
#[utoipa::path(get, path = "/v1/principals", tag = "principals", responses((status = 200, body = Vec<Principal>), Errors))]
pub async fn list(State(app): Shared, Who(caller): Who) -> Result<Json<Vec<Principal>>> {
    caller.principal()?;
    let mut db = app.db.read().await?;
    let mut all = stored::list(&mut db).await?;
    all.retain(|p| caller.may_read_principal(p).is_ok());
    Ok(Json(all))
}

/// One principal. As for the list.
#[utoipa::path(get, path = "/v1/principals/{name}", tag = "principals", params(("name" = String, Path)), responses((status = 200, body = Principal), Errors))]
pub async fn get(
    State(app): Shared,
    Who(caller): Who,
    Named(name): Named<PrincipalName>,
) -> Result<Json<Principal>> {
    caller.principal()?;
    let mut db = app.db.read().await?;
    let principal = stored::get(&mut db, &name).await?;
    caller.may_read_principal(&principal)?;
    Ok(Json(principal))
}

/// Deletes a principal; its slices lose it as owner. Admins; PIs for users of their site.
#[utoipa::path(delete, path = "/v1/principals/{name}", tag = "principals", params(("name" = String, Path)), responses((status = 200, body = Empty), Errors))]
pub async fn delete(
    State(app): Shared,
    Who(caller): Who,
    Named(name): Named<PrincipalName>,
) -> Result<Json<Empty>> {
    caller.principal()?;
    let mut tx = app.db.write().await?;
    let principal = stored::get(tx.conn(), &name).await?;
    caller.may_keep_principal(principal.site.as_ref(), &principal.roles)?;
    stored::delete(&mut tx, &principal).await?;
    tx.commit().await?;
    tracing::info!(%name, "principal deleted");
    Ok(done())
}

/// Adds an SSH key; slivers of the slices it owns get it. The principal itself; its site's PI.
#[utoipa::path(post, path = "/v1/principals/{name}/ssh-keys", tag = "principals", params(("name" = String, Path)), request_body = AddSshKey, responses((status = 200, body = SshKey), Errors))]
pub async fn add_key(
    State(app): Shared,
    Who(caller): Who,
    Named(name): Named<PrincipalName>,
    Body(new): Body<AddSshKey>,
) -> Result<Json<SshKey>> {
    caller.principal()?;
    let mut tx = app.db.write().await?;
    caller.may_change_keys(&stored::get(tx.conn(), &name).await?)?;
    let key = ssh_key::parse(&new.key)?;
    stored::add_ssh_key(&mut tx, &name, &key).await?;
    tx.commit().await?;
    tracing::info!(%name, fingerprint = key.fingerprint, "SSH key added");
    Ok(Json(key))
}

/// A principal's SSH keys. The principal itself; its site's PI; admins.
#[utoipa::path(get, path = "/v1/principals/{name}/ssh-keys", tag = "principals", params(("name" = String, Path)), responses((status = 200, body = Vec<SshKey>), Errors))]
pub async fn list_keys(
    State(app): Shared,
    Who(caller): Who,
    Named(name): Named<PrincipalName>,
) -> Result<Json<Vec<SshKey>>> {
    caller.principal()?;
    let mut db = app.db.read().await?;
    caller.may_read_principal(&stored::get(&mut db, &name).await?)?;
    Ok(Json(stored::ssh_keys(&mut db, &name).await?))
}

/// Removes an SSH key, also from slivers. The principal itself; its site's PI.
#[utoipa::path(delete, path = "/v1/principals/{name}/ssh-keys/{id}", tag = "principals", params(("name" = String, Path), ("id" = String, Path)), responses((status = 200, body = Empty), Errors))]
pub async fn remove_key(
    State(app): Shared,
    Who(caller): Who,
    Named2(name, id): Named2<PrincipalName>,
) -> Result<Json<Empty>> {
    caller.principal()?;
    let mut tx = app.db.write().await?;
    caller.may_change_keys(&stored::get(tx.conn(), &name).await?)?;
    stored::remove_ssh_key(&mut tx, &name, &id).await?;
    tx.commit().await?;
    tracing::info!(%name, id, "SSH key removed");
    Ok(done())
}

fn check_roles(new: &CreatePrincipal) -> std::result::Result<(), ApiError> {
    if new.roles.is_empty() {
        return Err(invalid("a principal needs a role", "give one or more of admin, pi, user"));
    }
    if new.site.is_none() && new.roles.iter().any(|r| *r != Role::Admin) {
        return Err(invalid("a PI or user belongs to a site", "name the site"));
    }
    Ok(())
}
