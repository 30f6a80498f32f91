//! Sites.

use axum::Json;
use axum::extract::State;
use commonage_isolation_api::SiteName;
use commonage_plc_api::ApiError;
use commonage_plc_api::rest::{CreateSite, DEFAULT_SITE_SHARES, SetSiteShares, Site};

use super::Shared;
use super::extract::{Body, Named, Who};
use super::openapi::Errors;
use crate::db::sites as stored;
use crate::error::{Result, invalid};
use crate::shares::MAX_SITE_SHARES;

/// Makes a site. Admins.
#[utoipa::path(post, path = "/v1/sites", tag = "sites", request_body = CreateSite, responses((status = 200, body = Site), Errors))]
pub async fn create(State(app): Shared, Who(caller): Who, Body(new): Body<CreateSite>) -> Result<Json<Site>> {
    caller.admin()?;
    let shares = checked(new.shares.unwrap_or(DEFAULT_SITE_SHARES))?;
    let mut tx = app.db.write().await?;
    let site = stored::create(&mut tx, &new.name, shares).await?;
    tx.commit().await?;
    tracing::info!(site = %site.name, shares, "site created");
    Ok(Json(site))
}

/// All sites. Principals.
#[utoipa::path(get, path = "/v1/sites", tag = "sites", responses((status = 200, body = Vec<Site>), Errors))]
pub async fn list(State(app): Shared, Who(caller): Who) -> Result<Json<Vec<Site>>> {
    caller.principal()?;
    let mut db = app.db.read().await?;
    Ok(Json(stored::list(&mut db).await?))
}

/// One site. Principals.
#[utoipa::path(get, path = "/v1/sites/{site}", tag = "sites", params(("site" = String, Path)), responses((status = 200, body = Site), Errors))]
pub async fn get(State(app): Shared, Who(caller): Who, Named(site): Named<SiteName>) -> Result<Json<Site>> {
    caller.principal()?;
    let mut db = app.db.read().await?;
    Ok(Json(stored::get(&mut db, &site).await?))
}

/// Changes a site's shares. Admins.
#[utoipa::path(put, path = "/v1/sites/{site}/shares", tag = "sites", params(("site" = String, Path)), request_body = SetSiteShares, responses((status = 200, body = Site), Errors))]
pub async fn set_shares(
    State(app): Shared,
    Who(caller): Who,
    Named(site): Named<SiteName>,
    Body(wanted): Body<SetSiteShares>,
) -> Result<Json<Site>> {
    caller.admin()?;
    let shares = checked(wanted.shares)?;
    let mut tx = app.db.write().await?;
    stored::get(tx.conn(), &site).await?;
    let site = stored::set_shares(&mut tx, &site, shares).await?;
    tx.commit().await?;
    tracing::info!(site = %site.name, shares, "site shares set");
    Ok(Json(site))
}

fn checked(shares: u32) -> std::result::Result<u32, ApiError> {
    if (1..=MAX_SITE_SHARES).contains(&shares) {
        return Ok(shares);
    }
    Err(invalid(format!("shares is {shares}; it must be 1 to {MAX_SITE_SHARES}"), "100 is usual"))
}
