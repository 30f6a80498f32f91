//! The control socket: who may open it (root) asks how the machine is, for the network ring, for its end, or to be told of its end.
//!
//! Clients are few and trusted not to be hostile, but may be slow or dead: nothing here blocks, input is bounded, and a client that does
//! not read its answers is dropped.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Instant;

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

/// A client that is to be forgotten.
struct Gone;

/// The server.
pub struct Control {
    listener: UnixListener,
    poller: Poller,
    clients: BTreeMap<u32, Client>,
    next_token: u32,
    ring: Option<RingFds>,
    started: Instant,
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
            ring,
            started: Instant::now(),
        })
    }

    /// Serves the descriptor registered under `token`. True if a client asked for the machine's end.
    pub fn event(&mut self, token: u32) -> bool {
        if token == LISTENER {
            self.accept();
            return false;
        }
        match self.serve(token) {
            Ok(stop) => stop,
            Err(Gone) => {
                self.clients.remove(&token); // closing the stream also removes it from the event loop
                false
            }
        }
    }

    /// Tells every waiting client why the machine ended.
    pub fn finish(&mut self, reason: &ExitReason) {
        for client in self.clients.values_mut().filter(|client| client.waiting) {
            let _ = answer(&client.stream, &Response::Exited { reason: reason.clone() }, &[]);
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

    fn serve(&mut self, token: u32) -> Result<bool, Gone> {
        let client = self.clients.get_mut(&token).ok_or(Gone)?;
        let mut chunk = [0; 1024];
        match client.stream.read(&mut chunk) {
            Ok(0) => return Err(Gone),
            Ok(count) => client.input.extend_from_slice(chunk.get(..count).unwrap_or(&[])),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(false),
            Err(_) => return Err(Gone),
        }
        let mut stop = false;
        while let Some(end) = client.input.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = client.input.drain(..=end).collect();
            stop |= respond(client, &line, self.ring.as_ref(), self.started)?;
        }
        if client.input.len() > MAX_LINE {
            return Err(Gone);
        }
        Ok(stop)
    }
}

/// Answers one request. True if it asked for the machine's end.
fn respond(client: &mut Client, line: &[u8], ring: Option<&RingFds>, started: Instant) -> Result<bool, Gone> {
    let reply =
        |response: &Response, fds: &[BorrowedFd<'_>]| answer(&client.stream, response, fds).map_err(|_| Gone);
    match (serde_json::from_slice(line), ring) {
        (Ok(Request::Status), _) => {
            let uptime_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            reply(&Response::Status { pid: std::process::id(), uptime_ms }, &[])?;
        }
        (Ok(Request::Ring), Some(ring)) => reply(&Response::Ring, &ring.as_array())?,
        (Ok(Request::Ring), None) => {
            let message = "this machine has no network interface: its configuration has no `net`".into();
            reply(&Response::Error { message }, &[])?;
        }
        (Ok(Request::Stop), _) => {
            reply(&Response::Stopping, &[])?;
            return Ok(true);
        }
        (Ok(Request::Wait), _) => client.waiting = true,
        (Err(error), _) => {
            let message = format!("not a request: {error}; write one JSON request a line");
            reply(&Response::Error { message }, &[])?;
        }
    }
    Ok(false)
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
