//! What a sliver may use: admission over time, ports, control groups.
//!
//! - [`admission`] and [`ports`] are pure: values and time in, a decision out. Only what was [`Admitted`] can be bound.
//! - [`cgroup`] makes the kernel hold slivers to it.
//! - [`void`] is where there is nothing: what the jail of a sliver's machine is made in.
#![deny(unsafe_code)]

pub mod admission;
pub mod cgroup;
pub mod ports;
pub mod void;

pub use admission::{Admitted, Capacity, Commitment, Free, Refused, Resource, admit, free, readmit};
pub use ports::{PortError, PortRange};
