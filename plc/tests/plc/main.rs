//! PLC as its clients see it: real TLS, a real database, the client crate. Each test has a server of its own.
#![allow(clippy::unwrap_used, reason = "a test fails where something is not as it should be")]

mod boot;
mod durability;
mod identity;
mod node_side;
mod permissions;
mod shares;
mod slices;
mod world;
