//! The client of net-demux: keeps it told of the node's address and of every sliver's ring.
//!
//! ```text
//!   Away ──connected──► (address, detach strangers, attach all) ──► Connected ──command, new address──► Connected
//!    ▲                                                                 │
//!    └────────────── the socket dies; retried after 50 ms … 2 s ◄──────┘
//! ```
//! net-demux keeps nothing on disk, so what should be attached is kept here, with the rings' descriptors, and told again on each connection.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use commonage_net_demux_api::control::{MAX_PACKET, PortGrant, Request, Response, SliverId, SliverStatus};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::host::Host;

const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// How long net-demux may take to answer.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// The ring of a sliver: its memory, the event "guest sent", the event "guest may receive".
pub type Ring = Arc<[OwnedFd; 3]>;

/// A sliver as net-demux should have it.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// Its number: its user id.
    pub sliver: SliverId,
    /// Its slice.
    pub slice: String,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its ports.
    pub ports: PortGrant,
    /// Its ring.
    pub ring: Ring,
}

/// A handle on the client.
#[derive(Debug, Clone)]
pub struct Demux {
    commands: mpsc::Sender<Command>,
}

#[derive(Debug)]
enum Command {
    Attach(Box<Attachment>, oneshot::Sender<Result<(), String>>),
    Detach(SliverId, oneshot::Sender<()>),
    Status(SliverId, oneshot::Sender<SliverStatus>),
}

impl Demux {
    /// Starts the client of the net-demux at `socket`. `expected` slivers may be attached there from before and stay so until they are
    /// attached anew or detached; all others are detached.
    pub fn start(socket: PathBuf, host: watch::Receiver<Option<Host>>, expected: BTreeSet<SliverId>) -> Self {
        let (commands, receiver) = mpsc::channel(64);
        let client = Client { socket, host, commands: receiver, attached: BTreeMap::new(), expected };
        tokio::spawn(client.run());
        Self { commands }
    }

    /// Attaches a sliver, now or, while net-demux is away, as soon as it is back.
    ///
    /// # Errors
    /// net-demux refused, in its words.
    pub async fn attach(&self, attachment: Attachment) -> Result<(), String> {
        let (answer, answered) = oneshot::channel();
        let gone = |_| "the client of net-demux has ended".to_owned();
        self.commands
            .send(Command::Attach(Box::new(attachment), answer))
            .await
            .map_err(|e| gone(e.to_string()))?;
        answered.await.map_err(|e| gone(e.to_string()))?
    }

    /// Detaches a sliver: its ports are free and its ring is let go of.
    pub async fn detach(&self, sliver: SliverId) {
        let (answer, answered) = oneshot::channel();
        if self.commands.send(Command::Detach(sliver, answer)).await.is_ok() {
            answered.await.ok();
        }
    }

    /// What net-demux counted for a sliver; `None` while it is away or does not have it.
    pub async fn status(&self, sliver: SliverId) -> Option<SliverStatus> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(Command::Status(sliver, answer)).await.ok()?;
        answered.await.ok()
    }
}

struct Client {
    socket: PathBuf,
    host: watch::Receiver<Option<Host>>,
    commands: mpsc::Receiver<Command>,
    attached: BTreeMap<SliverId, Attachment>,
    expected: BTreeSet<SliverId>,
}

impl Client {
    async fn run(mut self) {
        let mut retry = FIRST_RETRY;
        let mut was_told = false;
        loop {
            let connected = match connect(&self.socket) {
                Ok(connection) => self.push_all(&connection).await.map(|()| connection),
                Err(e) => Err(e),
            };
            match connected {
                Ok(connection) => {
                    tracing::info!("net-demux: connected, {} slivers attached", self.attached.len());
                    (retry, was_told) = (FIRST_RETRY, false);
                    match self.connected(&connection).await {
                        Some(e) => tracing::warn!("net-demux: {e}; connecting again"),
                        None => return,
                    }
                }
                Err(e) => {
                    if !std::mem::replace(&mut was_told, true) {
                        tracing::warn!(
                            "net-demux at {} is away: {e}; trying until it is back",
                            self.socket.display()
                        );
                    }
                }
            }
            if !self.away(retry).await {
                return;
            }
            retry = (retry * 2).min(LAST_RETRY);
        }
    }

    /// Serves until the connection dies (then: why) or nobody holds a handle.
    async fn connected(&mut self, connection: &Connection) -> Option<io::Error> {
        loop {
            tokio::select! {
                command = self.commands.recv() => {
                    if let Err(e) = self.command(connection, command?).await {
                        return Some(e);
                    }
                }
                changed = self.host.changed() => {
                    if changed.is_err() {
                        return None;
                    }
                    if let Err(e) = self.set_address(connection).await {
                        return Some(e);
                    }
                }
                // Nothing is said unasked: whatever can be read now is the end.
                e = connection.receive() => {
                    return Some(e.err().unwrap_or_else(|| io::Error::other("it spoke unasked")));
                }
            }
        }
    }

    /// Waits `retry` and notes what is commanded meanwhile; false when nobody holds a handle.
    async fn away(&mut self, retry: Duration) -> bool {
        let sleep = tokio::time::sleep(retry);
        tokio::pin!(sleep);
        loop {
            tokio::select! {
                () = &mut sleep => return true,
                command = self.commands.recv() => match command {
                    Some(Command::Attach(a, answer)) => {
                        self.attached.insert(a.sliver, *a);
                        answer.send(Ok(())).ok();
                    }
                    Some(Command::Detach(sliver, answer)) => {
                        self.attached.remove(&sliver);
                        self.expected.remove(&sliver);
                        answer.send(()).ok();
                    }
                    // Dropping the answer says that there is none.
                    Some(Command::Status(..)) => {}
                    None => return false,
                },
            }
        }
    }

    async fn push_all(&mut self, connection: &Connection) -> io::Result<()> {
        self.set_address(connection).await?;
        // Slivers that were deleted while nobody could tell net-demux would keep their ports from others.
        let mut list = Request::List;
        while let Response::List { slivers, .. } = connection.ask(&list, None).await? {
            let known = |s: &SliverId| self.attached.contains_key(s) || self.expected.contains(s);
            for stranger in slivers.iter().map(|s| s.sliver).filter(|s| !known(s)) {
                connection.ask(&Request::Detach { sliver: stranger }, None).await?;
            }
            let Some(last) = slivers.last() else { break };
            list = Request::ListAfter { sliver: last.sliver };
        }
        for attachment in self.attached.values() {
            if let Err(refused) = attach(connection, attachment).await? {
                tracing::error!("net-demux refused {}: {refused}", attachment.slice);
            }
        }
        Ok(())
    }

    async fn set_address(&mut self, connection: &Connection) -> io::Result<()> {
        let Some(Host { address, prefix_len, gateway, .. }) = self.host.borrow_and_update().clone() else {
            return Ok(());
        };
        match connection.ask(&Request::SetAddress { address, prefix_len, gateway }, None).await? {
            Response::Error { message } => {
                tracing::error!("net-demux refused the address {address}: {message}")
            }
            _ => tracing::info!("net-demux: the node's address is {address}"),
        }
        Ok(())
    }

    async fn command(&mut self, connection: &Connection, command: Command) -> io::Result<()> {
        match command {
            Command::Attach(a, answer) => {
                // Noted first: if the connection dies now, the next one is told.
                self.attached.insert(a.sliver, (*a).clone());
                let result = attach(connection, &a).await;
                if matches!(result, Ok(Err(_))) {
                    self.attached.remove(&a.sliver);
                }
                let (answered, failed) = match result {
                    Ok(answered) => (answered, None),
                    Err(e) => (Ok(()), Some(e)),
                };
                answer.send(answered).ok();
                failed.map_or(Ok(()), Err)
            }
            Command::Detach(sliver, answer) => {
                self.attached.remove(&sliver);
                self.expected.remove(&sliver);
                let result = connection.ask(&Request::Detach { sliver }, None).await;
                answer.send(()).ok();
                result.map(drop)
            }
            Command::Status(sliver, answer) => {
                // The list goes on after a given sliver, so the one asked for comes first.
                let list = Request::ListAfter { sliver: SliverId(sliver.0.saturating_sub(1)) };
                if let Response::List { slivers, .. } = connection.ask(&list, None).await?
                    && let Some(status) = slivers.into_iter().find(|s| s.sliver == sliver)
                {
                    answer.send(status).ok();
                }
                Ok(())
            }
        }
    }
}

async fn attach(connection: &Connection, a: &Attachment) -> io::Result<Result<(), String>> {
    let Attachment { sliver, slice, mac, ports, ring } = a;
    let request = Request::Attach { sliver: *sliver, slice: slice.clone(), mac: *mac, ports: ports.clone() };
    Ok(match connection.ask(&request, Some(ring)).await? {
        Response::Error { message } => Err(message),
        _ => Ok(()),
    })
}

struct Connection(UnixStream);

fn connect(path: &Path) -> io::Result<Connection> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    // tokio knows Unix sockets as streams only. Readiness is all that is asked of it here: packets are sent and received by ourselves.
    Ok(Connection(UnixStream::from_std(socket.into())?))
}

impl Connection {
    async fn ask(&self, request: &Request, ring: Option<&Ring>) -> io::Result<Response> {
        let exchange = async {
            let packet = serde_json::to_vec(request)?;
            self.0.async_io(Interest::WRITABLE, || send(&self.0, &packet, ring)).await?;
            self.receive().await
        };
        tokio::time::timeout(ANSWER_WAIT, exchange)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no answer within 5 s"))?
    }

    async fn receive(&self) -> io::Result<Response> {
        let mut packet = vec![0; MAX_PACKET];
        let receive = || Ok(rustix::net::recv(&self.0, &mut packet[..], RecvFlags::empty())?.0);
        match self.0.async_io(Interest::READABLE, receive).await? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection")),
            len => Ok(serde_json::from_slice(packet.get(..len).unwrap_or_default())?),
        }
    }
}

fn send(socket: &UnixStream, packet: &[u8], ring: Option<&Ring>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = ring.map(|ring| ring.each_ref().map(|fd| fd.as_fd()));
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
#[path = "demux_test.rs"]
mod tests;
