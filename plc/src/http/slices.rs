//! The operations of PLC version 1 (PDN-04-017 §3.3).

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use commonage_isolation_api::{Interval, SliceName};
use commonage_plc_api::ApiError;
use commonage_plc_api::rest::{
    BASES, BootState, CreateSlice, MAX_BOOT_SCRIPT, Phase, Resources, SetNodes, SetOwners, SetPrivileges,
    SetResources, Slice, Wait,
};
use jiff::{SignedDuration, Timestamp};

use super::extract::{Asked, Body, Named, Who};
use super::openapi::{Empty, Errors};
use super::{Shared, done, poll};
use crate::db::desired::{Sizes, rspec};
use crate::db::{Tx, sites, slices as stored};
use crate::error::{Result, conflict, invalid};
use crate::permit::{Caller, SliceCall, Standing, renewal};
use crate::shares::MAX_SLICE_SHARE;
use crate::wake::Topic;

/// Most owners a slice may have.
const MAX_OWNERS: usize = 64;

/// create_slice: makes a slice in the database. PIs of its site.
#[utoipa::path(post, path = "/v1/slices", tag = "slices", request_body = CreateSlice, responses((status = 200, body = Slice), Errors))]
pub async fn create(
    State(app): Shared,
    Who(caller): Who,
    Body(new): Body<CreateSlice>,
) -> Result<Json<Slice>> {
    let site = new.name.site();
    caller.may_call_slice(SliceCall::Create, &site, &Default::default())?;
    let mut tx = app.db.write().await?;
    sites::get(tx.conn(), &site).await?;
    let slice = stored::create(&mut tx, &new.name).await?;
    tx.commit().await?;
    tracing::info!(slice = %slice.name, "slice created");
    Ok(Json(slice))
}

/// The slices that the caller may see: admins all, PIs their site's, owners their own.
#[utoipa::path(get, path = "/v1/slices", tag = "slices", responses((status = 200, body = Vec<Slice>), Errors))]
pub async fn list(State(app): Shared, Who(caller): Who) -> Result<Json<Vec<Slice>>> {
    caller.principal()?;
    let mut db = app.db.read().await?;
    let mut all = stored::list(&mut db).await?;
    all.retain(|s| may(&caller, SliceCall::Read, s).is_ok());
    Ok(Json(all))
}

/// One slice, at once or when it changes. As for the list.
#[utoipa::path(get, path = "/v1/slices/{slice}", tag = "slices", params(("slice" = String, Path), Wait), responses((status = 200, body = Slice), Errors))]
pub async fn get(
    State(app): Shared,
    Who(caller): Who,
    Named(name): Named<SliceName>,
    Asked(wait): Asked<Wait>,
) -> Result<Json<Slice>> {
    caller.principal()?;
    let read = || {
        let (app, name, caller) = (Arc::clone(&app), name.clone(), caller.clone());
        async move {
            let mut db = app.db.read().await?;
            let slice = stored::get(&mut db, &name).await?;
            may(&caller, SliceCall::Read, &slice)?;
            Ok(slice)
        }
    };
    // One look before waiting: nobody waits for a slice that is not there.
    read().await?;
    Ok(Json(poll(&app, Topic::Slice(name.clone()), wait, |s: &Slice| s.revision, read).await?))
}

/// delete_slice: removes a slice and its slivers; its share goes to the site's other slices. PIs of its site; owners.
#[utoipa::path(delete, path = "/v1/slices/{slice}", tag = "slices", params(("slice" = String, Path)), responses((status = 200, body = Empty), Errors))]
pub async fn delete(
    State(app): Shared,
    Who(caller): Who,
    Named(name): Named<SliceName>,
) -> Result<Json<Empty>> {
    let (mut tx, slice, _) = open(&app, &caller, SliceCall::Delete, &name).await?;
    stored::delete(&mut tx, &slice).await?;
    tx.commit().await?;
    tracing::info!(slice = %name, "slice deleted");
    Ok(done())
}

/// set_owners: says who is responsible, and who may log in. PIs of its site; present owners.
#[utoipa::path(put, path = "/v1/slices/{slice}/owners", tag = "slices", params(("slice" = String, Path)), request_body = SetOwners, responses((status = 200, body = Slice), Errors))]
pub async fn set_owners(
    State(app): Shared,
    Who(caller): Who,
    Named(name): Named<SliceName>,
    Body(wanted): Body<SetOwners>,
) -> Result<Json<Slice>> {
    let (mut tx, _, _) = open(&app, &caller, SliceCall::SetOwners, &name).await?;
    if wanted.owners.len() > MAX_OWNERS {
        return Err(invalid("a slice has at most 64 owners", "name fewer").into());
    }
    stored::set_owners(&mut tx, &name, &wanted.owners).await?;
    finish(tx, &name, "owners set").await
}

/// set_state: says how slivers start. PIs of its site; owners.
#[utoipa::path(put, path = "/v1/slices/{slice}/state", tag = "slices", params(("slice" = String, Path)), request_body = BootState, responses((status = 200, body = Slice), Errors))]
pub async fn set_state(
    State(app): Shared,
    Who(caller): Who,
    Named(name): Named<SliceName>,
    Body(wanted): Body<BootState>,
) -> Result<Json<Slice>> {
    let (mut tx, _, _) = open(&app, &caller, SliceCall::SetState, &name).await?;
    if !BASES.contains(&wanted.base.as_str()) {
        let hint = format!("choose one of {}", BASES.join(", "));
        return Err(invalid("there is no such base", hint).into());
    }
    if wanted.boot_script.len() > MAX_BOOT_SCRIPT || wanted.boot_script.contains('\0') {
        let message = "a boot script is text of at most 256 KiB";
        return Err(invalid(message, "let the script fetch what it needs").into());
    }
    stored::set_state(&mut tx, &name, &wanted).await?;
    finish(tx, &name, "state set").await
}

/// set_resources: assigns share and time, or renews. PIs of its site; once instantiated also owners, who may reduce or keep the share
/// and extend the time up to the longest lifetime.
#[utoipa::path(put, path = "/v1/slices/{slice}/resources", tag = "slices", params(("slice" = String, Path)), request_body = SetResources, responses((status = 200, body = Slice), Errors))]
pub async fn set_resources(
    State(app): Shared,
    Who(caller): Who,
    Named(name): Named<SliceName>,
    Body(mut wanted): Body<SetResources>,
) -> Result<Json<Slice>> {
    caller.principal()?;
    let mut tx = app.db.write().await?;
    let slice = stored::get(tx.conn(), &name).await?;
    let instantiated = slice.phase != Phase::Created;
    let call = if instantiated { SliceCall::Renew } else { SliceCall::SetFirstResources };
    let standing = may(&caller, call, &slice)?;
    // The database keeps milliseconds.
    wanted.end = Timestamp::from_millisecond(wanted.end.as_millisecond()).unwrap_or(wanted.end);
    if let (true, Some(present)) = (instantiated, &slice.resources) {
        renewal(standing, present, &wanted, tx.now(), app.max_lifetime)?;
    } else if wanted.end <= tx.now() {
        let message = format!("the end {} is over already", wanted.end);
        return Err(invalid(message, "give a time to come").into());
    }
    let resources = merged(slice.resources, wanted)?;
    stored::set_resources(&mut tx, &name, &resources).await?;
    finish(tx, &name, "resources set").await
}

/// instantiate_slice: makes a slice run on exactly these nodes. Asynchronous: wait on the slice to see the slivers come. PIs of its site; owners.
#[utoipa::path(put, path = "/v1/slices/{slice}/nodes", tag = "slices", params(("slice" = String, Path)), request_body = SetNodes, responses((status = 200, body = Slice), Errors))]
pub async fn instantiate(
    State(app): Shared,
    Who(caller): Who,
    Named(name): Named<SliceName>,
    Body(wanted): Body<SetNodes>,
) -> Result<Json<Slice>> {
    let (mut tx, slice, _) = open(&app, &caller, SliceCall::Instantiate, &name).await?;
    let Some(resources) = &slice.resources else {
        let message = format!("slice {name} has no resources yet");
        return Err(conflict(message, "a PI of its site sets them first (set_resources)").into());
    };
    if resources.end <= tx.now() {
        let message = format!("the time of slice {name} ended at {}", resources.end);
        return Err(conflict(message, "renew it first (set_resources)").into());
    }
    if slice.phase == Phase::Created && wanted.nodes.is_empty() {
        return Err(invalid("no node is named", "name one node or more").into());
    }
    stored::instantiate(&mut tx, &slice, &wanted.nodes).await?;
    finish(tx, &name, "instantiated").await
}

/// Gives a slice privileges at the node manager. Admins.
#[utoipa::path(put, path = "/v1/slices/{slice}/privileges", tag = "slices", params(("slice" = String, Path)), request_body = SetPrivileges, responses((status = 200, body = Slice), Errors))]
pub async fn set_privileges(
    State(app): Shared,
    Who(caller): Who,
    Named(name): Named<SliceName>,
    Body(wanted): Body<SetPrivileges>,
) -> Result<Json<Slice>> {
    let (mut tx, _, _) = open(&app, &caller, SliceCall::SetPrivileges, &name).await?;
    stored::set_privileges(&mut tx, &name, &wanted.privileges).await?;
    finish(tx, &name, "privileges set").await
}

async fn open(
    app: &super::App,
    caller: &Caller,
    call: SliceCall,
    name: &SliceName,
) -> Result<(Tx, Slice, Standing)> {
    caller.principal()?;
    let mut tx = app.db.write().await?;
    let slice = stored::get(tx.conn(), name).await?;
    let standing = may(caller, call, &slice)?;
    Ok((tx, slice, standing))
}

async fn finish(mut tx: Tx, name: &SliceName, what: &str) -> Result<Json<Slice>> {
    let slice = stored::get(tx.conn(), name).await?;
    tx.commit().await?;
    tracing::info!(slice = %name, "{what}");
    Ok(Json(slice))
}

fn may(caller: &Caller, call: SliceCall, slice: &Slice) -> std::result::Result<Standing, ApiError> {
    caller.may_call_slice(call, &slice.site, &slice.owners)
}

/// What set_resources says over what there was, checked as the nodes would check it.
fn merged(present: Option<Resources>, wanted: SetResources) -> std::result::Result<Resources, ApiError> {
    if !(1..=MAX_SLICE_SHARE).contains(&wanted.share) {
        let message = format!("share is {}; it must be 1 to {MAX_SLICE_SHARE}", wanted.share);
        return Err(invalid(message, "it is the slice's weight among its site's slices"));
    }
    let base = present.map_or_else(Sizes::default, |p| Sizes {
        memory_mib: p.memory_mib,
        disk_mib: p.disk_mib,
        ports: p.ports,
    });
    let sizes = Sizes {
        memory_mib: wanted.memory_mib.unwrap_or(base.memory_mib),
        disk_mib: wanted.disk_mib.unwrap_or(base.disk_mib),
        ports: wanted.ports.unwrap_or(base.ports),
    };
    let start = wanted.end.saturating_sub(SignedDuration::from_secs(1)).unwrap_or(Timestamp::MIN);
    rspec(1, sizes.clone(), Interval { start, end: wanted.end })
        .check()
        .map_err(|e| invalid(e.to_string(), "correct that value"))?;
    let Sizes { memory_mib, disk_mib, ports } = sizes;
    Ok(Resources { share: wanted.share, end: wanted.end, memory_mib, disk_mib, ports })
}
