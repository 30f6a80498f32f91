//! How a sliver ends: every process is asked, then forced; everything is written; the machine restarts, halts or is switched off.
//!
//! Programs inside ask by a signal to PID 1, as busybox's and systemd's `reboot`, `halt` and `poweroff` send them; the host asks by
//! connecting to [`POWER_PORT`].

use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use commonage_init::error::{Context as _, Result};
use commonage_init::poll;
use commonage_init::power::{self, End};
use commonage_init::signals::{Signals, send_to_all};
use commonage_vmm_api::POWER_PORT;
use rustix::mount::MountFlags;
use rustix::process::Signal;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener};

use crate::children::Children;
use crate::log;
use crate::root::Root;

/// How long processes have to end when asked.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the kernel has to end them when they are forced.
const FORCE: Duration = Duration::from_secs(2);

/// Which signals ask for which end.
fn requests() -> [(i32, End); 7] {
    // Busybox's first, then systemd's, then what the kernel sends for ctrl-alt-del.
    let realtime = |n| libc::SIGRTMIN().saturating_add(n);
    [
        (Signal::TERM.as_raw(), End::Restart),
        (Signal::USR1.as_raw(), End::Halt),
        (Signal::USR2.as_raw(), End::PowerOff),
        (realtime(3), End::Halt),
        (realtime(4), End::PowerOff),
        (realtime(5), End::Restart),
        (Signal::INT.as_raw(), End::Restart),
    ]
}

/// From now on requests for the machine's end wait here. Call it before any thread is started.
///
/// # Errors
/// The kernel refuses.
pub fn receive() -> Result<Signals> {
    Signals::open(&requests().map(|(signal, _)| signal))
}

/// Waits for a request for the machine's end, in a thread, and ends it.
///
/// # Errors
/// The port is taken, the kernel has no vsock, or no thread.
pub fn watch(signals: Signals, children: &Children, root: &Arc<OnceLock<Root>>) -> Result<()> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, POWER_PORT)
        .what(|| format!("listen on vsock port {POWER_PORT}"))?;
    let (children, root) = (children.clone(), root.clone());
    let watch = move || {
        loop {
            if let Err(e) = poll::wait(&[signals.as_fd(), listener.as_fd()], None) {
                log(e);
                std::thread::sleep(FORCE);
            }
            let asked = signals.read();
            let request = requests().into_iter().find(|(signal, _)| asked.contains(signal));
            if let Some((signal, how)) = request {
                log(format_args!("a process asked for the end ({how:?}, signal {signal})"));
                shut_down(&children, root.get(), how);
            }
            if let Some(_until_the_end) = asked_by_host(&listener) {
                log("the host asked for the end");
                shut_down(&children, root.get(), End::PowerOff);
            }
        }
    };
    crate::thread("power", watch).what(|| "start a thread".into())
}

/// The host's request, if there is one: a connection that says nothing.
fn asked_by_host(listener: &VsockListener) -> Option<vsock::VsockStream> {
    let nothing_waits = poll::wait(&[listener.as_fd()], Some(std::time::Instant::now())).ok()? == [false];
    if nothing_waits {
        return None;
    }
    // A process of the sliver itself, by loopback, sends a signal instead.
    listener.accept().ok().filter(|(_, peer)| peer.cid() == VMADDR_CID_HOST).map(|(stream, _)| stream)
}

/// Ends the machine.
fn shut_down(children: &Children, root: Option<&Root>, how: End) -> ! {
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
    // The root is an overlay over the disk; neither is mounted before there is an identity.
    for mount in root.map(|root| [Path::new("/").to_owned(), root.disk()]).into_iter().flatten() {
        if let Err(e) = rustix::mount::mount_remount(&mount, MountFlags::RDONLY, "") {
            // All was written already: the journal makes the rest good.
            log(format_args!("cannot make {} read-only: {e}", mount.display()));
        }
    }
    loop {
        if let Err(e) = power::end(how) {
            log(e);
        }
        std::thread::sleep(FORCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_signal_asks_for_one_end() {
        let ends = requests();
        for (at, (signal, _)) in ends.iter().enumerate() {
            assert!(ends[..at].iter().all(|(other, _)| other != signal), "{signal}");
        }
        // What `busybox halt`, `poweroff` and `reboot` send.
        let end = |signal| ends.iter().find(|(s, _)| *s == signal).unwrap().1;
        let busybox = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM].map(end);
        assert_eq!(busybox, [End::Halt, End::PowerOff, End::Restart]);
    }
}
