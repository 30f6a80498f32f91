//! What the process locks itself into once everything is open, before it looks into a file, has a second thread or runs the guest:
//!
//! | wall | what it takes away |
//! |---|---|
//! | user id, user namespace | everybody else's files and processes; in the namespace this one user is all there is, and no other can be made in it |
//! | mount namespace | every path: an empty root that cannot be written ([`void`]) |
//! | network namespace | every network, and every abstract Unix socket ([`void`]) |
//! | ipc and uts namespaces | System V and POSIX IPC, the host's name |
//! | pid namespace | every process to signal or trace; only possible at birth, by whoever starts this process |
//! | capabilities | all, also those over the namespaces above, for ever (no_new_privs) |
//! | resource limits | larger files than it was given, more threads than it needs, locked memory, core dumps, priorities |
//!
//! It takes the same time whatever else the host has mounted if it is given a [`Void`] to step into. The system calls that are left
//! are [`seccomp`](crate::seccomp)'s matter. Where namespaces are shared, and why: `docs/decisions/`.

pub mod allocator;
pub mod birth;

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;

use commonage_isolation::void::{self, Void, VoidError};
use commonage_vmm_api::MachineConfig;
use rustix::fs::{Mode, OFlags, open, openat};
use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Uid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags, set_capabilities_secure_bits,
    unshare_unsafe,
};

/// Threads that io_uring may have in the kernel's name: for requests that cannot be served without waiting.
const IO_WORKERS: u64 = 8;
/// What a snapshot takes beside memory, and the console's log, bytes.
const SNAPSHOT_OVERHEAD: u64 = 16 << 20;
/// Descriptors: a guest's vsock connections are most of them.
const DESCRIPTORS: u64 = 4096;

/// Why the process could not be locked in.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The configuration asks for the impossible.
    #[error("{0} is no unprivileged user: give the jail a uid of its own, neither 0 nor 4294967295")]
    User(u32),
    /// There is nowhere to go.
    #[error(transparent)]
    Void(#[from] VoidError),
    /// The kernel refused.
    #[error(
        "cannot lock the process in ({what}): {source}; start sliver-vmm as root, with one thread, or leave the jail out"
    )]
    Refused {
        /// Which wall.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn refused<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Refused { what, source: source.into() }
}

/// What a machine's process is to be locked into.
#[derive(Debug, Clone, Copy)]
pub struct Jail {
    /// User to become; without one the process stays who and where it is.
    pub uid: Option<u32>,
    /// Threads that will be started.
    pub threads: u64,
    /// Length of the largest file that will be written, bytes.
    pub file_bytes: u64,
}

impl Jail {
    /// For the machine that `config` describes, with a disk of `disk` bytes.
    pub fn new(config: &MachineConfig, disk: u64) -> Self {
        Self {
            uid: config.jail.as_ref().map(|jail| jail.uid),
            threads: u64::from(config.vcpus),
            file_bytes: disk.max((u64::from(config.memory_mib) << 20) + SNAPSHOT_OVERHEAD),
        }
    }

    /// Locks the process in, which must have one thread. In any case it can gain nothing by exec, and can neither be traced nor dump core.
    /// `void` is where to go; one is made if there is none.
    ///
    /// # Errors
    /// The process must end: it may be anywhere between outside and inside.
    pub fn enter(&self, void: Option<&Void>) -> Result<(), JailError> {
        if let Some(uid) = self.uid {
            self.lock_in(uid, void)?;
        }
        rustix::thread::set_no_new_privs(true).map_err(refused("no new privileges"))?;
        limit(Resource::Core, 0)?;
        // Last: a change of user may set it again.
        set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(refused("not to be traced"))
    }

    fn lock_in(&self, uid: u32, void: Option<&Void>) -> Result<(), JailError> {
        if uid == 0 || uid == u32::MAX {
            return Err(JailError::User(uid));
        }
        let proc = match void {
            Some(void) => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let proc = open("/proc", flags, Mode::empty()).map_err(refused("open /proc"))?;
                void.enter()?;
                proc
            }
            None => void::fall_in()?,
        };
        become_user(uid)?;
        // SAFETY: descriptors stay shared; there is one thread.
        unsafe {
            unshare_unsafe(
                UnshareFlags::NEWUSER | UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS,
            )
        }
        .map_err(refused("own namespaces"))?;
        furnish(&proc, uid).map_err(refused("own user namespace"))?;
        rustix::system::sethostname(b"").map_err(refused("the host's name"))?;
        limit(Resource::Nproc, 1 + self.threads + IO_WORKERS)?;
        limit(Resource::Fsize, self.file_bytes)?;
        limit(Resource::Nofile, DESCRIPTORS)?;
        for nothing in [Resource::Memlock, Resource::Msgqueue, Resource::Nice, Resource::Rtprio] {
            limit(nothing, 0)?;
        }
        drop_capabilities()
    }
}

/// Becomes user and group `uid`, without other groups. Capabilities stay until the namespaces are made: some hosts demand them for that.
fn become_user(uid: u32) -> Result<(), JailError> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)
        .map_err(refused("keep capabilities for a moment"))?;
    rustix::thread::set_thread_groups(&[]).map_err(refused("supplementary groups"))?;
    rustix::thread::set_thread_res_gid(group, group, group).map_err(refused("group id"))?;
    rustix::thread::set_thread_res_uid(user, user, user).map_err(refused("user id"))?;
    // The change of user gave /proc/self to root; who makes a user namespace must write to it. Nobody else runs as this user.
    set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(refused("own /proc/self"))
}

/// Gives the user namespace its one user, and takes from it that others are made within: a process that could make one would have all
/// capabilities in there.
fn furnish(proc: &OwnedFd, uid: u32) -> io::Result<()> {
    let map = format!("{uid} {uid} 1");
    for (path, text) in [
        ("self/setgroups", "deny"),
        ("self/gid_map", &map),
        ("self/uid_map", &map),
        ("sys/user/max_user_namespaces", "0"),
    ] {
        let file = openat(proc, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        File::from(file).write_all(text.as_bytes())?;
    }
    Ok(())
}

fn drop_capabilities() -> Result<(), JailError> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL) => break, // beyond the last capability this kernel knows
            Err(errno) => return Err(refused("capability bounding set")(errno)),
        }
    }
    rustix::thread::clear_ambient_capability_set().map_err(refused("ambient capabilities"))?;
    let empty = CapabilitySet::empty();
    let none = CapabilitySets { effective: empty, permitted: empty, inheritable: empty };
    rustix::thread::set_capabilities(None, none).map_err(refused("capabilities"))
}

/// Opens a file without using any capability. What a file of `/proc` tells later depends on who opened it: whoever opens `pagemap` with
/// capabilities is told where in the machine's memory pages are.
pub fn open_without_capabilities(path: &str) -> io::Result<File> {
    let before = rustix::thread::capabilities(None)?;
    let without = CapabilitySets { effective: CapabilitySet::empty(), ..before };
    rustix::thread::set_capabilities(None, without)?;
    let file = File::open(path);
    rustix::thread::set_capabilities(None, before)?;
    file
}

/// Lowers a limit, which is never raised again.
fn limit(resource: Resource, to: u64) -> Result<(), JailError> {
    let maximum = rustix::process::getrlimit(resource).maximum.map_or(to, |maximum| maximum.min(to));
    let limit = Rlimit { current: Some(maximum), maximum: Some(maximum) };
    rustix::process::setrlimit(resource, limit).map_err(refused("resource limits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobodys_and_roots_ids_are_refused() {
        for uid in [0, u32::MAX] {
            let error = Jail { uid: Some(uid), threads: 1, file_bytes: 1 }.enter(None).unwrap_err();
            assert!(matches!(error, JailError::User(refused) if refused == uid), "{error}");
        }
    }
}
