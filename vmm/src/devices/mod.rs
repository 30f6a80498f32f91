//! The few legacy devices a sliver has besides virtio, the bus that all are found on, and the console that they speak to.
#![forbid(unsafe_code)]

pub mod bus;
pub mod console;
pub mod serial;
