//! The control socket: who may open it (root) asks how the machine is, for the network ring, for its end, or to be told of its end.
//!
//! What only the machine can do comes out of [`Control::next`] as a [`Command`], one at a time and in each client's order; the machine
//! carries it out and answers by [`Control::answer`] before it takes the next. The server itself hands out the ring, hands the guest's
//! connections to the client that accepts them, attaches clients to the console, and asks the guest to leave before it is ended.
//!
//! Clients are few and trusted not to be hostile, but may be slow or dead: nothing here blocks, input and descriptors are bounded, and a
//! client that does not read its answers is dropped. Descriptors that no request wanted are closed. While nobody asks anything, there is
//! neither a timer nor a buffer.
#![forbid(unsafe_code)]

pub mod channel;

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use commonage_net_demux_api::ring::RingFds;
use commonage_vmm_api::{ExitReason, POWER_PORT, Request, Response};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use self::channel::{MAX_DESCRIPTORS, Patience};
use crate::devices::bus::Bus;
use crate::reactor::{Poller, Readiness};
use crate::virtio::vsock::{Vsock, socket};

/// Longest request line, bytes.
const MAX_LINE: usize = 4096;
/// Most clients at a time.
const MAX_CLIENTS: usize = 64;
/// Most of the console's last words that the end is told with, bytes.
const LAST_WORDS: usize = 4096;

const LISTENER: u32 = 0;
const GRACE: u32 = 1;
const POWER: u32 = 2;
const FIRST_CLIENT: u32 = 3;

/// What a client's connection has become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Lines come in.
    Requests,
    /// It gets the guest's connections; nothing comes in.
    Accepting,
    /// What comes in is typed.
    Console,
}

struct Client {
    /// Shared with the console and the vsock device, which know it weakly: when the client goes, it goes everywhere.
    stream: Arc<UnixStream>,
    input: Vec<u8>,
    /// Came beside the lines in `input`.
    descriptors: VecDeque<OwnedFd>,
    mode: Mode,
    /// Asked to be told of the end.
    waiting: bool,
}

/// Who is to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientId(u32);

/// What a client asks of the machine itself.
#[derive(Debug)]
pub enum Command {
    /// Tell how the machine is.
    Status,
    /// Tell what it has done.
    Metrics,
    /// Stop all processors.
    Pause,
    /// Let them go on.
    Resume,
    /// Write the whole paused machine.
    Snapshot {
        /// Where processors and devices go.
        state: File,
        /// Where guest memory goes.
        memory: File,
    },
    /// Write which pages the machine has to itself.
    Touched {
        /// Where to.
        file: File,
    },
    /// Ask the guest to leave itself this much memory.
    Balloon {
        /// MiB.
        memory_mib: u32,
    },
    /// End the machine: at once without a grace, or if [`Control::ask_guest`] cannot ask. Answered already.
    Stop {
        /// How long the guest has.
        grace: Duration,
    },
}

/// A client that is to be forgotten.
struct Gone;

/// The guest was asked to leave.
struct Leaving {
    until: Instant,
    timer: OwnedFd,
    /// The connection that asks, and whether the guest has accepted it.
    power: OwnedFd,
    accepted: bool,
}

/// The server.
pub struct Control {
    listener: UnixListener,
    poller: Poller,
    bus: Arc<Bus>,
    ring: Option<RingFds>,
    clients: BTreeMap<u32, Client>,
    next_token: u32,
    /// Clients whose input may hold whole lines.
    ready: VecDeque<u32>,
    /// The client that gets the guest's connections.
    accepting: Option<u32>,
    leaving: Option<Leaving>,
    /// The guest's time is over, or it does not listen.
    force: bool,
}

/// Listens at `path` for its owner alone, replacing a socket left there by an earlier machine.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

impl Control {
    /// Serves who connects to `listener`, which must not block. `ring` is what [`Request::Ring`] hands out.
    pub fn new(
        listener: UnixListener,
        ring: Option<RingFds>,
        bus: Arc<Bus>,
        poller: Poller,
    ) -> io::Result<Self> {
        poller.add(&listener, LISTENER, Readiness::READ)?;
        Ok(Self {
            listener,
            poller,
            bus,
            ring,
            clients: BTreeMap::new(),
            next_token: FIRST_CLIENT,
            ready: VecDeque::new(),
            accepting: None,
            leaving: None,
            force: false,
        })
    }

    /// Serves the descriptor registered under `token`. Afterwards [`Control::next`] tells what there is to do.
    pub fn event(&mut self, token: u32) {
        match token {
            LISTENER => self.accept(),
            GRACE => {
                self.force |= self.leaving.as_ref().is_some_and(|leaving| leaving.until <= Instant::now())
            }
            POWER => self.power_event(),
            client => {
                if let Err(Gone) = self.read(client) {
                    self.clients.remove(&client); // closing the stream also removes it from the event loop
                }
            }
        }
    }

    /// The next thing that a client wants of the machine.
    #[expect(clippy::should_implement_trait, reason = "events make more of them")]
    pub fn next(&mut self) -> Option<(ClientId, Command)> {
        if std::mem::take(&mut self.force) {
            return Some((ClientId(LISTENER), Command::Stop { grace: Duration::ZERO }));
        }
        while let Some(token) = self.ready.front().copied() {
            match self.next_of(token) {
                Ok(Some(command)) => return Some((ClientId(token), command)),
                Ok(None) => {
                    self.ready.pop_front();
                }
                Err(Gone) => {
                    self.clients.remove(&token);
                    self.ready.pop_front();
                }
            }
        }
        None
    }

    /// Answers a client that may be gone by now.
    pub fn answer(&mut self, ClientId(token): ClientId, response: &Response) {
        let failed =
            self.clients.get(&token).is_some_and(|client| answer(&client.stream, response, &[]).is_err());
        if failed {
            self.clients.remove(&token);
        }
    }

    /// Asks the guest to shut down. False if it cannot be asked: it has no vsock, or its driver is not up. Otherwise
    /// [`Command::Stop`] comes again, without a grace, when `grace` is over or when nobody in the guest listens.
    pub fn ask_guest(&mut self, grace: Duration) -> bool {
        let until = Instant::now() + grace;
        if let Some(leaving) = &mut self.leaving {
            // Asked already: the earlier end counts.
            if until < leaving.until {
                leaving.until = until;
                return set_timer(&leaving.timer, grace).is_ok();
            }
            return true;
        }
        match self.ask(until, grace) {
            Ok(leaving) => self.leaving = Some(leaving),
            Err(_) => return false,
        }
        true
    }

    fn ask(&self, until: Instant, grace: Duration) -> io::Result<Leaving> {
        let (guests, power) = socket::pair()?;
        rustix::io::ioctl_fionbio(&power, true)?;
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        set_timer(&timer, grace)?;
        self.bus
            .with_device(|vsock: &mut Vsock| vsock.connect(guests, POWER_PORT))
            .ok_or(io::ErrorKind::NotConnected)??;
        self.poller.add(&timer, GRACE, Readiness::READ)?;
        self.poller.add(&power, POWER, Readiness::READ)?;
        Ok(Leaving { until, timer, power, accepted: false })
    }

    /// The guest has accepted the connection that asks it to leave, or refused it, or ended it.
    fn power_event(&mut self) {
        let Some(leaving) = &mut self.leaving else { return };
        match socket::read(&leaving.power, &mut [0; 64]) {
            socket::Read::Bytes(_) => leaving.accepted = true,
            socket::Read::Later => {}
            socket::Read::End | socket::Read::Broken => {
                self.force |= !leaving.accepted;
                // It fails only if it was removed before.
                let _ = self.poller.remove(&leaving.power);
            }
        }
    }

    /// Tells every waiting client why the machine ended, and what its console said last.
    pub fn finish(&mut self, reason: &ExitReason) {
        let console = self.bus.console().last_words(LAST_WORDS);
        let response = Response::Exited { reason: reason.clone(), console };
        for client in self.clients.values().filter(|client| client.waiting) {
            let _ = answer(&client.stream, &response, &[]);
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let token = self.next_token;
            // 2^31 connections later an old client may still hold the number: skip it then.
            self.next_token = self.next_token.checked_add(1).unwrap_or(FIRST_CLIENT);
            let full = self.clients.len() >= MAX_CLIENTS || self.clients.contains_key(&token);
            if full
                || stream.set_nonblocking(true).is_err()
                || self.poller.add(&stream, token, Readiness::READ).is_err()
            {
                continue;
            }
            let client = Client {
                stream: Arc::new(stream),
                input: Vec::new(),
                descriptors: VecDeque::new(),
                mode: Mode::Requests,
                waiting: false,
            };
            self.clients.insert(token, client);
        }
    }

    fn read(&mut self, token: u32) -> Result<(), Gone> {
        let client = self.clients.get_mut(&token).ok_or(Gone)?;
        let mut chunk = [0; 1024];
        match channel::receive(&client.stream, &mut chunk, &mut client.descriptors) {
            Ok(0) => return Err(Gone),
            Ok(count) => client.input.extend_from_slice(chunk.get(..count).unwrap_or(&[])),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(_) => return Err(Gone),
        }
        if client.descriptors.len() > MAX_DESCRIPTORS {
            return Err(Gone);
        }
        self.ready.push_back(token);
        Ok(())
    }

    /// Serves what a client has sent, up to a line that is a command.
    fn next_of(&mut self, token: u32) -> Result<Option<Command>, Gone> {
        loop {
            let client = self.clients.get_mut(&token).ok_or(Gone)?;
            match client.mode {
                Mode::Console => {
                    self.bus.type_in(&std::mem::take(&mut client.input));
                    client.descriptors.clear();
                    return Ok(None);
                }
                Mode::Accepting => return if client.input.is_empty() { Ok(None) } else { Err(Gone) },
                Mode::Requests => {}
            }
            let Some(end) = client.input.iter().position(|byte| *byte == b'\n') else {
                if client.input.is_empty() {
                    client.input = Vec::new(); // an idle client costs no memory
                    client.descriptors = VecDeque::new(); // what no request wanted
                }
                return if client.input.len() > MAX_LINE { Err(Gone) } else { Ok(None) };
            };
            let line: Vec<u8> = client.input.drain(..=end).collect();
            if let Some(command) = self.respond(token, &line)? {
                return Ok(Some(command));
            }
        }
    }

    /// Answers one request, or tells what the machine has to do.
    fn respond(&mut self, token: u32, line: &[u8]) -> Result<Option<Command>, Gone> {
        let client = self.clients.get_mut(&token).ok_or(Gone)?;
        let request = match serde_json::from_slice(line) {
            Ok(request) => request,
            Err(error) => {
                client.refuse(&format!("not a request: {error}; write one JSON request a line"))?;
                return Ok(None);
            }
        };
        let command = match request {
            Request::Status => Command::Status,
            Request::Metrics => Command::Metrics,
            Request::Pause => Command::Pause,
            Request::Resume => Command::Resume,
            Request::Balloon { memory_mib } => Command::Balloon { memory_mib },
            Request::Stop { grace_ms } => {
                client.reply(&Response::Stopping, &[])?;
                Command::Stop { grace: Duration::from_millis(grace_ms.into()) }
            }
            Request::Snapshot => match client.files() {
                Some([state, memory]) => Command::Snapshot { state, memory },
                None => {
                    client.refuse("a snapshot needs two descriptors beside the request: state, memory")?;
                    return Ok(None);
                }
            },
            Request::Touched => match client.files() {
                Some([file]) => Command::Touched { file },
                None => {
                    client.refuse("the touched pages need one descriptor beside the request")?;
                    return Ok(None);
                }
            },
            Request::Wait => {
                client.waiting = true;
                return Ok(None);
            }
            Request::Ring => {
                match &self.ring {
                    Some(ring) => client.reply(&Response::Ring, &ring.as_array())?,
                    None => client
                        .refuse("this machine has no network interface: its configuration has no `net`")?,
                }
                return Ok(None);
            }
            Request::Accept => {
                self.accept_for(token)?;
                return Ok(None);
            }
            Request::Console => {
                client.reply(&Response::Console, &[])?;
                client.mode = Mode::Console;
                self.bus.console().attach(&client.stream);
                return Ok(None);
            }
        };
        Ok(Some(command))
    }

    /// The guest's connections are this client's from now on. Who had them before is told so by the end of its connection.
    fn accept_for(&mut self, token: u32) -> Result<(), Gone> {
        let client = self.clients.get_mut(&token).ok_or(Gone)?;
        let stream = Arc::downgrade(&client.stream);
        let accepter = Box::new(move |port, connection: BorrowedFd<'_>| {
            let stream = stream.upgrade().ok_or(io::ErrorKind::ConnectionRefused)?;
            answer(&stream, &Response::Connection { port }, &[connection])
        });
        if self.bus.with_device(|vsock: &mut Vsock| vsock.set_accepter(accepter)).is_none() {
            return client.refuse("this machine has no vsock: its configuration has no `vsock`");
        }
        client.mode = Mode::Accepting;
        if let Some(before) = self.accepting.replace(token) {
            self.clients.remove(&before);
        }
        Ok(())
    }
}

impl Client {
    fn reply(&self, response: &Response, descriptors: &[BorrowedFd<'_>]) -> Result<(), Gone> {
        answer(&self.stream, response, descriptors).map_err(|_| Gone)
    }

    fn refuse(&self, message: &str) -> Result<(), Gone> {
        self.reply(&Response::Error { message: message.to_owned() }, &[])
    }

    /// The `N` descriptors that came beside the request; if there are not as many, they are closed.
    fn files<const N: usize>(&mut self) -> Option<[File; N]> {
        let files: Vec<File> = std::mem::take(&mut self.descriptors).into_iter().map(File::from).collect();
        files.try_into().ok()
    }
}

/// Writes one response line, with descriptors attached. A client that has no room for it does not read.
fn answer(stream: &UnixStream, response: &Response, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    channel::send(stream, response, descriptors, Patience::Never)
}

/// One shot in `wait`, at least a millisecond: zero would disarm it.
fn set_timer(timer: &OwnedFd, wait: Duration) -> io::Result<()> {
    let wait = wait.max(Duration::from_millis(1));
    let it_value = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
    let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::time::timerfd_settime(timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value })?;
    Ok(())
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
