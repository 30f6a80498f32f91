//! PID 1 of a sliver: boots the machine up to "waiting for identity", then serves the node manager until it is told to stop.
//!
//! Only this file knows the order of things; each step lives in a module of the library.
#![forbid(unsafe_code)]

use std::sync::Arc;

use commonage_init::signals::Signals;
use commonage_nodemgr_api::guest::Identity;
use commonage_sliver_init::children::Children;
use commonage_sliver_init::control::{Actions, Progress};
use commonage_sliver_init::root::{self, Root};
use commonage_sliver_init::{boot_script, control, exec, identity, log, network, power};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Resource, Rlimit, Signal};
use rustix::system::RebootCommand;

/// The name until there is an identity.
const NAMELESS: &[u8] = b"sliver";
/// Signals by which programs ask PID 1 for the machine's end: `reboot`, `halt` and `poweroff` send them.
const POWER_SIGNALS: [i32; 3] = [Signal::TERM.as_raw(), Signal::USR1.as_raw(), Signal::USR2.as_raw()];
/// Open files a process may have, and may raise that to: enough for a network service.
const OPEN_FILES: (u64, u64) = (4096, 524_288);

struct Sliver {
    children: Children,
    root: Arc<Root>,
}

impl Actions for Sliver {
    fn apply(&self, identity: &Identity) -> Result<(), String> {
        identity::apply(identity).map_err(|e| e.to_string())?;
        log(format_args!(
            "this is a sliver of {} with ports {}-{}",
            identity.slice, identity.ports.first, identity.ports.last
        ));
        Ok(())
    }

    fn start_boot_script(&self, script: &str, progress: &Progress) {
        let progress = progress.clone();
        boot_script::start(script, &self.children, move |exit| {
            log(format_args!("the boot script ended with status {exit}"));
            progress.boot_script_done(exit);
        });
    }

    fn shut_down(&self) {
        log("shutting down");
        power::shut_down(&self.children, &self.root)
    }
}

fn main() -> anyhow::Result<()> {
    anyhow::ensure!(std::process::id() == 1, "sliver-init is PID 1 of a sliver; it does nothing elsewhere");
    let Err(e) = start();
    // A kernel whose PID 1 exits panics, which says less.
    log(format_args!("{e:#}; the machine is reset"));
    rustix::system::reboot(RebootCommand::Restart)?;
    Err(e)
}

fn start() -> anyhow::Result<std::convert::Infallible> {
    rustix::process::umask(0o022.into());
    let (current, maximum) = OPEN_FILES;
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(current), maximum: Some(maximum) })?;
    let root = root::enter()?;
    rustix::system::sethostname(NAMELESS)?;
    network::bring_up_loopback()?;
    let signals = Signals::open(&POWER_SIGNALS)?;
    let sliver = Sliver { children: Children::adopting()?, root: Arc::new(root) };
    exec::listen(&sliver.children)?;
    let (children, root) = (sliver.children.clone(), sliver.root.clone());
    std::thread::Builder::new().name("power".into()).spawn(move || {
        let asked = rustix::event::poll(&mut [PollFd::new(&signals, PollFlags::IN)], None);
        log(format_args!("a process asked for the end ({asked:?})"));
        power::shut_down(&children, &root)
    })?;
    log("waiting for an identity");
    control::run(&sliver, &Progress::default())
}
