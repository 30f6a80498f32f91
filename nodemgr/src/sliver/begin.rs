//! How a sliver's machine begins: it goes on from where it was saved, or is a clone of a template, or boots; whatever is refused falls back to
//! the next. And how one that an earlier node manager began is taken over.

use std::sync::Arc;
use std::time::Duration;

use commonage_isolation_api::Rspec;
use commonage_net_demux_api::control::SliverId;
use commonage_vmm_api::{RunState, Start};
use jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::Instant;

use super::disk::Disk;
use super::files;
use super::guest::Link;
use super::launch::Launch;
use super::lifecycle::{Lifecycle, Live, Origin, Server};
use super::machine::Machine;
use super::saved::{self, About, Claim};
use super::visits::Visits;
use crate::api;
use crate::book::{AGENT, Grant};
use crate::demux::Attachment;
use crate::error::Error;
use crate::template::{Shape, Template};

/// A guest's calls that wait to be taken.
const WAITING_CALLS: usize = 8;
/// How long a machine that does not do its part may take to end.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What all ways to begin have in common.
struct Beginning {
    grant: Grant,
    rspec: Rspec,
    shape: Shape,
}

impl Lifecycle {
    /// Starts its machine. No process of it lives afterwards if that fails.
    pub(super) async fn start(&mut self) -> Result<Live, Error> {
        let Some((record, grant)) = self.bound() else { return Err(self.error("its record is gone")) };
        let admitted = self.manager.book().admitted(&grant, Timestamp::now());
        let admitted = admitted.map_err(|e| self.error(&format!("this node has become too small: {e}")))?;
        // Nothing may live in the directory that is made anew.
        self.kill().await?;
        let rspec = admitted.rspec().clone();
        let shape = Shape::of(&record.config.base, &rspec);
        let beginning = Beginning { grant, rspec, shape };
        match self.go_on(&beginning).await {
            Ok(Some(live)) => return Ok(live),
            Ok(None) => {}
            Err(e) => {
                tracing::warn!(
                    "{}: does not go on from where it was saved, starting it afresh: {e}",
                    self.slice
                );
                self.kill().await?;
            }
        }
        if let Some(template) = self.template(&beginning.shape).await {
            match self.clone_of(&beginning, template).await {
                Ok(live) => return Ok(live),
                Err(e) => {
                    tracing::warn!("{}: cannot be cloned, booting it instead: {e}", self.slice);
                    self.kill().await?;
                }
            }
        }
        self.boots_next = false;
        let turn = self.turn().await;
        self.begin(&beginning, Origin::Booted, files::boot(&self.manager.settings, &beginning.shape), turn)
            .await
    }

    /// The template that this start is to clone, if any. The agent is the only one of its shape, most likely: a template would be used once.
    async fn template(&self, shape: &Shape) -> Option<Template> {
        if !self.manager.settings.templates || self.boots_next || self.slice.as_str() == AGENT {
            return None;
        }
        let template = self.manager.templates.get(&self.manager, shape).await;
        template.inspect_err(|e| tracing::warn!("{}: no template, booting it instead: {e}", self.slice)).ok()
    }

    async fn clone_of(&mut self, beginning: &Beginning, template: Template) -> Result<Live, Error> {
        let turn = self.turn().await;
        let start = template.start();
        self.begin(beginning, Origin::Cloned(template), start, turn).await
    }

    /// Goes on from where it was saved, if it was.
    async fn go_on(&mut self, beginning: &Beginning) -> Result<Option<Live>, Error> {
        let (paths, settings, uid) = (self.paths.clone(), self.manager.settings.clone(), self.uid);
        let shape = beginning.shape.clone();
        let take = move || Claim::take(&paths, || About::new(&settings, &paths, &shape, uid));
        let Some(claim) = tokio::task::spawn_blocking(take).await?? else { return Ok(None) };
        if self.has_old_address() {
            return Err(self.error("the node's address changed"));
        }
        let turn = self.turn().await;
        // Dropped when the machine answers, at which it has opened the files.
        self.begin(beginning, Origin::Saved, claim.start(), turn).await.map(Some)
    }

    async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.manager.starts).acquire_owned().await.ok()
    }

    async fn begin(
        &mut self,
        beginning: &Beginning,
        origin: Origin,
        start: Start,
        turn: Option<OwnedSemaphorePermit>,
    ) -> Result<Live, Error> {
        let Beginning { grant, rspec, shape } = beginning;
        let since = Instant::now();
        let settings = &self.manager.settings;
        let blank = if self.paths.disk().exists() {
            None
        } else {
            Some(self.manager.blanks.get(rspec.disk_mib).await?)
        };
        let paths = self.paths.clone();
        if origin != Origin::Saved {
            // Of a guest that does not go on.
            std::fs::remove_file(self.address_file()).ok();
        }
        let disk = tokio::task::spawn_blocking(move || Disk::prepare(&paths, || blank)).await??;
        let config = files::machine(settings, &self.paths, shape, self.uid, disk.path(), start);
        let launch = Launch {
            owner: self.slice.to_string(),
            paths: self.paths.clone(),
            config,
            group: self.cgroup().map(|group| (group, rspec.clone())),
            program: settings.vmm.clone(),
        };
        let mut machine = match launch.start().await {
            Ok(machine) => machine,
            Err(e) => {
                self.refused(&origin);
                return Err(e);
            }
        };
        // The disk becomes durable while the guest is reached: it is told who it is, and runs anything of its tenant's, only after both.
        let settled = tokio::task::spawn_blocking(move || disk.settle());
        let up = self.serve(&machine, &origin, grant).await;
        settled.await??;
        let (link, visits, api) = match up {
            Ok(up) => up,
            Err(e) => {
                // What the machine itself says explains more than the silence that followed.
                let Ok(ended) = tokio::time::timeout(LAST_WORDS, machine.ended()).await else {
                    return Err(e);
                };
                self.refused(&origin);
                return Err(self.error(&ended.to_string()));
            }
        };
        tracing::debug!("{}: machine up after {} ms", self.slice, since.elapsed().as_millis());
        Ok(Live::new(machine, link, visits, api, origin, since, turn))
    }

    /// The machine would not start: if it was to be a clone, its template is no good.
    fn refused(&self, origin: &Origin) {
        if let Origin::Cloned(template) = origin {
            self.manager.templates.clone_failed(template, true);
        }
    }

    pub(super) async fn adopt(&mut self) -> Result<Live, Error> {
        let Some((_, grant)) = self.bound() else { return Err(self.error("its record is gone")) };
        let adopted = Machine::adopt(&self.paths.control()).await;
        let (machine, run_state) = adopted.map_err(|e| self.error(&e.to_string()))?;
        let paths = self.paths.clone();
        tokio::task::spawn_blocking(move || saved::forget(&paths)).await??;
        let (link, visits, api) = self.serve(&machine, &Origin::Adopted, &grant).await?;
        if run_state == RunState::Paused {
            // An earlier node manager was about to save it. What it wrote is gone, so there is only this one.
            machine.resume().await.map_err(|e| self.error(&e.to_string()))?;
        }
        Ok(Live::new(machine, link, visits, api, Origin::Adopted, Instant::now(), None))
    }

    /// Serves the guest's calls, begins to talk with its init and attaches it to the network.
    async fn serve(
        &mut self,
        machine: &Machine,
        origin: &Origin,
        grant: &Grant,
    ) -> Result<(Link, Visits, Server), Error> {
        let (booted, (knock, knocked)) = (*origin == Origin::Booted, oneshot::channel());
        let (calls, taken) = mpsc::channel(WAITING_CALLS);
        let visits = Visits::receive(self.paths.control(), Some(calls), booted.then_some(knock)).await;
        let visits = visits.map_err(|e| self.error(&format!("its guest's calls cannot be taken: {e}")))?;
        let api = tokio::spawn(api::serve(taken, Arc::clone(&self.manager), self.slice.clone()));
        let api = Server(api.abort_handle());
        let link = Link::start(self.paths.vsock(), booted.then_some(knocked));
        self.attach(machine, grant).await?;
        Ok((link, visits, api))
    }

    async fn attach(&mut self, machine: &Machine, grant: &Grant) -> Result<(), Error> {
        let ring = machine.ring().await.map_err(|e| self.error(&format!("no network ring: {e}")))?;
        let attachment = Attachment {
            sliver: SliverId(self.uid),
            slice: self.slice.to_string(),
            mac: files::mac(self.uid),
            ports: grant.ports.clone(),
            ring,
        };
        let refused = |e| self.error(&format!("net-demux refused it: {e}"));
        let attached = self.manager.demux.attach(attachment).await.map_err(refused);
        self.attached = true;
        attached
    }
}
