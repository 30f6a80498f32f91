//! PID 1 of a node. It brings the machine up, keeps net-demux and the node manager running, renews the address, buries
//! orphans, and ends the machine in order.
//!
//! One thread, one loop over signals, DHCP and the power button ([`node`]). It never returns: PID 1 must not. When the
//! machine cannot be brought up it restarts, which leads through the boot CD: that repairs what can be repaired.
//!
//! | signal | comes from | what it does |
//! |---|---|---|
//! | SIGINT, SIGTERM | ctrl-alt-del; whoever on the node wants a restart | ends all in order, restarts |
//! | SIGUSR2, power button | | ends all in order, powers off |
//! | SIGUSR1 | | ends all in order, halts |
#![forbid(unsafe_code)]

mod bring_up;
mod button;
mod faults;
mod host_network;
mod node;
mod shut_down;

use std::{thread, time::Duration};

use commonage_init::{first_process, power, say, signals::Signals};

/// What every line on the console begins with.
const ME: &str = "node-init";

/// How long a person has to read why it failed.
const BEFORE_RESTART: Duration = Duration::from_secs(30);

fn main() {
    first_process::begin(ME, env!("CARGO_PKG_VERSION"));
    let signals = [libc::SIGCHLD, libc::SIGINT, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2];
    let how = match Signals::open(&signals).and_then(node::run) {
        Ok(how) => how,
        Err(e) => {
            say!(ME, "failed: {e}");
            say!(
                ME,
                "what to do: the machine restarts in {} s; the boot CD repairs it",
                BEFORE_RESTART.as_secs()
            );
            thread::sleep(BEFORE_RESTART);
            power::End::Restart
        }
    };
    shut_down::unmount();
    loop {
        say!(ME, "{how:?}");
        if let Err(e) = power::end(how) {
            say!(ME, "failed: {e}");
        }
        thread::sleep(BEFORE_RESTART);
    }
}
