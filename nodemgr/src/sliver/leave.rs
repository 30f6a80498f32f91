//! How a sliver is left at a planned end of the node: saved, to go on where it was, or, where that cannot be, shut down.

use std::time::Duration;

use tokio::time::Instant;

use super::lifecycle::{Lifecycle, Live};
use super::saved::{About, Saving};
use crate::book::AGENT;
use crate::error::Error;
use crate::template::Shape;

/// How long a guest may take to shut down.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(15);
/// What a disk is trusted to write, MiB a second: a sliver that would take longer than there is time for is shut down.
const SAVE_RATE: u32 = 40;

impl Lifecycle {
    /// Saves the sliver or shuts it down. The node goes down at `deadline`.
    pub(super) async fn leave(&mut self, mut live: Live, deadline: Instant) {
        match self.save(&mut live, deadline).await {
            Ok(true) => tracing::info!("{}: saved", self.slice),
            Ok(false) => self.shut_down(&mut live).await,
            Err(e) => {
                tracing::warn!("{}: cannot be saved, shutting it down: {e}", self.slice);
                // It may be paused. If it does not go on it is ended below.
                live.machine.resume().await.ok();
                self.shut_down(&mut live).await;
            }
        }
        drop(live);
        self.kill_or_complain().await;
    }

    /// Asks the guest to shut down; ends the machine if it does not.
    pub(super) async fn shut_down(&mut self, live: &mut Live) {
        let grace = if live.configured { SHUTDOWN_WAIT } else { Duration::ZERO };
        if !live.machine.stop(grace).await {
            tracing::warn!("{}: its machine does not end; it is killed", self.slice);
        }
    }

    /// Saves the sliver; false if it is better shut down.
    async fn save(&mut self, live: &mut Live, deadline: Instant) -> Result<bool, Error> {
        // The agent holds the node's secrets and connections to PLC, and starts in no time.
        let (true, Some((record, grant))) = (live.configured && self.slice.as_str() != AGENT, self.bound())
        else {
            return Ok(false);
        };
        // One after the other: the disk is one, and each looks how much room is left.
        let manager = std::sync::Arc::clone(&self.manager);
        let _turn = manager.saves.lock().await;
        let needed = Duration::from_secs((grant.rspec.memory_mib / SAVE_RATE).into());
        if Instant::now() + needed + SHUTDOWN_WAIT > deadline {
            tracing::warn!("{}: there is no time to save it, shutting it down", self.slice);
            return Ok(false);
        }
        let shape = Shape::of(&record.config.base, &grant.rspec);
        let (paths, settings, uid) = (self.paths.clone(), self.manager.settings.clone(), self.uid);
        let begin = move || Saving::begin(&paths, &About::new(&settings, &paths, &shape, uid)?);
        let saving = tokio::task::spawn_blocking(begin).await??;
        let left = deadline.saturating_duration_since(Instant::now());
        let written = async {
            live.machine.pause().await?;
            live.machine.snapshot(&saving.state, &saving.memory, grant.rspec.memory_mib).await
        };
        match tokio::time::timeout(left, written).await {
            Ok(written) => written.map_err(|e| self.error(&e.to_string()))?,
            Err(_) => return Err(self.error("it takes too long to write its memory")),
        }
        let saving = tokio::task::spawn_blocking(move || saving.sync().map(|()| saving)).await??;
        // Ended before it counts as saved, so that there are never two that could go on.
        live.machine.stop(Duration::ZERO).await;
        self.kill().await?;
        tokio::task::spawn_blocking(move || saving.finish()).await??;
        Ok(true)
    }
}
