//! The commands, one file a thing.

pub mod node;
pub mod offline_key;
pub mod principal;
pub mod release;
pub mod site;
pub mod slice;
