//! Doing once, before there is an identity, what each clone will do first: what the kernel caches and allocates for it is then the template's,
//! shared by all clones, and a clone finds its way already mapped.
//!
//! Nothing here draws random numbers, and whatever fails is left cold: a sliver works without.

use std::path::Path;
use std::process::Command;

use commonage_init::error::{Context as _, Result};
use commonage_init::mounts::{mount, unmount};
use rustix::mm::MlockAllFlags;
use rustix::mount::MountFlags;

use crate::children::Children;
use crate::host_key::HostKey;
use crate::root::{make_dir, mount_overlay};
use crate::{files, log};

/// Where a root that no sliver will have is mounted for a moment.
const REHEARSAL: &str = "/rehearsal";
/// Files that a clone will lay.
const LAID: [&str; 3] = ["/etc/hostname", "/etc/ssh/ssh_host_ed25519_key", "/root/.ssh/authorized_keys"];
/// Files of a base that a clone's first command will want, as far as the base has them.
const WANTED: [&str; 6] =
    ["bin/sh", "bin/busybox", "bin/true", "etc/passwd", "lib64/ld-linux-x86-64.so.2", "usr/bin/sh"];
/// What this program is told when it is to end at once.
pub const NOTHING: &str = "--nothing";

/// Rehearses a clone's first moments.
pub fn up(children: &Children) {
    for (what, done) in
        [("a root", rehearse_root()), ("a process", rehearse_process(children)), ("memory", map())]
    {
        if let Err(e) = done {
            log(format_args!("{what} cannot be rehearsed: {e}"));
        }
    }
    // Its numbers are never used.
    let _ = HostKey::new([0; 32], [0; 4], "rehearsal");
}

/// Mounts the base under a disk in memory, and lays files there.
fn rehearse_root() -> Result<()> {
    mount("tmpfs", REHEARSAL, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=0700")?;
    let root = format!("{REHEARSAL}/root");
    for dir in ["upper", "work", "root"] {
        make_dir(&format!("{REHEARSAL}/{dir}"))?;
    }
    mount_overlay(REHEARSAL, &root)?;
    for path in LAID {
        files::lay(Path::new(&root), path, 0o600, b"rehearsal\n")
            .map_err(std::io::Error::other)
            .what(|| "rehearse".into())?;
    }
    for path in WANTED {
        let _ = std::fs::metadata(Path::new(&root).join(path));
    }
    unmount(&root)?;
    unmount(REHEARSAL)
}

/// Runs a process that does nothing: this program itself.
fn rehearse_process(children: &Children) -> Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command.arg(NOTHING);
    crate::sys::in_new_session(&mut command, false);
    let child = children.spawn(&mut command).what(|| "start /proc/self/exe".into())?;
    child.exit.wait();
    Ok(())
}

/// Maps all of this program, so that running a part of it for the first time is no page fault.
fn map() -> Result<()> {
    rustix::mm::mlockall(MlockAllFlags::CURRENT).what(|| "map all memory".into())?;
    rustix::mm::munlockall().what(|| "let go of memory".into())
}
