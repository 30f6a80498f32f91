//! Gives up every privilege, once everything is open and before the guest's first instruction.
//!
//! Must be called while the process has one thread: Linux keeps credentials per thread.
#![forbid(unsafe_code)]

use std::io;

use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// What could not be given up.
#[derive(Debug, thiserror::Error)]
#[error("cannot give up privileges ({what}): {source}; start sliver-vmm as root or leave the uid out")]
pub struct JailError {
    what: &'static str,
    source: io::Error,
}

fn failed(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> JailError {
    move |errno| JailError { what, source: errno.into() }
}

/// Becomes user and group `uid` without groups or capabilities, if given; in any case can gain none by exec, cannot be traced or dump
/// core.
pub fn enter(uid: Option<u32>) -> Result<(), JailError> {
    if let Some(uid) = uid {
        become_user(uid)?;
    }
    rustix::thread::set_no_new_privs(true).map_err(failed("no new privileges"))?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none).map_err(failed("core dumps"))?;
    // Last: changing user ids may set it again.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("tracing"))
}

fn become_user(uid: u32) -> Result<(), JailError> {
    if uid == 0 || uid == u32::MAX {
        let source = io::Error::new(io::ErrorKind::InvalidInput, format!("{uid} is no unprivileged user"));
        return Err(JailError { what: "user id", source });
    }
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL) => break, // beyond the last capability this kernel knows
            Err(errno) => return Err(failed("capability bounding set")(errno)),
        }
    }
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    rustix::thread::set_thread_groups(&[]).map_err(failed("supplementary groups"))?;
    rustix::thread::set_thread_res_gid(group, group, group).map_err(failed("group id"))?;
    rustix::thread::set_thread_res_uid(user, user, user).map_err(failed("user id"))?;
    let empty = CapabilitySet::empty();
    let none = CapabilitySets { effective: empty, permitted: empty, inheritable: empty };
    rustix::thread::set_capabilities(None, none).map_err(failed("capabilities"))?;
    rustix::thread::clear_ambient_capability_set().map_err(failed("ambient capabilities"))
}
