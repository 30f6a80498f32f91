//! The API's own description, made from the handlers. `plc/api/openapi.json` is its copy; a test keeps it current.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::openapi::response::Response;
use utoipa::openapi::{Content, Ref, RefOr};
use utoipa::{IntoResponses, OpenApi, ToSchema};

use super::{boot, nodes, principals, sites, slices};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "PLC",
        description = "PlanetLab Central, version 1: relative shares (PDN-04-017 §3.3). Mutual TLS; the client's certificate says who calls. Errors are ErrorBody."
    ),
    paths(
        super::me,
        super::info,
        sites::list,
        sites::create,
        sites::get,
        sites::set_shares,
        principals::list,
        principals::create,
        principals::get,
        principals::delete,
        principals::list_keys,
        principals::add_key,
        principals::remove_key,
        nodes::list,
        nodes::create,
        nodes::get,
        nodes::delete,
        slices::list,
        slices::create,
        slices::get,
        slices::delete,
        slices::set_owners,
        slices::set_state,
        slices::set_resources,
        slices::instantiate,
        slices::set_privileges,
        nodes::desired,
        nodes::report,
        boot::boot,
        boot::script,
        boot::publish,
        boot::get_file,
        boot::put_file,
    ),
    components(schemas(ErrorBody))
)]
struct Document;

/// The description, as JSON with a newline at its end.
///
/// # Errors
/// It can't be written as JSON.
pub fn document() -> serde_json::Result<String> {
    Document::openapi().to_pretty_json().map(|text| text + "\n")
}

/// An answer that says no more than that it is done.
#[derive(Debug, Serialize, ToSchema)]
pub struct Empty {}

/// The shape of every error; [`commonage_plc_api::ErrorBody`] as it is described.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only its description is used")]
struct ErrorBody {
    /// The error.
    error: ApiError,
}

/// An error.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only its description is used")]
struct ApiError {
    /// For programs: invalid, unauthenticated, forbidden, not-found, conflict, too-large, over-capacity, internal, unavailable.
    code: String,
    /// What happened, to which thing.
    message: String,
    /// What to do about it.
    hint: Option<String>,
}

/// Every call's errors.
pub struct Errors;

impl IntoResponses for Errors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let content = Content::new(Some(Ref::from_schema_name("ErrorBody")));
        let mut response = Response::new("An error: what happened, to which thing, what to do.");
        response.content.insert("application/json".to_owned(), content.into());
        BTreeMap::from([("default".to_owned(), RefOr::T(response))])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_in_the_api_crate_is_current() {
        let copy = include_str!("../../api/openapi.json");
        assert!(document().unwrap() == copy, "run: plcd openapi > plc/api/openapi.json");
    }

    #[test]
    fn every_call_is_described_and_every_description_is_of_a_call() {
        let router = include_str!("mod.rs");
        let routed: std::collections::BTreeSet<&str> =
            router.split(".route(\"").skip(1).filter_map(|s| s.split('"').next()).collect();
        let api = Document::openapi();
        let described = api.paths.paths.keys().map(String::as_str).collect();
        assert_eq!(routed, described);
    }
}
