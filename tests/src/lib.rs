//! Whole testbeds on one machine: PLC, a network, nodes in QEMU.
//!
//! Everything is started by its own command, as an operator would, and talked to over its real interfaces; what a
//! testbed starts ends with it. [`testbed::Testbed`] puts one together; [`demo`] shows it to people; the tests in
//! `tests/` break it.
//!
//! The network is a switch and one more QEMU without a guest: its user-mode stack gives DHCP, a name server, a gateway to this machine's
//! loopback and port forwarding, so no root and no network device of this machine is needed.
#![forbid(unsafe_code)]

pub mod cli;
pub mod console;
pub mod demo;
pub mod gateway;
pub mod nested;
pub mod node;
pub mod plc;
pub mod process;
pub mod progress;
mod qmp;
pub mod ssh;
mod switch;
pub mod testbed;
