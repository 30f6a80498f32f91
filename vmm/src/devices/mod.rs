//! The few legacy devices a sliver has besides virtio, and the bus that all are found on.
#![forbid(unsafe_code)]

pub mod bus;
pub mod console;
