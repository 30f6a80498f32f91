//! The event loop: moves frames between devices, rings and the engine, and serves the control socket. One thread, which waits only in
//! `epoll_wait`.
//!
//! Backpressure: a frame that the NIC does not take waits, and while one waits neither the rings nor the TAP are read; slivers then
//! find their rings full. Fairness: slivers with frames take turns of at most [`TURN`] frames.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use commonage_net_demux_api::control::{PortGrant, Request, Response, SliverId};
use commonage_net_demux_api::ring::{Endpoint, MAX_FRAME, RingFds};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

use crate::control::{self, Incoming};
use crate::device::{BUFFER, Nic, Received, Tap};
use crate::engine::counters::Reason;
use crate::engine::packet::{Mac, complete_checksum};
use crate::engine::{Engine, Place, Ports, Time};
use crate::say::say;

/// Frames of one sliver before the next one's turn.
const TURN: usize = 32;
/// Frames of a device before anything else.
const BATCH: usize = 64;
/// Frames that wait for the NIC; only answers to ARP can make it more than one.
const WAITING: usize = 64;
/// Clients of the control socket.
const CLIENTS: usize = 16;

const NIC: u64 = 0;
const TAP: u64 = 1;
const LISTENER: u64 = 2;
/// Clients' tokens start here, slivers' at 1 << 32.
const FIRST_CLIENT: u64 = 16;
const SLIVER: u64 = 1 << 32;

/// A sliver's ring.
#[derive(Debug)]
struct Link {
    endpoint: Endpoint,
    /// Stands in the queue of those who may have frames.
    queued: bool,
}

/// The far side of the engine.
#[derive(Debug)]
struct Wires {
    nic: Nic,
    tap: Tap,
    links: HashMap<SliverId, Link>,
    waiting: VecDeque<Vec<u8>>,
}

impl Ports for Wires {
    fn to_nic(&mut self, frame: &[u8]) -> bool {
        if self.waiting.is_empty() {
            match self.nic.send(frame) {
                Ok(()) => return true,
                Err(Errno::AGAIN) => {}
                Err(_) => return false,
            }
        }
        let room = self.waiting.len() < WAITING;
        if room {
            self.waiting.push_back(frame.to_vec());
        }
        room
    }

    fn to_host(&mut self, frame: &[u8]) -> bool {
        self.tap.send(frame)
    }

    fn to_sliver(&mut self, sliver: SliverId, frame: &[u8]) -> bool {
        self.links.get_mut(&sliver).is_some_and(|link| link.endpoint.send(frame).is_ok())
    }
}

/// net-demux.
#[derive(Debug)]
pub struct Shell {
    engine: Engine,
    wires: Wires,
    /// Slivers that may have frames.
    ready: VecDeque<SliverId>,
    epoll: OwnedFd,
    listener: OwnedFd,
    clients: HashMap<u64, OwnedFd>,
    next_client: u64,
    /// The NIC is asked to tell when it takes frames again, and nobody else is heard.
    blocked: bool,
    instance: u64,
    start: Instant,
}

impl Shell {
    /// Everything open, nothing attached.
    pub fn new(nic: Nic, tap: Tap, listener: OwnedFd) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &nic, EventData::new_u64(NIC), EventFlags::IN)?;
        epoll::add(&epoll, &tap, EventData::new_u64(TAP), EventFlags::IN)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        let mut instance = [0; 8];
        rustix::rand::getrandom(&mut instance[..], rustix::rand::GetRandomFlags::empty())?;
        Ok(Self {
            engine: Engine::new(nic.mac),
            wires: Wires { nic, tap, links: HashMap::new(), waiting: VecDeque::new() },
            ready: VecDeque::new(),
            epoll,
            listener,
            clients: HashMap::new(),
            next_client: FIRST_CLIENT,
            blocked: false,
            instance: u64::from_ne_bytes(instance),
            start: Instant::now(),
        })
    }

    /// Runs until a device is lost.
    pub fn run(&mut self) -> io::Result<()> {
        let mut buf = vec![0; BUFFER];
        let mut events: Vec<Event> = Vec::with_capacity(BATCH);
        loop {
            let timeout = self.timeout();
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                match event.data.u64() {
                    NIC => self.serve_nic(&mut buf)?,
                    TAP => self.serve_tap(&mut buf)?,
                    LISTENER => self.accept(),
                    token if token >= SLIVER => self.wake(SliverId(token as u32), event.flags),
                    token => self.serve_client(token),
                }
            }
            if !self.blocked {
                self.serve_slivers(&mut buf);
            }
            self.engine.tick(self.start.elapsed(), &mut self.wires);
            self.update_backpressure()?;
        }
    }

    fn now(&self) -> Time {
        self.start.elapsed()
    }

    /// How long to wait, rounded up; `None` for ever.
    fn timeout(&self) -> Option<Timespec> {
        let wait = if !self.ready.is_empty() && !self.blocked {
            Duration::ZERO
        } else {
            let left = self.engine.deadline()?.saturating_sub(self.now());
            left + Duration::from_millis(1)
        };
        Some(Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        })
    }

    fn serve_nic(&mut self, buf: &mut [u8]) -> io::Result<()> {
        while let Some(frame) = self.wires.waiting.front() {
            match self.wires.nic.send(frame) {
                Err(Errno::AGAIN) => break,
                Err(_) => self.engine.count(SliverId(0), Reason::NicFull),
                Ok(()) => {}
            }
            self.wires.waiting.pop_front();
        }
        let now = self.now();
        for _ in 0..BATCH {
            match self.wires.nic.recv(buf) {
                Ok(Received::Nothing) => break,
                Ok(Received::Ignored) => {}
                Ok(Received::Frame { length, partial_checksum }) => {
                    let frame = buf.get_mut(..length).unwrap_or(&mut []);
                    if partial_checksum {
                        complete_checksum(frame);
                    }
                    self.engine.nic_frame(now, frame, &mut self.wires);
                }
                Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => {
                    say!("the NIC is down");
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn serve_tap(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let now = self.now();
        for _ in 0..BATCH {
            if !self.wires.waiting.is_empty() {
                break;
            }
            let Some(length) = self.wires.tap.recv(buf)? else { break };
            self.engine.host_frame(now, buf.get_mut(..length).unwrap_or(&mut []), &mut self.wires);
        }
        Ok(())
    }

    /// A sliver's event is ready.
    fn wake(&mut self, id: SliverId, flags: EventFlags) {
        let Some(link) = self.wires.links.get_mut(&id) else { return };
        let lives = link.endpoint.drain_event();
        if !link.queued {
            link.queued = true;
            self.ready.push_back(id);
        }
        if !lives || flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            // Whoever holds the other end is gone for good; its node manager will detach it. What it sent before is still sent.
            let _ = epoll::delete(&self.epoll, link.endpoint.event());
        }
    }

    /// One turn for each sliver that may have frames.
    fn serve_slivers(&mut self, buf: &mut [u8]) {
        for _ in 0..self.ready.len() {
            let Some(id) = self.ready.pop_front() else { return };
            let now = self.now();
            let more = self.turn(now, id, buf);
            if let Some(link) = self.wires.links.get_mut(&id) {
                link.queued = more;
                if more {
                    self.ready.push_back(id);
                }
            }
            if !self.wires.waiting.is_empty() {
                return;
            }
        }
    }

    /// Takes frames of one sliver; false when it has no more.
    fn turn(&mut self, now: Time, id: SliverId, buf: &mut [u8]) -> bool {
        for _ in 0..TURN {
            if !self.wires.waiting.is_empty() {
                return true;
            }
            let Some(link) = self.wires.links.get_mut(&id) else { return false };
            let Some(length) = link.endpoint.recv(buf.get_mut(..MAX_FRAME).unwrap_or(&mut [])) else {
                if link.endpoint.broken() {
                    let _ = epoll::delete(&self.epoll, link.endpoint.event());
                    self.engine.count(id, Reason::RingBroken);
                    say!(
                        "sliver {}: its machine broke the ring's rules: disconnected until attached anew",
                        id.0
                    );
                }
                return false;
            };
            self.engine.sliver_frame(now, id, buf.get_mut(..length).unwrap_or(&mut []), &mut self.wires);
        }
        true
    }

    fn update_backpressure(&mut self) -> io::Result<()> {
        let blocked = !self.wires.waiting.is_empty();
        if blocked != self.blocked {
            self.blocked = blocked;
            let (nic, tap) = if blocked {
                (EventFlags::IN | EventFlags::OUT, EventFlags::empty())
            } else {
                (EventFlags::IN, EventFlags::IN)
            };
            epoll::modify(&self.epoll, &self.wires.nic, EventData::new_u64(NIC), nic)?;
            epoll::modify(&self.epoll, &self.wires.tap, EventData::new_u64(TAP), tap)?;
        }
        Ok(())
    }

    fn accept(&mut self) {
        let Some(client) = control::accept(&self.listener) else { return };
        if self.clients.len() >= CLIENTS {
            say!("a control client was refused: {CLIENTS} are connected already");
            return;
        }
        let token = self.next_client;
        // Tokens of clients stay below those of slivers.
        self.next_client = if token + 1 < SLIVER { token + 1 } else { FIRST_CLIENT };
        if epoll::add(&self.epoll, &client, EventData::new_u64(token), EventFlags::IN).is_ok() {
            self.clients.insert(token, client);
        }
    }

    fn serve_client(&mut self, token: u64) {
        let Some(client) = self.clients.get(&token) else { return };
        let response = match control::receive(client.as_fd()) {
            Incoming::Nothing => return,
            Incoming::Closed => {
                self.clients.remove(&token);
                return;
            }
            Incoming::Nonsense(message) => Response::Error { message },
            Incoming::Request(request, fds) => self.answer(request, fds),
        };
        if let Some(client) = self.clients.get(&token)
            && !control::respond(client.as_fd(), &response)
        {
            self.clients.remove(&token);
        }
    }

    fn answer(&mut self, request: Request, fds: Vec<OwnedFd>) -> Response {
        match request {
            Request::SetAddress { address, prefix_len, gateway } => {
                if !(1..=32).contains(&prefix_len) {
                    let message = format!("a prefix of {prefix_len} bits is none: give 1 to 32");
                    return Response::Error { message };
                }
                self.engine.set_place(Place { address, prefix_len, gateway });
                Response::Ok
            }
            Request::Attach { sliver, slice, mac, ports } => {
                match self.attach(sliver, slice, mac, ports, fds) {
                    Ok(()) => Response::Ok,
                    Err(message) => {
                        Response::Error { message: format!("sliver {} is not attached: {message}", sliver.0) }
                    }
                }
            }
            Request::Detach { sliver } => {
                self.disconnect(sliver);
                self.engine.detach(sliver);
                Response::Ok
            }
            Request::List => self.list(SliverId(0)),
            Request::ListAfter { sliver } => self.list(sliver),
        }
    }

    fn list(&self, after: SliverId) -> Response {
        let (instance, address, drops) = (self.instance, self.engine.address(), self.engine.drops());
        let frame = Response::List { instance, address, slivers: Vec::new(), drops: drops.clone() };
        let reserved = serde_json::to_vec(&frame).map_or(0, |json| json.len());
        Response::List {
            instance,
            address,
            slivers: control::fitting(self.engine.list(after), reserved),
            drops,
        }
    }

    fn attach(
        &mut self,
        id: SliverId,
        slice: String,
        mac: Mac,
        ports: PortGrant,
        fds: Vec<OwnedFd>,
    ) -> Result<(), String> {
        let count = fds.len();
        let fds = RingFds::from_vec(fds)
            .ok_or_else(|| format!("{count} descriptors came with the request: send the ring's three"))?;
        let endpoint = Endpoint::open(fds).map_err(|error| error.to_string())?;
        self.engine.attach(id, slice, mac, ports).map_err(|error| error.to_string())?;
        self.disconnect(id);
        let token = EventData::new_u64(SLIVER | u64::from(id.0));
        if let Err(error) = epoll::add(&self.epoll, endpoint.event(), token, EventFlags::IN) {
            self.engine.detach(id);
            return Err(format!("its event cannot be polled: {error}"));
        }
        self.wires.links.insert(id, Link { endpoint, queued: true });
        // What the guest sent before must be looked for.
        self.ready.push_back(id);
        Ok(())
    }

    fn disconnect(&mut self, id: SliverId) {
        self.ready.retain(|&ready| ready != id);
        if let Some(link) = self.wires.links.remove(&id) {
            // Closing would not do: the machine holds duplicates.
            let _ = epoll::delete(&self.epoll, link.endpoint.event());
        }
    }
}

/// Keeps the host's own stack from also answering what it sees on the NIC: without this it would reset slivers' connections, because
/// the address they use is one of its own. A strict reverse path filter drops everything there, as routes lead through the TAP.
pub fn silence_host_on(nic: &str) -> Vec<(String, io::Error)> {
    let all = "/proc/sys/net/ipv4/conf/all/rp_filter";
    let mut settings = BTreeMap::from([
        (format!("/proc/sys/net/ipv4/conf/{nic}/rp_filter"), "1"),
        (format!("/proc/sys/net/ipv4/conf/{nic}/arp_ignore"), "8"),
        (format!("/proc/sys/net/ipv6/conf/{nic}/disable_ipv6"), "1"),
    ]);
    // The greater of the two counts, and 2 is the lax one.
    if std::fs::read_to_string(all).is_ok_and(|value| value.trim() == "2") {
        settings.insert(all.to_owned(), "1");
    }
    let failed =
        |(path, value): (String, &str)| std::fs::write(&path, value).err().map(|error| (path, error));
    settings.into_iter().filter_map(failed).collect()
}
