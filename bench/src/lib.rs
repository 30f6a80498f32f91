//! Benchmarks of Commonage: how many slivers a node carries, what each costs, how fast they come. QEMU's `microvm`, with the same kernel and
//! base on the same node in the same run, is the peer.
//!
//! Three programs work together. The benches (`benches/`) run on the machine of whoever asks: they build images, find a node (`benches/place`) and
//! show what came out ([`report`], [`svg`]). `bench-node` runs on the node, as root: it is a node manager that counts. `bench-guest` runs in
//! guests. What they tell each other is in [`figures`]. Sizes are in bytes or as the name says, times in microseconds; only ratios of times
//! of one run mean anything, because the node may be emulated.
#![forbid(unsafe_code)]

pub mod figures;
pub mod identity;
pub mod options;
pub mod program;
pub mod report;
pub mod stats;
pub mod svg;
