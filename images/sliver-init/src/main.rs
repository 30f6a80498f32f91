//! PID 1 of a sliver: boots the machine up to "waiting for identity", then serves the node manager until it is told to stop.
//!
//! Only this file knows the order of things; each step lives in a module of the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use commonage_nodemgr_api::guest::Identity;
use commonage_sliver_init::children::Children;
use commonage_sliver_init::control::{self, Actions, Progress};
use commonage_sliver_init::identity::{self, Nameless};
use commonage_sliver_init::root::Root;
use commonage_sliver_init::{boot_script, exec, log, power, sys, warm};
use jiff::Timestamp;
use rustix::process::{Resource, Rlimit};

/// The name until there is an identity.
const NAMELESS: &[u8] = b"sliver";
/// Open files a process may have, and may raise that to: enough for a network service.
const OPEN_FILES: (u64, u64) = (4096, 524_288);

struct Sliver {
    children: Children,
    root: Arc<OnceLock<Root>>,
    /// Whether commands may be run.
    configured: Arc<AtomicBool>,
    /// Until it has an identity.
    nameless: Option<Nameless>,
}

impl Actions for Sliver {
    fn apply(&mut self, identity: &Identity) -> Result<(), String> {
        let Some(nameless) = &mut self.nameless else { return Ok(()) };
        nameless.become_sliver(identity, &self.root).map_err(|e| e.to_string())?;
        self.nameless = None;
        self.configured.store(true, Ordering::Release);
        Ok(())
    }

    fn start_boot_script(&mut self, script: &str, progress: &Progress) {
        let progress = progress.clone();
        boot_script::start(script, &self.children, move |exit| {
            if exit != 0 {
                log(format_args!("the boot script ended with status {exit}"));
            }
            progress.boot_script_done(exit);
        });
    }

    fn resume(&mut self, now: Timestamp, entropy: &[u8]) {
        if let Err(e) = identity::resume(now, entropy) {
            log(format_args!("the machine goes on with an old clock or old random numbers: {e}"));
        }
    }
}

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == warm::NOTHING) {
        return ExitCode::SUCCESS;
    }
    if std::process::id() != 1 {
        log("this is PID 1 of a sliver; it does nothing elsewhere");
        return ExitCode::FAILURE;
    }
    let Err(e) = start();
    log(format_args!("{e:#}"));
    // The kernel of a PID 1 that ends panics, which tells this from a machine that restarts or halts as it should; what is still on its way
    // to the console would be lost.
    let _ = rustix::termios::tcdrain(rustix::stdio::stderr());
    ExitCode::FAILURE
}

fn start() -> anyhow::Result<std::convert::Infallible> {
    sys::share_one_heap();
    rustix::process::umask(0o022.into());
    let (current, maximum) = OPEN_FILES;
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(current), maximum: Some(maximum) })?;
    let signals = power::receive()?;
    rustix::system::sethostname(NAMELESS)?;
    let nameless = Nameless::prepare()?;
    let mut sliver = Sliver {
        children: Children::adopting()?,
        root: Arc::default(),
        configured: Arc::default(),
        nameless: Some(nameless),
    };
    exec::listen(&sliver.children, &sliver.configured)?;
    power::watch(signals, &sliver.children, &sliver.root)?;
    let listener = control::listen()?;
    warm::up(&sliver.children);
    log("waiting for an identity");
    control::knock();
    control::serve(&listener, &mut sliver, &Progress::default())
}
