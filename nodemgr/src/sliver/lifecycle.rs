//! The states of [`super`]'s drawing, each a function that returns the next one. How a machine begins is in [`super::begin`], what is said to its
//! guest in [`super::talk`], how it is left at the end of the node in [`super::leave`].

use std::fmt;
use std::future::pending;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use commonage_isolation::cgroup::Cgroup;
use commonage_isolation_api::{Interval, SliceName};
use commonage_net_demux_api::control::SliverId;
use commonage_nodemgr_api::guest::FromHost;
use commonage_nodemgr_api::http::SliverState;
use jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::guest::Link;
use super::machine::{EndKind, Ended, Machine};
use super::visits::Visits;
use super::{Command, Paths, console, files};
use crate::book::{Grant, SliverRecord};
use crate::error::Error;
use crate::host::Host;
use crate::manager::{Manager, sleep_until};
use crate::restart::{self, Next};
use crate::template::Template;

/// Waits between starts.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LAST_BACKOFF: Duration = Duration::from_secs(60);
/// A machine that lived so long is started again without more patience.
const LIVED_WELL: Duration = Duration::from_secs(60);
/// How long a start keeps others waiting at most.
const TURN: Duration = Duration::from_secs(15);
/// How long killing may take.
const KILL_WAIT: Duration = Duration::from_secs(20);
/// How often a cleaning up that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);

pub(super) enum State {
    Pending,
    Preparing,
    Live(Box<Live>),
    Failed(String),
    Stopped,
    Deleting(Vec<oneshot::Sender<()>>),
    Off(oneshot::Sender<()>),
}

/// Where a machine comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// Its kernel's entry.
    Booted,
    /// A template.
    Cloned(Template),
    /// What was saved before the node restarted.
    Saved,
    /// An earlier node manager.
    Adopted,
}

impl Origin {
    /// How long its guest may take until it is configured.
    fn patience(&self) -> Duration {
        Duration::from_secs(match self {
            Self::Booted | Self::Adopted => 180,
            Self::Cloned(_) | Self::Saved => 60,
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Booted => "booted",
            Self::Cloned(_) => "cloned",
            Self::Saved => "went on from where it was saved",
            Self::Adopted => "taken over",
        })
    }
}

/// A machine that lives.
pub(super) struct Live {
    pub machine: Machine,
    pub link: Link,
    pub origin: Origin,
    pub _visits: Visits,
    pub _api: Server,
    /// Where to speak to the guest's init.
    pub guest: Option<mpsc::Sender<FromHost>>,
    pub since: Instant,
    pub configured: bool,
    /// Asked for its identity while the node had no address.
    pub nameless: bool,
    /// While it has this, few others are started.
    pub turn: Option<OwnedSemaphorePermit>,
}

impl Live {
    pub(super) fn new(
        machine: Machine,
        link: Link,
        visits: Visits,
        api: Server,
        origin: Origin,
        since: Instant,
        turn: Option<OwnedSemaphorePermit>,
    ) -> Self {
        let (guest, configured, nameless) = (None, false, false);
        Self { machine, link, origin, _visits: visits, _api: api, guest, since, configured, nameless, turn }
    }
}

/// A task that ends with its owner.
pub(super) struct Server(pub AbortHandle);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Why a machine has ended, or has to.
pub(super) enum End {
    /// By itself.
    Itself(Ended),
    /// The node manager wants it so.
    Wanted(String),
}

pub(super) struct Lifecycle {
    pub manager: Arc<Manager>,
    pub slice: SliceName,
    pub uid: u32,
    pub paths: Paths,
    pub commands: mpsc::UnboundedReceiver<Command>,
    pub publish: watch::Sender<SliverState>,
    pub host: watch::Receiver<Option<Host>>,
    backoff: Duration,
    /// Its clone did not come up: the next start boots.
    pub boots_next: bool,
    /// net-demux may have it.
    pub attached: bool,
}

/// Lives a sliver's life.
pub async fn run(
    manager: Arc<Manager>,
    slice: SliceName,
    new: bool,
    commands: mpsc::UnboundedReceiver<Command>,
    publish: watch::Sender<SliverState>,
) {
    let Some(record) = manager.book().sliver(&slice).cloned() else { return };
    let (paths, host, uid) = (manager.paths(&slice), manager.host.clone(), record.uid);
    let mut life = Lifecycle {
        manager,
        slice,
        uid,
        paths,
        commands,
        publish,
        host,
        backoff: FIRST_BACKOFF,
        boots_next: false,
        attached: !new,
    };
    let mut state = life.first_state(&record).await;
    loop {
        state = match state {
            State::Pending => life.pending().await,
            State::Preparing => life.preparing().await,
            State::Live(live) => life.live(*live).await,
            State::Failed(reason) => life.failed(reason).await,
            State::Stopped => life.stopped().await,
            State::Deleting(waiting) => return life.delete(waiting).await,
            State::Off(answer) => {
                answer.send(()).ok();
                return;
            }
        };
    }
}

impl Lifecycle {
    /// Where a sliver is when its task begins: new, or left by an earlier node manager.
    async fn first_state(&mut self, record: &SliverRecord) -> State {
        if record.deleting {
            return State::Deleting(Vec::new());
        }
        let populated = self.cgroup().is_some_and(|g| g.populated().unwrap_or(true));
        if !populated {
            self.detach().await;
            return if record.stopped.is_some() { State::Stopped } else { State::Pending };
        }
        match self.adopt().await {
            Ok(live) => {
                tracing::info!("{}: its machine lives; taken over", self.slice);
                State::Live(Box::new(live))
            }
            Err(e) => {
                tracing::warn!("{}: cannot take over its machine ({e}); starting it anew", self.slice);
                self.kill_or_complain().await;
                State::Pending
            }
        }
    }

    async fn pending(&mut self) -> State {
        let Some(Interval { start, end }) = self.lease() else { return State::Deleting(Vec::new()) };
        if start <= Timestamp::now() {
            return State::Preparing;
        }
        self.publish.send_replace(SliverState::Pending);
        tokio::select! {
            () = sleep_until(start) => State::Preparing,
            () = sleep_until(end) => self.expired(),
            command = self.commands.recv() => self.unless_ended(command).unwrap_or(State::Pending),
        }
    }

    async fn preparing(&mut self) -> State {
        if self.lease().is_none_or(|lease| lease.end <= Timestamp::now()) {
            return self.expired();
        }
        self.publish.send_if_modified(|s| {
            // A failure stays visible until the machine is up again.
            let quiet = matches!(s, SliverState::Pending | SliverState::Stopped { .. });
            if quiet {
                *s = SliverState::Starting;
            }
            quiet
        });
        match self.start().await {
            Ok(live) => State::Live(Box::new(live)),
            Err(e) => {
                self.kill_or_complain().await;
                State::Failed(self.with_console(format!("it could not be started: {e}"), ""))
            }
        }
    }

    async fn live(&mut self, mut live: Live) -> State {
        if !matches!(*self.publish.borrow(), SliverState::Running { .. }) {
            self.publish.send_replace(SliverState::Starting);
        }
        let patience = live.origin.patience();
        while let Some(Interval { end, .. }) = self.lease() {
            let late = until(!live.configured, live.since + patience);
            let turn_over = until(live.turn.is_some(), live.since + TURN);
            tokio::select! {
                ended = live.machine.ended() => return self.ended(live, End::Itself(ended)).await,
                said = live.link.said.recv() => {
                    if let Some(said) = said && let Err(reason) = self.hear(&mut live, said).await {
                        return self.ended(live, End::Wanted(reason)).await;
                    }
                }
                () = late => {
                    let reason = format!("its guest was not configured within {} s", patience.as_secs());
                    return self.ended(live, End::Wanted(reason)).await;
                }
                () = turn_over => live.turn = None,
                changed = self.host.changed() => {
                    // Without a sender no address ever comes: the node manager is ending.
                    if changed.is_err() {
                        pending::<()>().await;
                    }
                    if live.nameless {
                        self.introduce(&mut live).await;
                    } else if self.has_old_address() {
                        self.shut_down(&mut live).await;
                        return self.ended(live, End::Wanted("the node's address changed".to_owned())).await;
                    }
                }
                () = sleep_until(end) => return self.expired(),
                command = self.commands.recv() => match command {
                    Some(Command::Changed) => self.apply_limits(),
                    Some(Command::Delete(answer)) => return State::Deleting(vec![answer]),
                    Some(Command::PowerOff(answer, deadline)) => {
                        self.leave(live, deadline).await;
                        return State::Off(answer);
                    }
                    None => pending().await,
                },
            }
        }
        State::Deleting(Vec::new())
    }

    /// The machine ended, or has to.
    async fn ended(&mut self, live: Live, end: End) -> State {
        if live.since.elapsed() >= LIVED_WELL {
            self.backoff = FIRST_BACKOFF;
        }
        let (configured, origin) = (live.configured, live.origin.clone());
        drop(live);
        self.kill_or_complain().await;
        let (kind, reason) = match end {
            End::Itself(ended) => (ended.kind(), self.with_console(ended.to_string(), &ended.console)),
            End::Wanted(reason) => (EndKind::Failure, self.with_console(reason, "")),
        };
        match origin {
            Origin::Cloned(template) if !configured => {
                tracing::warn!("{}: its clone did not come up, booting it instead: {reason}", self.slice);
                self.manager.templates.clone_failed(&template, false);
                self.boots_next = true;
                return State::Preparing;
            }
            Origin::Saved if !configured => {
                tracing::warn!(
                    "{}: did not go on from where it was saved, starting it afresh: {reason}",
                    self.slice
                );
                return State::Preparing;
            }
            _ => {}
        }
        let policy = self.bound().map(|(record, _)| record.config.restart).unwrap_or_default();
        // What the node wanted ended is the node's business to start again.
        match restart::decide(policy, kind, configured) {
            Next::Again => State::Failed(reason),
            Next::Stopped => self.stop(reason).await,
        }
    }

    async fn failed(&mut self, reason: String) -> State {
        tracing::warn!("{}: {reason}; starting it again in {} s", self.slice, self.backoff.as_secs());
        self.publish.send_replace(SliverState::Failed { reason });
        let over = Instant::now() + self.backoff;
        self.backoff = (self.backoff * 2).min(LAST_BACKOFF);
        while let Some(Interval { end, .. }) = self.lease() {
            tokio::select! {
                () = tokio::time::sleep_until(over) => return State::Preparing,
                () = sleep_until(end) => return self.expired(),
                command = self.commands.recv() => if let Some(next) = self.unless_ended(command) {
                    return next;
                },
            }
        }
        State::Deleting(Vec::new())
    }

    /// Its machine ended and is not started again; a node manager that restarts has to know.
    async fn stop(&mut self, reason: String) -> State {
        tracing::info!("{}: {reason}; not started again, as it is configured", self.slice);
        let (slice, uid, noted) = (self.slice.clone(), self.uid, reason.clone());
        match self.manager.change(move |book| Ok((book.stop(&slice, uid, noted), ()))).await {
            Ok(()) => State::Stopped,
            Err(e) => State::Failed(format!("{reason}; that it is to stay so could not be noted: {e}")),
        }
    }

    async fn stopped(&mut self) -> State {
        while let Some(Interval { end, .. }) = self.lease() {
            let Some(reason) = self.bound().and_then(|(record, _)| record.stopped) else {
                self.backoff = FIRST_BACKOFF;
                return State::Preparing;
            };
            self.publish.send_replace(SliverState::Stopped { reason });
            tokio::select! {
                () = sleep_until(end) => return self.expired(),
                // A change may be that it is configured anew: then it is no longer noted as stopped.
                command = self.commands.recv() => if let Some(next) = self.unless_ended(command) {
                    return next;
                },
            }
        }
        State::Deleting(Vec::new())
    }

    /// Removes everything, again and again until nothing is left.
    async fn delete(mut self, mut waiting: Vec<oneshot::Sender<()>>) {
        let (slice, uid) = (self.slice.clone(), self.uid);
        if let Err(e) = self.manager.change(move |book| Ok((book.condemn(&slice, uid), ()))).await {
            tracing::error!("{}: {e}", self.slice);
        }
        while let Err(e) = self.remove_all().await {
            tracing::error!("{}: cannot be removed yet: {e}", self.slice);
            let retry = tokio::time::sleep(RETRY);
            tokio::pin!(retry);
            loop {
                tokio::select! {
                    () = &mut retry => break,
                    command = self.commands.recv() => match command {
                        Some(Command::Delete(answer)) => waiting.push(answer),
                        // The record says that it is being deleted: the next node manager goes on.
                        Some(Command::PowerOff(answer, _)) => {
                            answer.send(()).ok();
                            return;
                        }
                        Some(Command::Changed) | None => {}
                    },
                }
            }
        }
        tracing::info!("{}: deleted", self.slice);
        // Whoever waits is told by the drop of `waiting` and of the commands not yet read.
    }

    async fn remove_all(&mut self) -> Result<(), String> {
        self.kill().await.map_err(|e| e.to_string())?;
        if let Some(group) = self.cgroup() {
            group.remove().map_err(|e| e.to_string())?;
        }
        let paths = self.paths.clone();
        let removed = tokio::task::spawn_blocking(move || files::remove(&paths)).await;
        removed.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        self.manager.forget(&self.slice, self.uid).await.map_err(|e| e.to_string())
    }

    fn expired(&self) -> State {
        tracing::info!("{}: its lease is over", self.slice);
        State::Deleting(Vec::new())
    }

    /// What a command means to a sliver without a machine.
    fn unless_ended(&self, command: Option<Command>) -> Option<State> {
        match command? {
            Command::Changed => None,
            Command::Delete(answer) => Some(State::Deleting(vec![answer])),
            Command::PowerOff(answer, _) => Some(State::Off(answer)),
        }
    }

    /// Ends every process of the sliver and detaches it from the network.
    pub(super) async fn kill(&mut self) -> Result<(), Error> {
        if let Some(group) = self.cgroup() {
            tokio::task::spawn_blocking(move || group.kill(KILL_WAIT)).await??;
        }
        self.detach().await;
        Ok(())
    }

    pub(super) async fn kill_or_complain(&mut self) {
        self.kill().await.unwrap_or_else(|e| tracing::error!("{}: {e}", self.slice));
    }

    async fn detach(&mut self) {
        if std::mem::take(&mut self.attached) {
            self.manager.demux.detach(SliverId(self.uid)).await;
        }
    }

    /// After a renewal: its share may be another.
    fn apply_limits(&self) {
        if let (Some(group), Some((_, grant))) = (self.cgroup(), self.bound()) {
            group.limit(&grant.rspec).unwrap_or_else(|e| tracing::error!("{}: {e}", self.slice));
        }
    }

    pub(super) fn bound(&self) -> Option<(SliverRecord, Grant)> {
        let book = self.manager.book();
        book.bound(&self.slice).map(|(record, grant)| (record.clone(), grant.clone()))
    }

    /// When it may live, as of now: a renewal moves it. `None` when its record is gone.
    fn lease(&self) -> Option<Interval> {
        self.manager.book().bound(&self.slice).map(|(_, grant)| grant.rspec.interval)
    }

    pub(super) fn cgroup(&self) -> Option<Cgroup> {
        self.manager.cgroups.as_ref().map(|groups| groups.of(&self.slice))
    }

    /// Whether the guest was told an address, also by an earlier node manager, that is not the node's any more.
    pub(super) fn has_old_address(&self) -> bool {
        let told = std::fs::read_to_string(self.address_file()).ok();
        let told: Option<Ipv4Addr> = told.and_then(|text| text.parse().ok());
        let now = self.host.borrow().as_ref().map(|h| h.address);
        told.is_some() && now.is_some() && told != now
    }

    /// Beside the disk: it outlasts the node's uptime as a saved sliver does.
    pub(super) fn address_file(&self) -> PathBuf {
        self.paths.state.join("address")
    }

    /// What happened, with the console's last lines: those that the machine told, or those of the file.
    fn with_console(&self, reason: String, told: &str) -> String {
        let tail = if told.is_empty() { console::tail(&self.paths.console()) } else { told.to_owned() };
        if tail.is_empty() { reason } else { format!("{reason}; its console ends with:\n{tail}") }
    }

    pub(super) fn error(&self, message: &str) -> Error {
        Error::Machine { slice: self.slice.to_string(), message: message.to_owned() }
    }
}

async fn until(counts: bool, then: Instant) {
    if counts { tokio::time::sleep_until(then).await } else { pending().await }
}
