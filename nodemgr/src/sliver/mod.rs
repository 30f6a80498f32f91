//! Slivers: one task owns each sliver's lifecycle; everyone else sends it [`Command`]s and watches its status.
//!
//! ```text
//!                bound                      machine adopted (the node manager was restarted)
//!                  │                    ┌──────────────────────────────────────────────┐
//!                  ▼    interval begins │                machine up                    ▼
//!              Pending ──────────► Preparing ─────────────────────────────────────► Starting
//!                                   ▲  ▲ │ cannot                                     │   │ boot script ended
//!                          backoff  │  │ ▼                 machine ended              │   ▼
//!                            over   └──┼ Failed ◄─────────────────────────────────────┴─ Running
//!                           configured └ Stopped ◄── machine ended, policy says so ───────┘
//!
//!   any ── lease over, DELETE ──► Deleting ──► gone            any ── power off ──► off (the record stays)
//! ```
//! - **Pending**: nothing exists but the record.
//! - **Preparing**: admitted again; directory, disk, control group, `machine.json`; then `sliver-vmm` is spawned. It goes on from where it was
//!   saved, or is a clone of a [template](crate::template), or boots: what is refused falls back to the next.
//! - **Starting**: the machine lives and is attached to net-demux; its init is called, says hello, is told who it is, runs the boot script.
//! - **Running**: the boot script has ended. Starting and Running are one state here (`Live`): the guest alone knows which.
//! - **Failed**: the machine ended; it is started again after 1 s, 2 s … 60 s, at once less patient when it had lived a minute. A clone that
//!   does not come up is booted at once.
//! - **Stopped**: the machine ended and its configuration says that it is to stay so; durable.
//! - **Deleting**: killed, detached; control group, directory, disk, then record and rcap removed. Marked in the database first,
//!   so a node manager that dies in the middle finishes it at its next start.
//! - **off**: saved, or shut down, for a planned end of the node.

mod begin;
pub(crate) mod console;
mod disk;
mod doorstep;
pub(crate) mod files;
mod guest;
mod launch;
mod leave;
mod lifecycle;
mod machine;
mod saved;
mod socket;
mod spawn;
mod talk;
mod visits;
mod wire;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use commonage_isolation_api::SliceName;
use commonage_nodemgr_api::http::SliverState;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::manager::Manager;

pub use disk::Blanks;
pub(crate) use files::remove_tree;
pub use files::sweep;
pub(crate) use launch::Launch;
pub use machine::{EndKind, Machine};
pub use socket::GuestSocket;
pub(crate) use visits::Visits;

/// What a sliver's task is told.
#[derive(Debug)]
pub enum Command {
    /// Its record or right changed: read it again.
    Changed,
    /// Its deletion was decided; answer when nothing is left.
    Delete(oneshot::Sender<()>),
    /// Save the guest or shut it down, then end, leaving the record; answer when the machine is gone. The node goes down at the time given.
    PowerOff(oneshot::Sender<()>, Instant),
}

/// A sliver's task.
#[derive(Debug)]
pub struct Handle {
    commands: mpsc::UnboundedSender<Command>,
    /// Its user id, which tells it from an earlier sliver of the same slice.
    pub uid: u32,
    /// How far it is.
    pub status: watch::Receiver<SliverState>,
}

impl Handle {
    /// Sends a command. What is sent is bounded by callers: each waits for its own.
    pub fn tell(&self, command: Command) {
        self.commands.send(command).ok();
    }

    /// Saves the sliver or shuts it down, and waits until its machine is gone.
    pub async fn power_off(self, deadline: Instant) {
        let (sender, off) = oneshot::channel();
        self.tell(Command::PowerOff(sender, deadline));
        off.await.ok();
    }
}

/// Starts the task of a sliver that is in the book. `new`: nothing of it can be anywhere yet.
pub fn spawn(manager: Arc<Manager>, slice: SliceName, uid: u32, new: bool) -> Handle {
    let (commands, receiver) = mpsc::unbounded_channel();
    let (publish, status) = watch::channel(SliverState::Pending);
    tokio::spawn(lifecycle::run(manager, slice, new, receiver, publish));
    Handle { commands, uid, status }
}

/// Where a sliver's files are: all the host's.
#[derive(Debug, Clone)]
pub struct Paths {
    /// `RUN/slivers/SLICE`.
    pub dir: PathBuf,
    /// `STATE/slivers/SLICE`.
    pub state: PathBuf,
}

impl Paths {
    /// Of one slice.
    pub fn new(run: &Path, state: &Path, slice: &SliceName) -> Self {
        Self {
            dir: run.join("slivers").join(slice.as_str()),
            state: state.join("slivers").join(slice.as_str()),
        }
    }

    /// The machine's vsock: connect here to reach the guest.
    pub fn vsock(&self) -> PathBuf {
        self.dir.join("vsock.sock")
    }

    /// The machine's control socket.
    pub fn control(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// The guest's console.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// What the machine's process itself says.
    pub fn vmm_log(&self) -> PathBuf {
        self.dir.join("vmm.log")
    }

    /// The machine's description.
    pub fn machine(&self) -> PathBuf {
        self.dir.join("machine.json")
    }

    /// The sliver's disk.
    pub fn disk(&self) -> PathBuf {
        self.state.join("disk.img")
    }
}
