//! The end, in order: the node manager shuts its slivers down, then net-demux goes, then whatever is left; then nothing
//! is written any more.

use std::{
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use commonage_init::{
    mounts, poll, say,
    signals::{self, Signals},
    supervisor::Supervisor,
};
use rustix::process::Signal;

use crate::{
    ME,
    node::{DEMUX, MANAGER},
};

/// Slivers get this long to end.
const SLIVERS: Duration = Duration::from_secs(60);
/// Everything else.
const OTHERS: Duration = Duration::from_secs(5);

/// Stops all processes.
pub fn stop(supervisor: &mut Supervisor, signals: &Signals) {
    for (name, signal, patience) in [(MANAGER, Signal::INT, SLIVERS), (DEMUX, Signal::TERM, OTHERS)] {
        supervisor.stop(name, signal);
        let end = Instant::now() + patience;
        while supervisor.runs(name) && Instant::now() < end {
            if poll::wait(&[signals.as_fd()], Some(end)).is_err() {
                break;
            }
            // Only deaths count now: a second ctrl-alt-del changes nothing.
            signals.read();
            supervisor.reap(Instant::now());
        }
        if supervisor.runs(name) {
            say!(ME, "warning: {name} has not ended after {} s", patience.as_secs());
        }
    }
    signals::send_to_all(libc::SIGTERM);
    let end = Instant::now() + Duration::from_millis(500);
    while Instant::now() < end && poll::wait(&[signals.as_fd()], Some(end)).is_ok() {
        signals.read();
        supervisor.reap(Instant::now());
    }
    signals::send_to_all(libc::SIGKILL);
}

/// Unmounts the partitions.
pub fn unmount() {
    rustix::fs::sync();
    for target in ["/state", "/image"] {
        // Killed processes may still be on their way out.
        let end = Instant::now() + OTHERS;
        while let Err(e) = mounts::unmount(target) {
            if e.errno() != Some(libc::EBUSY) || Instant::now() >= end {
                say!(ME, "warning: {e}");
                break;
            }
            let _ = poll::wait(&[], Some(Instant::now() + Duration::from_millis(50)));
        }
    }
}
