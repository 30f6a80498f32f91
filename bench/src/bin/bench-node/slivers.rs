//! Making slivers, as the agent of a control plane would: acquire, bind, wait until it runs, run a command in it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use commonage_isolation_api::{Interval, Limits, Link, Ports, Rspec, SliceName};
use commonage_nodemgr::book::AGENT;
use commonage_nodemgr::exec::{ExecClient, ExecReader, ExecWriter};
use commonage_nodemgr::manager::Manager;
use commonage_nodemgr_api::error::ApiError;
use commonage_nodemgr_api::exec::{Command, Frame, Start};
use commonage_nodemgr_api::http::{Acquire, Bind, SliverConfig, SliverState};
use jiff::{SignedDuration, Timestamp};
use std::sync::Arc;

use crate::world::World;

/// How long a sliver may take to run; emulated nodes that others load as well are slow.
const RUN_WAIT: Duration = Duration::from_secs(300);
/// How long a command may take.
const COMMAND_WAIT: Duration = Duration::from_secs(300);
/// Room for 2,500 slivers in the node's ports.
const PORTS: u16 = 16;

/// What all slivers are made of.
#[derive(Debug, Clone)]
pub struct Shape {
    /// The base's name.
    pub base: String,
    /// Memory of the guest, MiB.
    pub memory_mib: u32,
    /// Size of its disk, MiB.
    pub disk_mib: u32,
}

/// A sliver that answered.
#[derive(Debug)]
pub struct Sliver {
    /// Its slice.
    pub slice: SliceName,
    /// From asking for it to the end of its first command.
    pub took: Duration,
}

/// Makes the sliver of a slice and waits until a command ran in it.
pub async fn create(manager: &Arc<Manager>, name: &str, shape: &Shape) -> Result<Sliver> {
    let (agent, slice) = (agent()?, name.parse::<SliceName>().map_err(anyhow::Error::msg)?);
    let start = Instant::now();
    let rspec = rspec(shape)?;
    let acquired = manager.acquire(&agent, Acquire { rspec }).await.map_err(said)?;
    let config = SliverConfig { base: shape.base.clone(), ..SliverConfig::default() };
    let bind = Bind { slice: slice.clone(), rcap: acquired.rcap, config };
    manager.bind(&agent, bind).await.map_err(said)?;
    let running = tokio::time::timeout(RUN_WAIT, running(manager, &slice));
    running.await.map_err(|_| anyhow!("{slice} does not run after {} s", RUN_WAIT.as_secs()))??;
    let said = command(manager, &slice, &["/bin/echo", "here"]).await?;
    ensure!(said == "here\n", "{slice} answered {said:?}");
    Ok(Sliver { slice, took: start.elapsed() })
}

async fn running(manager: &Arc<Manager>, slice: &SliceName) -> Result<()> {
    let mut states = manager.follow(slice).with_context(|| format!("{slice} is gone"))?;
    loop {
        match states.borrow_and_update().clone() {
            SliverState::Running { boot_script_exit: 0 } => return Ok(()),
            state @ (SliverState::Failed { .. }
            | SliverState::Running { .. }
            | SliverState::Stopped { .. }) => {
                let paths = manager.paths(slice);
                let read = |path| std::fs::read_to_string(path).unwrap_or_default();
                bail!("{slice}: {state:?}\n{}{}", read(paths.vmm_log()), read(paths.console()))
            }
            SliverState::Pending | SliverState::Starting => {}
        }
        states.changed().await.with_context(|| format!("{slice} was deleted"))?;
    }
}

/// Runs a command in a sliver; returns what it said.
pub async fn command(manager: &Arc<Manager>, slice: &SliceName, argv: &[&str]) -> Result<String> {
    let run = async {
        let (_writer, mut reader) = start(manager, slice, argv).await?;
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        while let Some(frame) = reader.next().await? {
            match frame {
                Frame::Stdout(bytes) => output.extend(bytes),
                Frame::Stderr(bytes) => errors.extend(bytes),
                Frame::Exit(0) => return Ok(String::from_utf8(output)?),
                Frame::Exit(status) => {
                    bail!("{argv:?} ended with {status}: {}", String::from_utf8_lossy(&errors))
                }
                other => bail!("{argv:?}: {other:?}"),
            }
        }
        bail!("the sliver ended while {argv:?} ran")
    };
    let done = tokio::time::timeout(COMMAND_WAIT, run);
    let late = |_| anyhow!("{argv:?} took longer than {} s", COMMAND_WAIT.as_secs());
    done.await.map_err(late).and_then(|r| r).with_context(|| slice.to_string())
}

/// Starts a command in a sliver; it is hung up when both halves are dropped.
pub async fn start(
    manager: &Arc<Manager>,
    slice: &SliceName,
    argv: &[&str],
) -> Result<(ExecWriter, ExecReader)> {
    let argv = argv.iter().map(|a| (*a).to_owned()).collect();
    let start = Start { command: Command::Argv(argv), ..Start::default() };
    Ok(ExecClient::start(&manager.paths(slice).vsock(), start).await?)
}

/// Deletes a sliver and waits until nothing is left of it.
pub async fn delete(manager: &Arc<Manager>, slice: &SliceName) -> Result<()> {
    manager.delete(&agent()?, slice.clone()).await.map_err(said)
}

/// The processes of each sliver's machine.
pub fn processes(world: &World, slivers: &[Sliver]) -> Result<Vec<Vec<u32>>> {
    let of = |sliver: &Sliver| {
        let path: PathBuf =
            world.places.cgroups.join("slivers").join(sliver.slice.as_str()).join("cgroup.procs");
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let pids: Vec<u32> = text.lines().filter_map(|l| l.parse().ok()).collect();
        ensure!(!pids.is_empty(), "{} has no process", sliver.slice);
        Ok(pids)
    };
    slivers.iter().map(of).collect()
}

fn agent() -> Result<SliceName> {
    AGENT.parse().map_err(anyhow::Error::msg)
}

fn said(error: ApiError) -> anyhow::Error {
    anyhow!("{error}")
}

fn rspec(shape: &Shape) -> Result<Rspec> {
    let start = Timestamp::now() - SignedDuration::from_hours(1);
    let interval = Interval { start, end: start + SignedDuration::from_hours(24) };
    Ok(Rspec {
        share: 1000,
        vcpus: 1,
        memory_mib: shape.memory_mib,
        disk_mib: shape.disk_mib,
        link: Link { guaranteed_bps: 0, cap_bps: 100_000_000 },
        ports: Ports { block: PORTS, tcp: BTreeSet::new(), udp: BTreeSet::new() },
        limits: Limits { pids: 64 },
        privileges: BTreeSet::new(),
        interval,
    })
}
