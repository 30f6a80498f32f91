//! The node manager as a whole: one value that every call, sliver and timer shares.
//!
//! Writes go one after the other: decide on the book, commit to the database, then change the book, then act. Each runs in a
//! task of its own, so a caller that hangs up never leaves the book behind the disk. Reads look at the book only and never wait for the disk.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use commonage_isolation::cgroup::Cgroups;
use commonage_isolation::{Capacity, Free};
use commonage_isolation_api::{NodeId, Rcap, SliceName};
use commonage_net_demux_api::control::SliverId;
use commonage_nodemgr_api::error::{ApiError, Code};
use commonage_nodemgr_api::http::{
    self, Acquire, Acquired, Bind, Metrics, Network, Node, Renew, Sliver, SliverConfig, SliverState,
};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;

use crate::book::{Book, Decision};
use crate::db::Db;
use crate::demux::Demux;
use crate::directory::{Directory, Login};
use crate::error::Error;
use crate::host::Host;
use crate::sliver::{self, Blanks, Machine, Paths};
use crate::template::Templates;
use crate::{agent, config};

/// How long a caller waits for a deletion, which goes on if it takes longer.
const DELETE_WAIT: Duration = Duration::from_secs(60);
/// How long a planned end of the node may take: a little less than node-init's patience.
const POWER_OFF: Duration = Duration::from_secs(55);
/// Longest sleep of a timer: the wall clock may be set meanwhile.
const TIMER_MAX: Duration = Duration::from_secs(60);
/// Machines that are started at the same time, however few processors the node has.
const STARTS_AT_ONCE: usize = 2;

/// What does not change while the node manager runs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Who the node is.
    pub node: NodeId,
    /// The state partition.
    pub state: PathBuf,
    /// The image partition.
    pub images: PathBuf,
    /// Sockets and what else ends with the node's uptime.
    pub run: PathBuf,
    /// The sliver kernel and initrd.
    pub lib: PathBuf,
    /// The node's own configuration, laid in the agent.
    pub node_config: PathBuf,
    /// The machine program.
    pub vmm: PathBuf,
    /// mke2fs.
    pub mke2fs: PathBuf,
    /// The SSH front door's host key, an OpenSSH public key.
    pub ssh_host_key: String,
    /// Whether slivers are clones of templates; each boots otherwise.
    pub templates: bool,
    /// Whether a clone copies at once the pages that the first clone of its template wrote until it was ready.
    pub prefault: bool,
}

#[cfg(test)]
impl Settings {
    /// Of a node that has all its files in `dir`, and no programs.
    pub fn for_tests(dir: &std::path::Path) -> Self {
        Self {
            node: "3f0e4a52-0000-4000-8000-000000000001".parse().unwrap(),
            state: dir.into(),
            images: dir.into(),
            run: dir.into(),
            lib: dir.join("lib"),
            node_config: dir.join("node.json"),
            vmm: dir.join("no-such-program"),
            mke2fs: dir.join("no-such-program"),
            ssh_host_key: "ssh-ed25519 AAAA".into(),
            templates: true,
            prefault: true,
        }
    }
}

/// The node manager.
#[derive(Debug)]
pub struct Manager {
    /// What does not change.
    pub settings: Settings,
    /// The node's address.
    pub host: watch::Receiver<Option<Host>>,
    /// net-demux.
    pub demux: Demux,
    /// Control groups; none in tests that start no machine.
    pub cgroups: Option<Cgroups>,
    /// What slivers are clones of.
    pub templates: Templates,
    /// What slivers' disks are copies of.
    pub blanks: Blanks,
    /// Taken from a machine's start until its guest knows who it is.
    pub starts: Arc<Semaphore>,
    /// Taken while a sliver is saved.
    pub saves: tokio::sync::Mutex<()>,
    book: Mutex<Book>,
    slivers: Mutex<HashMap<SliceName, sliver::Handle>>,
    db: Arc<Db>,
    writer: tokio::sync::Mutex<()>,
    rights_changed: Notify,
}

impl Manager {
    /// Reads the database. Nothing runs yet: see [`Manager::start`].
    ///
    /// # Errors
    /// The database cannot be read.
    pub fn open(
        settings: Settings,
        capacity: Capacity,
        cgroups: Option<Cgroups>,
        host: watch::Receiver<Option<Host>>,
    ) -> Result<Arc<Self>, Error> {
        let db = Db::open(&settings.state.join("nodemgr.redb"))?;
        let mut book = Book::new(capacity);
        book.apply(db.load()?);
        let living = book.slivers().map(|s| SliverId(s.uid)).collect();
        let demux = Demux::start(settings.run.join("net-demux.sock"), host.clone(), living);
        let templates = Templates::open(&settings.run, settings.prefault);
        let blanks = Blanks::new(settings.run.join("scratch"), settings.mke2fs.clone());
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Arc::new(Self {
            settings,
            host,
            demux,
            cgroups,
            templates,
            blanks,
            starts: Arc::new(Semaphore::new(STARTS_AT_ONCE.max(processors))),
            saves: tokio::sync::Mutex::default(),
            book: Mutex::new(book),
            slivers: Mutex::default(),
            db: Arc::new(db),
            writer: tokio::sync::Mutex::new(()),
            rights_changed: Notify::new(),
        }))
    }

    /// Makes sure of the agent, takes over every machine that lives, starts those that should live, and begins the timers.
    pub async fn start(self: &Arc<Self>) {
        // A node without its agent is out of PLC's reach, but its slivers still run.
        self.keep_agent()
            .await
            .unwrap_or_else(|e| tracing::error!("no agent, so PLC cannot reach this node: {e}"));
        sliver::sweep(self).await;
        let slices: Vec<SliceName> = self.book().slivers().map(|s| s.slice.clone()).collect();
        for slice in slices {
            self.spawn(slice, false);
        }
        tokio::spawn(Self::lapse(Arc::downgrade(self)));
    }

    /// Makes sure that the agent's sliver is in the book, as this version wants it.
    ///
    /// # Errors
    /// It does not fit, or the disk failed.
    pub async fn keep_agent(self: &Arc<Self>) -> Result<(), ApiError> {
        let (rspec, config) = agent::sliver();
        let rcap = Rcap::random().map_err(Error::from)?;
        self.change(move |book| book.keep_agent(rspec, config, rcap, Timestamp::now())).await
    }

    /// The book, to look at. Not to be held across an await.
    pub fn book(&self) -> MutexGuard<'_, Book> {
        lock(&self.book)
    }

    /// Decides, commits, applies.
    ///
    /// # Errors
    /// The decision's, or the disk failed.
    pub async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        decide: impl FnOnce(&Book) -> Decision<T> + Send + 'static,
    ) -> Result<T, ApiError> {
        let this = Arc::clone(self);
        // A task of its own: it ends even if the caller hangs up between commit and apply.
        let task = tokio::spawn(async move {
            let _turn = this.writer.lock().await;
            let (changes, answer) = decide(&this.book())?;
            if !changes.is_empty() {
                let db = Arc::clone(&this.db);
                let commit = move || db.commit(&changes).map(|()| changes);
                let changes = tokio::task::spawn_blocking(commit).await.map_err(Error::from)??;
                this.book().apply(changes);
                this.rights_changed.notify_one();
            }
            Ok(answer)
        });
        task.await.map_err(|e| ApiError::from(Error::from(e)))?
    }

    /// `POST /v1/acquire`.
    ///
    /// # Errors
    /// See [`Book::acquire`].
    pub async fn acquire(self: &Arc<Self>, caller: &SliceName, ask: Acquire) -> Result<Acquired, ApiError> {
        let caller = caller.clone();
        let rcap = Rcap::random().map_err(Error::from)?;
        self.change(move |book| book.acquire(&caller, ask.rspec, rcap, Timestamp::now())).await
    }

    /// `POST /v1/bind`.
    ///
    /// # Errors
    /// See [`Book::bind`]; also a configuration that cannot work.
    pub async fn bind(self: &Arc<Self>, caller: &SliceName, ask: Bind) -> Result<Sliver, ApiError> {
        config::check(&ask.config, &self.bases())?;
        let (this, caller) = (Arc::clone(self), caller.clone());
        let task = async move {
            let decide =
                move |book: &Book| book.bind(&caller, ask.slice, &ask.rcap, ask.config, Timestamp::now());
            let record = this.change(decide).await?;
            tracing::info!("{}: bound by {} as uid {}", record.slice, record.bound_by, record.uid);
            this.spawn(record.slice.clone(), true);
            this.view(&record.slice)
        };
        tokio::spawn(task).await.map_err(|e| ApiError::from(Error::from(e)))?
    }

    /// `POST /v1/release`.
    ///
    /// # Errors
    /// See [`Book::release`].
    pub async fn release(self: &Arc<Self>, rcap: Rcap) -> Result<(), ApiError> {
        self.change(move |book| book.release(&rcap)).await
    }

    /// `POST /v1/renew`.
    ///
    /// # Errors
    /// See [`Book::renew`].
    pub async fn renew(self: &Arc<Self>, caller: &SliceName, ask: Renew) -> Result<Acquired, ApiError> {
        let caller = caller.clone();
        let decide = move |book: &Book| book.renew(&caller, &ask.rcap, ask.end, ask.share, Timestamp::now());
        let acquired = self.change(decide).await?;
        if let Some(slice) = &acquired.bound_to {
            self.tell(slice, sliver::Command::Changed);
        }
        Ok(acquired)
    }

    /// `PUT /v1/slivers/{slice}/config`. Keys count at the front door at once, the rest when the sliver starts next.
    ///
    /// # Errors
    /// See [`Book::configure`]; also a configuration that cannot work.
    pub async fn configure(
        self: &Arc<Self>,
        caller: &SliceName,
        slice: SliceName,
        config: SliverConfig,
    ) -> Result<Sliver, ApiError> {
        config::check(&config, &self.bases())?;
        let caller = caller.clone();
        let record = self.change(move |book| book.configure(&caller, &slice, config)).await?;
        self.tell(&record.slice, sliver::Command::Changed);
        self.view(&record.slice)
    }

    /// `DELETE /v1/slivers/{slice}`: answers when nothing is left of it.
    ///
    /// # Errors
    /// See [`Book::delete`]; or it takes long.
    pub async fn delete(self: &Arc<Self>, caller: &SliceName, slice: SliceName) -> Result<(), ApiError> {
        let (caller, name) = (caller.clone(), slice.clone());
        let uid = self.change(move |book| book.delete(&caller, &name)).await?;
        let Some(gone) = self.tell_to_delete(&slice, uid) else { return Ok(()) };
        match tokio::time::timeout(DELETE_WAIT, gone).await {
            // The sender is dropped with the sliver's task, which ends when nothing is left.
            Ok(_) => Ok(()),
            Err(_) => Err(ApiError::new(
                Code::Unavailable,
                format!("the deletion of {slice} goes on but takes long"),
            )
            .hint("GET /v1/slivers no longer lists it when it is done")),
        }
    }

    /// What a caller may see of all slivers: those it bound, and itself.
    pub fn visible(&self, caller: &SliceName) -> Vec<Sliver> {
        let mine = |s: &&crate::book::SliverRecord| s.bound_by == *caller || s.slice == *caller;
        let slices: Vec<SliceName> = self.book().slivers().filter(mine).map(|s| s.slice.clone()).collect();
        slices.iter().filter_map(|s| self.view(s).ok()).collect()
    }

    /// A sliver as callers see it.
    ///
    /// # Errors
    /// There is none.
    pub fn view(&self, slice: &SliceName) -> Result<Sliver, ApiError> {
        let status = self.status(slice);
        let book = self.book();
        let (record, grant) = book.bound(slice).ok_or_else(|| {
            ApiError::new(Code::NotFound, format!("slice {slice} has no sliver on this node"))
        })?;
        let mut config = record.config.clone();
        config.files.iter_mut().for_each(|f| f.contents.0.clear());
        Ok(Sliver {
            slice: slice.clone(),
            status,
            rcap: record.rcap.clone(),
            rspec: grant.rspec.clone(),
            ports: grant.ports.clone(),
            config,
        })
    }

    /// `GET /v1/node`.
    pub fn node(&self, caller: &SliceName) -> Node {
        let now = Timestamp::now();
        let (capacity, free) = {
            let book = self.book();
            let Capacity { memory_mib, disk_mib, link_bps, pids, ports } = book.capacity;
            let all = Free { memory_mib, disk_mib, link_bps, pids, ports: ports.len() };
            (amounts(all), amounts(book.free_now(now)))
        };
        Node {
            node: self.settings.node.clone(),
            address: self.host.borrow().as_ref().map_or(Ipv4Addr::UNSPECIFIED, |h| h.address),
            caller: caller.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ssh_host_key: self.settings.ssh_host_key.clone(),
            bases: self.bases(),
            capacity,
            free,
            now,
        }
    }

    /// What net-demux counted of the caller's traffic.
    ///
    /// # Errors
    /// net-demux is away, or the caller's machine is not attached.
    pub async fn network(&self, caller: &SliceName) -> Result<Network, ApiError> {
        let uid = self.book().sliver(caller).map(|s| s.uid);
        let status = match uid {
            Some(uid) => self.demux.status(SliverId(uid)).await,
            None => None,
        };
        let away = || {
            ApiError::new(Code::Unavailable, "net-demux does not answer for this sliver now")
                .hint("it may be restarting: ask again")
        };
        let s = status.ok_or_else(away)?;
        let (tx_frames, tx_bytes, rx_frames, rx_bytes) = (s.tx_frames, s.tx_bytes, s.rx_frames, s.rx_bytes);
        Ok(Network { tx_frames, tx_bytes, rx_frames, rx_bytes, drops: s.drops })
    }

    /// What the machine of a sliver that `caller` bound, or is, has done and takes.
    ///
    /// # Errors
    /// It did not, or no machine answers.
    pub async fn metrics(&self, caller: &SliceName, slice: &SliceName) -> Result<Metrics, ApiError> {
        if caller != slice {
            self.book().bound_by(caller, slice)?;
        }
        Machine::metrics(&self.paths(slice).control()).await.map_err(|e| {
            ApiError::new(Code::Unavailable, format!("the machine of {slice} does not answer: {e}"))
                .hint("GET /v1/slivers says how far the sliver is; try again")
        })
    }

    /// Bases the node has: `base-NAME.erofs` on the image partition.
    pub fn bases(&self) -> Vec<String> {
        let names = std::fs::read_dir(&self.settings.images).into_iter().flatten().flatten();
        let base = |name: String| Some(name.strip_prefix("base-")?.strip_suffix(".erofs")?.to_owned());
        let mut bases: Vec<String> = names.filter_map(|e| base(e.file_name().into_string().ok()?)).collect();
        bases.sort_unstable();
        bases
    }

    /// Where a sliver's files are.
    pub fn paths(&self, slice: &SliceName) -> Paths {
        Paths::new(&self.settings.run, &self.settings.state, slice)
    }

    /// How far a sliver is.
    pub fn status(&self, slice: &SliceName) -> SliverState {
        lock(&self.slivers).get(slice).map_or(SliverState::Pending, |h| h.status.borrow().clone())
    }

    /// Follows how far a sliver is; the sender is dropped when it is gone.
    pub fn follow(&self, slice: &SliceName) -> Option<watch::Receiver<SliverState>> {
        lock(&self.slivers).get(slice).map(|h| h.status.clone())
    }

    /// Saves every sliver, or shuts it down where that cannot be, and waits until all are gone. Their records stay: they go on with the node.
    pub async fn power_off(&self) {
        let deadline = Instant::now() + POWER_OFF;
        let handles: Vec<_> = lock(&self.slivers).drain().map(|(_, handle)| handle).collect();
        let mut ends = tokio::task::JoinSet::new();
        for handle in handles {
            ends.spawn(handle.power_off(deadline));
        }
        ends.join_all().await;
    }

    /// Called by a sliver's task as its last act.
    pub(crate) async fn forget(self: &Arc<Self>, slice: &SliceName, uid: u32) -> Result<(), ApiError> {
        let name = slice.clone();
        self.change(move |book| Ok((book.forget(&name, uid), ()))).await?;
        // The slice may be bound again already: that sliver has another uid.
        let mut slivers = lock(&self.slivers);
        if slivers.get(slice).is_some_and(|handle| handle.uid == uid) {
            slivers.remove(slice);
        }
        Ok(())
    }

    fn spawn(self: &Arc<Self>, slice: SliceName, new: bool) {
        let Some(uid) = self.book().sliver(&slice).map(|s| s.uid) else { return };
        let handle = sliver::spawn(Arc::clone(self), slice.clone(), uid, new);
        lock(&self.slivers).insert(slice, handle);
    }

    fn tell(&self, slice: &SliceName, command: sliver::Command) {
        if let Some(handle) = lock(&self.slivers).get(slice) {
            handle.tell(command);
        }
    }

    /// The one that was decided about: a later sliver of the same slice has another uid.
    fn tell_to_delete(&self, slice: &SliceName, uid: u32) -> Option<tokio::sync::oneshot::Receiver<()>> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        lock(&self.slivers)
            .get(slice)
            .filter(|handle| handle.uid == uid)?
            .tell(sliver::Command::Delete(sender));
        Some(receiver)
    }

    /// Forgets unbound rights when their interval is over. Bound ones are their sliver's task's business.
    async fn lapse(weak: std::sync::Weak<Self>) {
        loop {
            let Some(this) = weak.upgrade() else { return };
            let forgotten = this.change(|book| {
                let (changes, next) = book.lapsed(Timestamp::now());
                Ok((changes, next))
            });
            this.templates.tidy(&this);
            let next = forgotten.await.inspect_err(|e| tracing::error!("{e}")).ok().flatten();
            let left = next.map_or(TIMER_MAX, |t| until(t).min(TIMER_MAX));
            tokio::select! {
                () = tokio::time::sleep(left) => {}
                () = this.rights_changed.notified() => {}
            }
        }
    }
}

impl Directory for Manager {
    fn login(&self, slice: &str) -> Option<Login> {
        let slice: SliceName = slice.parse().ok()?;
        let ssh_keys = self.book().sliver(&slice).filter(|s| !s.deleting)?.config.ssh_keys.clone();
        Some(Login { ssh_keys, vsock: self.paths(&slice).vsock(), state: self.status(&slice) })
    }
}

/// How long until `t`; nothing if it is over.
pub(crate) fn until(t: Timestamp) -> Duration {
    let left: SignedDuration = t.duration_since(Timestamp::now());
    Duration::try_from(left).unwrap_or_default()
}

/// Sleeps until `t` by the wall clock, which may be set meanwhile.
pub(crate) async fn sleep_until(t: Timestamp) {
    while t > Timestamp::now() {
        tokio::time::sleep(until(t).min(TIMER_MAX)).await;
    }
}

fn amounts(free: Free) -> http::Capacity {
    let Free { memory_mib, disk_mib, link_bps, pids, ports } = free;
    http::Capacity { memory_mib, disk_mib, link_bps, ports, pids }
}

/// What a panicking thread left is as valid as before: every change to the book is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
