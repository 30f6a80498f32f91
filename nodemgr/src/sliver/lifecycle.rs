//! The states of [`super`]'s drawing, each a function that returns the next one.

use std::future::pending;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use commonage_isolation::cgroup::Cgroup;
use commonage_isolation_api::{Interval, SliceName};
use commonage_net_demux_api::control::SliverId;
use commonage_nodemgr_api::Bytes;
use commonage_nodemgr_api::guest::{CONTROL_PORT, FromGuest, FromHost, Identity};
use commonage_nodemgr_api::http::{self, SliverState};
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::guest::{Link, Said};
use super::machine::Machine;
use super::{Command, Paths, console, disk, files, spawn};
use crate::book::{AGENT, Grant, SliverRecord};
use crate::demux::Attachment;
use crate::error::Error;
use crate::host::Host;
use crate::manager::{Manager, sleep_until};
use crate::{agent, api};

/// Waits between starts.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LAST_BACKOFF: Duration = Duration::from_secs(60);
/// A machine that lived so long is started again without more patience.
const LIVED_WELL: Duration = Duration::from_secs(60);
/// How long a guest may take from its machine's start until it is configured.
const BOOT_WAIT: Duration = Duration::from_secs(180);
/// How long a guest may take to shut down.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(15);
/// How long killing may take.
const KILL_WAIT: Duration = Duration::from_secs(20);
/// How often a cleaning up that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// Longest message taken from a guest, characters.
const MAX_MESSAGE: usize = 1000;
/// Bytes of entropy given to a guest.
const ENTROPY: usize = 64;

enum State {
    Pending,
    Preparing,
    Live(Box<Live>),
    Failed(String),
    Deleting(Vec<oneshot::Sender<()>>),
    Off(oneshot::Sender<()>),
}

/// A machine that lives.
struct Live {
    machine: Machine,
    link: Link,
    _api: ApiServer,
    /// Where to speak to the guest's init.
    guest: Option<mpsc::Sender<FromHost>>,
    since: Instant,
    configured: bool,
    /// Asked for its identity while the node had no address.
    nameless: bool,
}

struct ApiServer(AbortHandle);

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Lifecycle {
    manager: Arc<Manager>,
    slice: SliceName,
    uid: u32,
    paths: Paths,
    commands: mpsc::UnboundedReceiver<Command>,
    publish: watch::Sender<SliverState>,
    host: watch::Receiver<Option<Host>>,
    backoff: Duration,
}

/// Lives a sliver's life.
pub async fn run(
    manager: Arc<Manager>,
    slice: SliceName,
    commands: mpsc::UnboundedReceiver<Command>,
    publish: watch::Sender<SliverState>,
) {
    let Some(record) = manager.book().sliver(&slice).cloned() else { return };
    let (paths, host) = (manager.paths(&slice), manager.host.clone());
    let backoff = FIRST_BACKOFF;
    let mut life = Lifecycle { manager, slice, uid: record.uid, paths, commands, publish, host, backoff };
    let mut state = life.first_state(&record).await;
    loop {
        state = match state {
            State::Pending => life.pending().await,
            State::Preparing => life.preparing().await,
            State::Live(live) => life.live(*live).await,
            State::Failed(reason) => life.failed(reason).await,
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
            self.manager.demux.detach(SliverId(self.uid)).await;
            return State::Pending;
        }
        match self.adopt().await {
            Ok(live) => {
                tracing::info!("{}: its machine lives; taken over", self.slice);
                State::Live(Box::new(live))
            }
            Err(e) => {
                tracing::warn!("{}: cannot take over its machine ({e}); starting it anew", self.slice);
                self.kill().await.inspect_err(|e| tracing::error!("{}: {e}", self.slice)).ok();
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
            let pending = matches!(s, SliverState::Pending);
            if pending {
                *s = SliverState::Starting;
            }
            pending
        });
        match self.start().await {
            Ok(live) => State::Live(Box::new(live)),
            Err(e) => {
                self.kill().await.inspect_err(|e| tracing::error!("{}: {e}", self.slice)).ok();
                State::Failed(self.with_console(format!("it could not be started: {e}")))
            }
        }
    }

    async fn live(&mut self, mut live: Live) -> State {
        if !matches!(*self.publish.borrow(), SliverState::Running { .. }) {
            self.publish.send_replace(SliverState::Starting);
        }
        while let Some(Interval { end, .. }) = self.lease() {
            let boot_over = async {
                if live.configured {
                    pending().await
                } else {
                    tokio::time::sleep_until(live.since + BOOT_WAIT).await
                }
            };
            tokio::select! {
                reason = live.machine.ended() => return self.ended(live, reason).await,
                said = live.link.said.recv() => {
                    if let Some(said) = said && let Err(reason) = self.hear(&mut live, said).await {
                        return self.ended(live, reason).await;
                    }
                }
                () = boot_over => {
                    let reason = format!("its guest was not configured within {} s", BOOT_WAIT.as_secs());
                    return self.ended(live, reason).await;
                }
                changed = self.host.changed() => {
                    // Without a sender no address ever comes: the node manager is ending.
                    if changed.is_err() {
                        pending::<()>().await;
                    }
                    if live.nameless {
                        self.introduce(&mut live).await;
                    } else if self.guest_address().is_some_and(|a| Some(a) != self.address()) {
                        self.shut_down(&mut live).await;
                        return self.ended(live, "the node's address changed".to_owned()).await;
                    }
                }
                () = sleep_until(end) => return self.expired(),
                command = self.commands.recv() => match command {
                    Some(Command::Changed) => self.apply_limits(),
                    Some(Command::Delete(answer)) => return State::Deleting(vec![answer]),
                    Some(Command::PowerOff(answer)) => {
                        self.shut_down(&mut live).await;
                        self.kill().await.inspect_err(|e| tracing::error!("{}: {e}", self.slice)).ok();
                        return State::Off(answer);
                    }
                    None => pending().await,
                },
            }
        }
        State::Deleting(Vec::new())
    }

    /// The machine ended, or has to.
    async fn ended(&mut self, live: Live, reason: String) -> State {
        if live.since.elapsed() >= LIVED_WELL {
            self.backoff = FIRST_BACKOFF;
        }
        drop(live);
        if let Err(e) = self.kill().await {
            tracing::error!("{}: {e}", self.slice);
        }
        State::Failed(self.with_console(reason))
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

    /// Removes everything, again and again until nothing is left.
    async fn delete(mut self, mut waiting: Vec<oneshot::Sender<()>>) {
        let slice = self.slice.clone();
        if let Err(e) = self.manager.change(move |book| Ok((book.condemn(&slice), ()))).await {
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
                        Some(Command::PowerOff(answer)) => {
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
            Command::PowerOff(answer) => Some(State::Off(answer)),
        }
    }

    async fn start(&mut self) -> Result<Live, Error> {
        let _turn = self.manager.starts.acquire().await;
        let Some((record, grant)) = self.bound() else { return Err(self.error("its record is gone")) };
        let admitted = self.manager.book().admitted(&grant, Timestamp::now());
        let admitted = admitted.map_err(|e| self.error(&format!("this node has become too small: {e}")))?;
        // Nothing may live in the directory that is made anew.
        self.kill().await?;
        let (paths, uid) = (self.paths.clone(), self.uid);
        tokio::task::spawn_blocking(move || files::make_dir(&paths, uid)).await??;
        std::fs::remove_file(self.address_file()).ok();
        let (link, api) = self.listen()?;
        disk::prepare(&self.paths, admitted.rspec().disk_mib, self.uid, &self.manager.settings.mke2fs)
            .await?;
        let settings = &self.manager.settings;
        files::write_machine(settings, &self.paths, self.uid, &record.config.base, admitted.rspec())?;
        let procs = match self.cgroup() {
            Some(group) => {
                group.create(admitted.rspec())?;
                Some(group.procs()?)
            }
            None => None,
        };
        let (log_path, failed) = (self.paths.vmm_log(), |e: std::io::Error| e.to_string());
        let log = std::fs::File::create(&log_path).map_err(Error::io("make", &log_path))?;
        let child = spawn::spawn(&settings.vmm, &self.paths.machine(), procs, log);
        let child = child.map_err(Error::io("run", &settings.vmm))?;
        let machine = Machine::await_spawned(&self.paths.control(), child).await;
        let machine = machine.map_err(|e| self.error(&self.with_log(failed(e))))?;
        tracing::info!("{}: machine up, ports {}-{}", self.slice, grant.ports.first, grant.ports.last);
        self.attach(&machine, &grant).await?;
        Ok(Live::new(machine, link, api))
    }

    async fn adopt(&mut self) -> Result<Live, Error> {
        let Some((_, grant)) = self.bound() else { return Err(self.error("its record is gone")) };
        let machine = Machine::adopt(&self.paths.control()).await.map_err(|e| self.error(&e.to_string()))?;
        let (link, api) = self.listen()?;
        self.attach(&machine, &grant).await?;
        Ok(Live::new(machine, link, api))
    }

    fn listen(&self) -> Result<(Link, ApiServer), Error> {
        let link = Link::start(files::listen(&self.paths.host_port(CONTROL_PORT), self.uid)?);
        let listener = files::listen(&self.paths.host_port(http::PORT), self.uid)?;
        let api = tokio::spawn(api::serve(listener, Arc::clone(&self.manager), self.slice.clone()));
        Ok((link, ApiServer(api.abort_handle())))
    }

    async fn attach(&self, machine: &Machine, grant: &Grant) -> Result<(), Error> {
        let ring = machine.ring().await.map_err(|e| self.error(&format!("no network ring: {e}")))?;
        let attachment = Attachment {
            sliver: SliverId(self.uid),
            slice: self.slice.to_string(),
            mac: files::mac(self.uid),
            ports: grant.ports.clone(),
            ring,
        };
        let refused = |e| self.error(&format!("net-demux refused it: {e}"));
        self.manager.demux.attach(attachment).await.map_err(refused)
    }

    /// Takes in what the guest's init says. An error is why the machine has to end.
    async fn hear(&mut self, live: &mut Live, Said { message, answer }: Said) -> Result<(), String> {
        live.guest = Some(answer);
        match message {
            FromGuest::Hello { configured: false, .. } => {
                (live.configured, live.nameless) = (false, true);
                self.introduce(live).await;
            }
            FromGuest::Hello { configured: true, boot_script_exit } => {
                live.configured = true;
                self.speak(live, FromHost::Welcome).await;
                if let Some(boot_script_exit) = boot_script_exit {
                    self.publish.send_replace(SliverState::Running { boot_script_exit });
                }
            }
            // Told once for each change: a guest may say it as often as it likes.
            FromGuest::Configured => {
                if !std::mem::replace(&mut live.configured, true) {
                    tracing::info!(
                        "{}: configured after {} ms",
                        self.slice,
                        live.since.elapsed().as_millis()
                    );
                }
            }
            FromGuest::BootScriptDone { exit } => {
                let state = SliverState::Running { boot_script_exit: exit };
                if self.publish.send_replace(state.clone()) != state {
                    tracing::info!("{}: boot script ended with status {exit}", self.slice);
                }
            }
            FromGuest::Failed { message } => {
                let message: String = message.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE).collect();
                return Err(format!("its init failed: {message}"));
            }
        }
        Ok(())
    }

    /// Tells the guest who it is, if the node knows its own address.
    async fn introduce(&mut self, live: &mut Live) {
        let host = self.host.borrow_and_update().clone();
        let (Some(host), Some((record, grant))) = (host, self.bound()) else {
            return tracing::warn!("{}: waits until the node has an address", self.slice);
        };
        let mut entropy = vec![0; ENTROPY];
        if let Err(e) = getrandom::fill(&mut entropy) {
            return tracing::error!("{}: no random numbers for it: {e}", self.slice);
        }
        let agent = self.slice.as_str() == AGENT;
        let identity = Identity {
            slice: self.slice.clone(),
            node: self.manager.settings.node.clone(),
            address: host.address,
            dns: host.dns,
            ports: grant.ports,
            ssh_keys: record.config.ssh_keys,
            boot_script: record.config.boot_script,
            files: if agent { agent::files(&self.manager.settings) } else { record.config.files },
            now: Timestamp::now(),
            entropy: Bytes(entropy),
        };
        live.nameless = false;
        std::fs::write(self.address_file(), host.address.to_string())
            .unwrap_or_else(|e| tracing::warn!("{}: {e}", self.address_file().display()));
        self.speak(live, FromHost::Identity(Box::new(identity))).await;
    }

    async fn speak(&self, live: &Live, message: FromHost) {
        if let Some(guest) = &live.guest {
            // Full: the guest does not listen. It will connect anew or be timed out.
            guest.try_send(message).ok();
        }
    }

    /// Asks the guest to shut down; ends the machine if it does not.
    async fn shut_down(&mut self, live: &mut Live) {
        if live.configured && live.guest.is_some() {
            self.speak(live, FromHost::Shutdown).await;
            if tokio::time::timeout(SHUTDOWN_WAIT, live.machine.ended()).await.is_ok() {
                return;
            }
            tracing::warn!("{}: did not shut down within {} s", self.slice, SHUTDOWN_WAIT.as_secs());
        }
        live.machine.stop().await;
    }

    /// Ends every process of the sliver and detaches it from the network.
    async fn kill(&self) -> Result<(), Error> {
        if let Some(group) = self.cgroup() {
            tokio::task::spawn_blocking(move || group.kill(KILL_WAIT)).await??;
        }
        self.manager.demux.detach(SliverId(self.uid)).await;
        Ok(())
    }

    /// After a renewal: its share may be another.
    fn apply_limits(&self) {
        if let (Some(group), Some((_, grant))) = (self.cgroup(), self.bound()) {
            group.limit(&grant.rspec).unwrap_or_else(|e| tracing::error!("{}: {e}", self.slice));
        }
    }

    fn bound(&self) -> Option<(SliverRecord, Grant)> {
        let book = self.manager.book();
        book.bound(&self.slice).map(|(record, grant)| (record.clone(), grant.clone()))
    }

    /// When it may live, as of now: a renewal moves it. `None` when its record is gone.
    fn lease(&self) -> Option<Interval> {
        self.manager.book().bound(&self.slice).map(|(_, grant)| grant.rspec.interval)
    }

    fn cgroup(&self) -> Option<Cgroup> {
        self.manager.cgroups.as_ref().map(|groups| groups.of(&self.slice))
    }

    fn address(&self) -> Option<Ipv4Addr> {
        self.host.borrow().as_ref().map(|h| h.address)
    }

    /// The address the guest was told, also by an earlier node manager.
    fn guest_address(&self) -> Option<Ipv4Addr> {
        std::fs::read_to_string(self.address_file()).ok()?.parse().ok()
    }

    /// Beside the disk, where the sliver's user cannot write.
    fn address_file(&self) -> PathBuf {
        self.paths.state.join("address")
    }

    fn with_console(&self, reason: String) -> String {
        let tail = console::tail(&self.paths.console());
        if tail.is_empty() { reason } else { format!("{reason}; its console ends with:\n{tail}") }
    }

    fn with_log(&self, reason: String) -> String {
        let tail = console::tail(&self.paths.vmm_log());
        if tail.is_empty() { reason } else { format!("{reason}: {tail}") }
    }

    fn error(&self, message: &str) -> Error {
        Error::Machine { slice: self.slice.to_string(), message: message.to_owned() }
    }
}

impl Live {
    fn new(machine: Machine, link: Link, api: ApiServer) -> Self {
        let since = Instant::now();
        Self { machine, link, _api: api, guest: None, since, configured: false, nameless: false }
    }
}
