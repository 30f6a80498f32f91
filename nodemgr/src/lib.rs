//! The node manager: the only thing on a node that creates slivers and binds resources.
//!
//! It listens on no network but for the SSH front door; slivers call it over their own Unix socket, which is their identity.
//! `main.rs` only reads the command line and wires these modules together:
//!
//! - [`book`], [`config`]: who has a right to what. Pure.
//! - [`db`]: the book on disk.
//! - [`manager`]: the book, the disk and the slivers together; every call goes through it.
//! - [`api`]: HTTP for slivers. [`ssh`]: the front door for people, with [`directory`] and [`exec`].
//! - [`sliver`]: one task a sliver, which owns its machine. [`template`]: what most machines are clones of. [`restart`]: after their end.
//! - [`demux`], [`host`], [`capacity`], [`log`]: the rest of the node. [`agent`]: the sliver the node keeps for PLC.
#![deny(unsafe_code)]

pub mod agent;
pub mod api;
pub mod book;
pub mod capacity;
pub mod config;
pub mod db;
pub mod demux;
pub mod directory;
pub mod error;
pub mod exec;
pub mod host;
pub mod log;
pub mod manager;
pub mod restart;
pub mod sliver;
pub mod ssh;
pub mod template;
