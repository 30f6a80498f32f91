//! PID 1 of the boot CD: every boot of a node goes through here.
//!
//! It asks PLC how to boot and does what the answer says, if and only if the offline key signed it and PLC granted it
//! to this node for this boot ([`boot`] walks through the phases). Nothing on the node's disks can change what happens
//! before. When anything fails it says what and what to do, and starts over after a pause of 5 s that doubles to 5
//! min. There is no shell, no login and no other way in.
//!
//! It never returns: PID 1 must not.

mod boot;
mod clock_floor;
mod disk;
mod error;
mod facts;
mod install;
mod kexec;
mod network;
mod script;

use std::{thread, time::Duration};

use commonage_init::{first_process, power, say};

/// What every line on the console begins with.
const ME: &str = "boot-cd";

const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

fn main() {
    first_process::begin(ME, env!("CARGO_PKG_VERSION"));
    let mut pause = FIRST_PAUSE;
    loop {
        let mut phase = "start";
        match run(&mut phase) {
            Ok(never) => match never {},
            Err(e) => {
                say!(ME, "failed: {phase}: {e}");
                say!(ME, "what to do: {}", e.hint());
                say!(ME, "trying again in {} s", pause.as_secs());
            }
        }
        thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn run(phase: &mut &'static str) -> error::Result<std::convert::Infallible> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| error::Error::io("start the runtime", e))?;
    runtime.block_on(boot::boot(&mut |name| {
        *phase = name;
        say!(ME, "phase {name}");
    }))?;
    // The kernel to start is loaded, nothing is mounted, no connection is open.
    drop(runtime);
    Err(match power::end(power::End::Kexec) {
        Ok(()) => error::Error::Kexec("the kernel came back from kexec".into()),
        Err(e) => e.into(),
    })
}
