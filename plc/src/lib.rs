//! PLC: PlanetLab Central, the database of principals, sites, nodes and slices, the first broker, and the boot server.
//!
//! A call walks: [`serve`] (TLS, who has which key) → `http` (one file a resource: reads values, asks [`permit`]) → [`db`]
//! (one transaction) → woken long polls. [`shares`] and [`permit`] are functions of values; all of §3.3 of PDN-04-017 is there.
#![forbid(unsafe_code)]

pub mod db;
pub mod error;
mod expiry;
mod files;
mod http;
pub mod permit;
mod pki;
pub mod serve;
pub mod shares;
mod ssh_key;
mod wake;

pub use http::openapi::document;
