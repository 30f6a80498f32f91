//! A living machine: its process seen through its control socket, so one that an earlier node manager spawned is no different.
//!
//! The machine's own word is used to know that it lives and why it ended, never to decide whom to kill: that is its control group.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use commonage_vmm_api::{ExitReason, Metrics, Request, Response, RunState};
use tokio::process::Child;
use tokio::sync::oneshot;

use super::console;
use super::doorstep::Doorstep;
use super::wire::Wire;
use crate::demux::Ring;

/// How long a machine may take to answer.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// How long a spawned machine may take to open its control socket.
const SPAWN_WAIT: Duration = Duration::from_secs(60);
/// How long a machine that broke off may take to end.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How fast a machine writes its memory at the least, MiB a second.
const SNAPSHOT_RATE: u32 = 10;

/// A machine that lives, or ended a moment ago.
#[derive(Debug)]
pub struct Machine {
    control: PathBuf,
    /// None when it was told.
    ended: Option<oneshot::Receiver<Ended>>,
}

impl Machine {
    /// Takes over the machine that answers at `control`; also says whether its processors run.
    ///
    /// # Errors
    /// None answers.
    pub async fn adopt(control: &Path) -> io::Result<(Self, RunState)> {
        let mut wire = Wire::connect(control).await?;
        match within(ANSWER_WAIT, exchange(&mut wire, &Request::Status)).await? {
            Response::Status { state, .. } => Ok((Self::watch(wire, control, None).await?, state)),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits until a spawned machine answers, by when it has opened all its files; its socket's directory was watched since before it was
    /// spawned.
    ///
    /// # Errors
    /// It ended before, or takes too long.
    pub async fn await_spawned(control: &Path, doorstep: Doorstep, mut child: Child) -> io::Result<Self> {
        let answer = async {
            let mut wire = doorstep.open(|| Wire::connect(control)).await?;
            match exchange(&mut wire, &Request::Status).await? {
                Response::Status { .. } => Ok(wire),
                other => Err(unexpected(&other)),
            }
        };
        let wire = tokio::select! {
            biased;
            status = child.wait() => return Err(io::Error::other(format!("it ended at once: {}", status?))),
            wire = within(SPAWN_WAIT, answer) => wire,
        };
        match wire {
            Ok(wire) => Self::watch(wire, control, Some(child)).await,
            // The socket closes a moment before the process is gone; how that went says more.
            Err(e) => match tokio::time::timeout(LAST_WORDS, child.wait()).await {
                Ok(status) => Err(io::Error::other(format!("it ended at once: {}", status?))),
                Err(_) => Err(e),
            },
        }
    }

    async fn watch(mut wire: Wire, control: &Path, child: Option<Child>) -> io::Result<Self> {
        wire.send(&Request::Wait, &[]).await?;
        let (sender, ended) = oneshot::channel();
        tokio::spawn(async move {
            let said = wire.next().await;
            let status = match child {
                // Waited for in any case, so that no zombie is left.
                Some(mut child) => child.wait().await.ok(),
                None => None,
            };
            sender.send(Ended::new(said, status)).ok();
        });
        Ok(Self { control: control.to_owned(), ended: Some(ended) })
    }

    /// Why it ended, when it has. Said once; later that it did.
    pub async fn ended(&mut self) -> Ended {
        let gone = || Ended::new(Err(io::ErrorKind::BrokenPipe.into()), None);
        let Some(receiver) = &mut self.ended else { return gone() };
        let ended = receiver.await.unwrap_or_else(|_| gone());
        self.ended = None;
        ended
    }

    /// Ends it and waits until it has: the guest has `grace` to do so itself. False if it still lives a while after.
    pub async fn stop(&mut self, grace: Duration) -> bool {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        // It may have ended already: that is no failure.
        ask(&self.control, &Request::Stop { grace_ms }, &[], ANSWER_WAIT).await.ok();
        tokio::time::timeout(grace + ANSWER_WAIT, self.ended()).await.is_ok()
    }

    /// Its network ring.
    ///
    /// # Errors
    /// It does not answer with a ring.
    pub async fn ring(&self) -> io::Result<Ring> {
        let whole = async {
            let mut wire = Wire::connect(&self.control).await?;
            match exchange(&mut wire, &Request::Ring).await? {
                Response::Ring => {}
                other => return Err(unexpected(&other)),
            }
            let ring = wire.take::<3>()?;
            if wire.is_drained() {
                Ok(Arc::new(ring))
            } else {
                Err(io::Error::new(io::ErrorKind::InvalidData, "it answers more than a ring"))
            }
        };
        within(ANSWER_WAIT, whole).await
    }

    /// What it has done and takes.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn metrics(control: &Path) -> io::Result<Metrics> {
        match ask(control, &Request::Metrics, &[], ANSWER_WAIT).await? {
            Response::Metrics(metrics) => Ok(*metrics),
            other => Err(unexpected(&other)),
        }
    }

    /// [`Machine::metrics`] of this one.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn own_metrics(&self) -> io::Result<Metrics> {
        Self::metrics(&self.control).await
    }

    /// Stops its processors.
    ///
    /// # Errors
    /// It does not.
    pub async fn pause(&self) -> io::Result<()> {
        self.done(&Request::Pause, &[], ANSWER_WAIT).await
    }

    /// Lets its processors go on.
    ///
    /// # Errors
    /// It does not.
    pub async fn resume(&self) -> io::Result<()> {
        self.done(&Request::Resume, &[], ANSWER_WAIT).await
    }

    /// Has it write itself, `memory_mib` large and paused, to two empty files.
    ///
    /// # Errors
    /// It does not, or takes too long.
    pub async fn snapshot(&self, state: &File, memory: &File, memory_mib: u32) -> io::Result<()> {
        let wait = ANSWER_WAIT + Duration::from_secs((memory_mib / SNAPSHOT_RATE).into());
        self.done(&Request::Snapshot, &[state, memory], wait).await
    }

    /// Has it write down which pages it has to itself.
    ///
    /// # Errors
    /// It does not.
    pub async fn touched(&self, file: &File) -> io::Result<()> {
        self.done(&Request::Touched, &[file], ANSWER_WAIT).await
    }

    async fn done(&self, request: &Request, files: &[&File], wait: Duration) -> io::Result<()> {
        match ask(&self.control, request, files, wait).await? {
            Response::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

/// How a machine ended.
#[derive(Debug)]
pub struct Ended {
    cause: Cause,
    /// The last lines of its console, as far as the machine itself told them.
    pub console: String,
}

#[derive(Debug)]
enum Cause {
    Told(ExitReason),
    /// Its process was ended before it could tell.
    Killed(Option<ExitStatus>),
}

impl Ended {
    fn new(said: io::Result<Response>, status: Option<ExitStatus>) -> Self {
        match said {
            Ok(Response::Exited { reason, console: tail }) => {
                Self { cause: Cause::Told(reason), console: console::last_lines(tail.as_bytes()) }
            }
            _ => Self { cause: Cause::Killed(status), console: String::new() },
        }
    }

    /// What the end means for starting the machine again.
    pub fn kind(&self) -> EndKind {
        match &self.cause {
            Cause::Told(ExitReason::Reboot) => EndKind::Reboot,
            Cause::Told(ExitReason::Halt | ExitReason::Stopped) => EndKind::Halt,
            Cause::Told(ExitReason::Panic | ExitReason::TripleFault | ExitReason::Failed { .. })
            | Cause::Killed(_) => EndKind::Failure,
        }
    }
}

/// Kinds of end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndKind {
    /// The guest wants to be started again.
    Reboot,
    /// The guest wants to be off, or was told to be.
    Halt,
    /// Something went wrong.
    Failure,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Cause::Told(ExitReason::Reboot) => f.write_str("the guest rebooted"),
            Cause::Told(ExitReason::Halt) => f.write_str("the guest halted or powered off"),
            Cause::Told(ExitReason::Panic) => f.write_str("the guest's kernel panicked"),
            Cause::Told(ExitReason::TripleFault) => {
                f.write_str("the guest crashed its processor (triple fault)")
            }
            Cause::Told(ExitReason::Stopped) => f.write_str("it was stopped"),
            Cause::Told(ExitReason::Failed { message }) => {
                write!(f, "the host failed: {}", message.chars().take(400).collect::<String>())
            }
            Cause::Killed(Some(status)) => {
                write!(f, "its process was ended ({status}), perhaps for want of memory")
            }
            Cause::Killed(None) => f.write_str("its process was ended, perhaps for want of memory"),
        }
    }
}

async fn ask(control: &Path, request: &Request, files: &[&File], wait: Duration) -> io::Result<Response> {
    let whole = async {
        let mut wire = Wire::connect(control).await?;
        let descriptors: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        wire.send(request, &descriptors).await?;
        wire.next().await
    };
    within(wait, whole).await
}

async fn exchange(wire: &mut Wire, request: &Request) -> io::Result<Response> {
    wire.send(request, &[]).await?;
    wire.next().await
}

async fn within<T>(wait: Duration, exchange: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the machine does not answer");
    tokio::time::timeout(wait, exchange).await.map_err(late)?
}

/// The error of an answer that does not fit.
pub(super) fn unexpected(answer: &Response) -> io::Error {
    match answer {
        Response::Error { message } => io::Error::other(message.chars().take(400).collect::<String>()),
        _ => io::Error::new(io::ErrorKind::InvalidData, "the machine answers something else than was asked"),
    }
}

#[cfg(test)]
#[path = "machine_test.rs"]
mod tests;
