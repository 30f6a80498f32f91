//! The shared-memory ring between a sliver's machine and net-demux, and net-demux's control protocol.

pub mod control;
mod mapping;
pub mod ring;
