//! The control socket: who may open it (root) asks how the machine is, for the network ring, for its end, or to be told of its end.
//!
//! What only the machine can do comes out of [`Control::next`] as a [`Command`], one at a time and in each client's order; the machine
//! carries it out and answers by [`Control::answer`] before it takes the next.
//!
//! Clients are few and trusted not to be hostile, but may be slow or dead: nothing here blocks, input is bounded, and a client that does
//! not read its answers is dropped.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use commonage_net_demux_api::ring::RingFds;
use commonage_vmm_api::{ExitReason, Request, Response};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::reactor::{Poller, Readiness};

/// Longest request line, bytes.
const MAX_LINE: usize = 4096;
/// Most clients at a time.
const MAX_CLIENTS: usize = 64;
const LISTENER: u32 = 0;

struct Client {
    stream: UnixStream,
    input: Vec<u8>,
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
    /// End the machine, asking the guest first if there is a grace.
    Stop {
        /// How long the guest has.
        grace: Duration,
    },
}

/// A client that is to be forgotten.
struct Gone;

/// The server.
pub struct Control {
    listener: UnixListener,
    poller: Poller,
    clients: BTreeMap<u32, Client>,
    next_token: u32,
    /// Clients whose input may hold whole lines.
    ready: VecDeque<u32>,
    ring: Option<RingFds>,
}

impl Control {
    /// Listens at `path`, replacing a socket left there by an earlier machine. `ring` is what [`Request::Ring`] hands out.
    pub fn new(path: &Path, ring: Option<RingFds>, poller: Poller) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        poller.add(&listener, LISTENER, Readiness::READ)?;
        Ok(Self {
            listener,
            poller,
            clients: BTreeMap::new(),
            next_token: LISTENER + 1,
            ready: VecDeque::new(),
            ring,
        })
    }

    /// Serves the descriptor registered under `token`. Afterwards [`Control::next`] tells what there is to do.
    pub fn event(&mut self, token: u32) {
        if token == LISTENER {
            return self.accept();
        }
        if let Err(Gone) = self.read(token) {
            self.clients.remove(&token); // closing the stream also removes it from the event loop
        }
    }

    /// The next thing that a client wants of the machine.
    #[expect(clippy::should_implement_trait, reason = "events make more of them")]
    pub fn next(&mut self) -> Option<(ClientId, Command)> {
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

    /// Tells every waiting client why the machine ended, and what its console said last.
    pub fn finish(&mut self, reason: &ExitReason, console: &str) {
        let response = Response::Exited { reason: reason.clone(), console: console.to_owned() };
        for client in self.clients.values_mut().filter(|client| client.waiting) {
            let _ = answer(&client.stream, &response, &[]);
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let token = self.next_token;
            // 2^31 connections later an old client may still hold the number: skip it then.
            self.next_token = self.next_token.checked_add(1).unwrap_or(LISTENER + 1);
            let full = self.clients.len() >= MAX_CLIENTS || self.clients.contains_key(&token);
            if full
                || stream.set_nonblocking(true).is_err()
                || self.poller.add(&stream, token, Readiness::READ).is_err()
            {
                continue;
            }
            self.clients.insert(token, Client { stream, input: Vec::new(), waiting: false });
        }
    }

    fn read(&mut self, token: u32) -> Result<(), Gone> {
        let client = self.clients.get_mut(&token).ok_or(Gone)?;
        let mut chunk = [0; 1024];
        match client.stream.read(&mut chunk) {
            Ok(0) => return Err(Gone),
            Ok(count) => client.input.extend_from_slice(chunk.get(..count).unwrap_or(&[])),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(_) => return Err(Gone),
        }
        self.ready.push_back(token);
        Ok(())
    }

    /// Serves a client's whole lines, up to one that is a command.
    fn next_of(&mut self, token: u32) -> Result<Option<Command>, Gone> {
        let client = self.clients.get_mut(&token).ok_or(Gone)?;
        while let Some(end) = client.input.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = client.input.drain(..=end).collect();
            if let Some(command) = respond(client, &line, self.ring.as_ref())? {
                return Ok(Some(command));
            }
        }
        if client.input.len() > MAX_LINE { Err(Gone) } else { Ok(None) }
    }
}

/// Answers one request, or tells what the machine has to do.
fn respond(client: &mut Client, line: &[u8], ring: Option<&RingFds>) -> Result<Option<Command>, Gone> {
    let reply =
        |response: &Response, fds: &[BorrowedFd<'_>]| answer(&client.stream, response, fds).map_err(|_| Gone);
    let refuse = |message: &str| reply(&Response::Error { message: message.to_owned() }, &[]);
    let request = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(error) => {
            refuse(&format!("not a request: {error}; write one JSON request a line"))?;
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
            reply(&Response::Stopping, &[])?;
            Command::Stop { grace: Duration::from_millis(grace_ms.into()) }
        }
        Request::Wait => {
            client.waiting = true;
            return Ok(None);
        }
        Request::Ring => {
            match ring {
                Some(ring) => reply(&Response::Ring, &ring.as_array())?,
                None => refuse("this machine has no network interface: its configuration has no `net`")?,
            }
            return Ok(None);
        }
        Request::Snapshot | Request::Touched | Request::Accept | Request::Console => {
            refuse("this machine cannot do that yet")?;
            return Ok(None);
        }
    };
    Ok(Some(command))
}

/// Writes one response line, with descriptors attached.
fn answer(stream: &UnixStream, response: &Response, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let sent = rustix::net::sendmsg(stream.as_fd(), &[io::IoSlice::new(&line)], &mut control, flags)?;
    // A response is far smaller than a socket's buffer; a client that filled it does not read.
    if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
#[path = "control_test.rs"]
mod tests;
