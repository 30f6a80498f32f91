//! What PLC says to the world.
//!
//! - [`rest`]: the REST API for principals, under `/v1`, mutual TLS.
//! - [`node`]: what a node's agent pulls and reports.
//! - [`boot`]: the boot server's documents: request, signed script, signed grant.
#![forbid(unsafe_code)]

pub mod boot;
pub mod node;
pub mod rest;

pub use commonage_nodemgr_api::error::{ApiError, Code, ErrorBody};
