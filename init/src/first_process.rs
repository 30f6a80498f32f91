//! The first moments of a machine's first process.

use crate::{console, mounts, say};

/// Mounts the kernel's file systems, takes the console and says that `who` starts. Run by hand, it ends the process with status 2 before it
/// does anything.
pub fn begin(who: &str, version: &str) {
    if !rustix::process::getpid().is_init() {
        say!(who, "not PID 1, so this is no boot: nothing done");
        std::process::exit(2);
    }
    // The console is not there before /dev is; until then lines go where the kernel opened one.
    if let Err(e) = mounts::mount_api().and_then(|()| console::take()) {
        say!(who, "failed: {e}");
    }
    say!(who, "commonage {version} starts");
}
