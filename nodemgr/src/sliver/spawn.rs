//! Spawning `sliver-vmm` so that it outlives the node manager: in a session of its own and, from before its first instruction, in
//! its control group. The only unsafe code of the node manager.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Stdio;

use tokio::process::{Child, Command};

/// Spawns `program --config config`. It joins the control group whose `cgroup.procs` is `procs`; what it says goes to `log`.
pub fn spawn(program: &Path, config: &Path, procs: Option<File>, log: File) -> io::Result<Child> {
    let mut command = Command::new(program);
    command.arg("--config").arg(config).env_clear().current_dir("/").stdin(Stdio::null());
    command.stdout(log.try_clone()?).stderr(log).kill_on_drop(false);
    let before_exec = move || {
        rustix::process::setsid()?;
        if let Some(procs) = &procs {
            // "0" is the process that writes.
            rustix::io::write(procs, b"0")?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are made: setsid and write, on a descriptor that is open; an
    // error is returned as a number, nothing allocates and no lock is taken.
    unsafe { command.pre_exec(before_exec) };
    command.spawn()
}
