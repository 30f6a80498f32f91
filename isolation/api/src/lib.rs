//! Resource types: what a sliver may use, when, and what things are called.
//!
//! Values only, no I/O. A [`Rspec`] is the paper's resource specification (NSDI'04 §4.1.3, PDN-04-017 §3.2): one field a
//! resource, over one time interval. An [`Rcap`] is the unguessable 128-bit right to what an rspec describes.
//! Every type checks itself when it is made from text, so a value that exists is well formed.
#![forbid(unsafe_code)]

mod names;
mod ports;
mod rspec;

pub use names::{NameError, NodeId, Rcap, SiteName, SliceName};
pub use ports::{PortGrant, Protocol};
pub use rspec::{Interval, Limits, Link, Ports, Privilege, Rspec, RspecError};
