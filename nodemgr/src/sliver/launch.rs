//! Starting a machine's process: its directory, description and control group, the process itself, and the wait for its control socket.
//!
//! Slivers and templates start alike. Whoever calls this has made sure that no process of an earlier machine is left.

use std::fs::File;
use std::path::PathBuf;

use commonage_isolation::cgroup::Cgroup;
use commonage_isolation_api::Rspec;
use commonage_vmm_api::MachineConfig;
use tokio::process::Child;

use super::doorstep::Doorstep;
use super::machine::Machine;
use super::{Paths, console, files, spawn};
use crate::error::Error;

/// What is started.
#[derive(Debug, Clone)]
pub struct Launch {
    /// For messages: whose machine it is.
    pub owner: String,
    /// Its files.
    pub paths: Paths,
    /// Its description.
    pub config: MachineConfig,
    /// What it is held to; none where the node manager runs without control groups.
    pub group: Option<(Cgroup, Rspec)>,
    /// The machine program.
    pub program: PathBuf,
}

impl Launch {
    /// Starts it; the machine that is returned answers.
    ///
    /// # Errors
    /// A file cannot be made, or the process ended at once, with what it said.
    pub async fn start(self) -> Result<Machine, Error> {
        let (owner, paths) = (self.owner.clone(), self.paths.clone());
        let (child, doorstep) = tokio::task::spawn_blocking(move || self.spawn()).await??;
        Machine::await_spawned(&paths.control(), doorstep, child).await.map_err(|e| {
            let said = console::tail(&paths.vmm_log());
            let message = if said.is_empty() { e.to_string() } else { format!("{e}: {said}") };
            Error::Machine { slice: owner, message }
        })
    }

    /// All that blocks, at one go.
    fn spawn(self) -> Result<(Child, Doorstep), Error> {
        let paths = &self.paths;
        files::make_dir(&paths.dir)?;
        files::write_machine(paths, &self.config)?;
        let procs = match &self.group {
            Some((group, rspec)) => {
                group.create(rspec)?;
                Some(group.procs())
            }
            None => None,
        };
        let doorstep = Doorstep::watch(&paths.dir).map_err(Error::io("watch", &paths.dir))?;
        let log = paths.vmm_log();
        let log = File::create(&log).map_err(Error::io("make", &log))?;
        let child = spawn::spawn(&self.program, &paths.machine(), procs.as_deref(), log);
        Ok((child.map_err(Error::io("run", &self.program))?, doorstep))
    }
}
