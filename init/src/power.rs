//! The end: restart, power off, halt; and ctrl-alt-del as a signal instead of an immediate restart.

use rustix::system::{RebootCommand, reboot};

use crate::{
    error::{Context as _, Result},
    netlink::Netlink,
};

/// How a machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Starts again.
    Restart,
    /// Switches itself off.
    PowerOff,
    /// Stops, and stays on.
    Halt,
    /// Starts the kernel that was loaded ([`crate::kexec`]).
    Kexec,
}

/// Writes all file systems' caches, takes the network down and ends. Returns only when the kernel refuses.
///
/// # Errors
/// The kernel's reason.
pub fn end(how: End) -> Result<()> {
    rustix::fs::sync();
    // The end comes first: what stays up is only a risk.
    let _ = take_network_down();
    let command = match how {
        End::Restart => RebootCommand::Restart,
        End::PowerOff => RebootCommand::PowerOff,
        End::Halt => RebootCommand::Halt,
        End::Kexec => RebootCommand::Kexec,
    };
    reboot(command).what(|| format!("end with {how:?}"))
}

/// Takes every interface down. The kernel resets virtio devices as it ends, and its virtio-net driver (6.1 and later) then loops
/// forever over the first frame somebody still sends: a late acknowledgement is enough to hang a machine that nobody is near.
fn take_network_down() -> Result<()> {
    let mut netlink = Netlink::open()?;
    let mut done = Ok(());
    for link in netlink.links()?.iter().filter(|link| link.up) {
        done = done.and(netlink.set_down(link.index));
    }
    done
}

/// From now on ctrl-alt-del sends SIGINT to PID 1.
///
/// # Errors
/// When this is not PID 1.
pub fn ctrl_alt_del_is_a_signal() -> Result<()> {
    reboot(RebootCommand::CadOff).what(|| "take over ctrl-alt-del".into())
}
