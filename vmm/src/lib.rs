//! The machine monitor of one sliver.
pub mod reactor;
pub mod virtio;
