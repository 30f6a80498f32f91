//! How a sliver ends: every process is asked, then forced; everything is written; the machine is reset, which ends it.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use commonage_init::power::{self, End};
use commonage_init::signals::send_to_all;
use rustix::mount::MountFlags;
use rustix::process::Signal;

use crate::children::Children;
use crate::log;
use crate::root::Root;

/// How long processes have to end when asked.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the kernel has to end them when they are forced.
const FORCE: Duration = Duration::from_secs(2);

/// Ends the machine.
pub fn shut_down(children: &Children, root: &Root) -> ! {
    children.close();
    for (signal, patience) in [(Signal::TERM, PATIENCE), (Signal::KILL, FORCE)] {
        // Stopped processes must go on to see the signal.
        for signal in [signal, Signal::CONT] {
            send_to_all(signal.as_raw());
        }
        if children.wait_childless(patience) {
            break;
        }
        log(format_args!(
            "some processes did not end within {} s of signal {}",
            patience.as_secs(),
            signal.as_raw()
        ));
    }
    rustix::fs::sync();
    // The root is an overlay over the disk, which is mounted where no path leads any more, but the descriptor does.
    let read_only = MountFlags::RDONLY;
    let disk = format!("/proc/self/fd/{}", root.disk.as_fd().as_raw_fd());
    for mount in ["/", disk.as_str()] {
        if let Err(e) = rustix::mount::mount_remount(mount, read_only, "") {
            // All was written already: the journal makes the rest good.
            log(format_args!("cannot make {mount} read-only: {e}"));
        }
    }
    loop {
        if let Err(e) = power::end(End::Restart) {
            log(e);
        }
        std::thread::sleep(FORCE);
    }
}
