//! The table of streams between the guest and the host's Unix sockets, and the order in which they get the guest's receive descriptors.
//!
//! A stream is named by (host port, guest port). Streams that have something for the guest stand in a queue, each at most once, and
//! get one packet a turn. Resets go before them.
//!
//! Invariants, whatever the guest sends:
//! * at most [`MAX_STREAMS`] streams, [`MAX_GREETINGS`] clients that have not named their port, [`MAX_RESETS`] resets that wait;
//! * a guest's packets are taken even while it takes none of ours (5.10.6, Virtqueue Flow Control): waiting for each other would be for ever. The
//!   price is that resets beyond [`MAX_RESETS`] are lost, which a guest can only bring upon itself;
//! * every stream that ends for a reason other than the guest's own RST tells the guest so by RST;
//! * a stream the guest has left lives on, nameless, until the host has read what the guest sent before.
//!
//! Sockets are watched edge-triggered for everything, once: so a hang-up that cannot be acted upon yet (the guest gives no credit
//! for the last bytes) does not wake the event loop over and over.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::net::{Shutdown, shutdown};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::VsockError;
use super::connection::{Connection, Segment, Verdict};
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use super::socket::{self, Accepter, Greeted, Greeting, Listener, Read};

/// Most streams at a time.
pub const MAX_STREAMS: usize = 256;
/// Most clients that have connected and not yet said to which port. More wait in the listening socket's backlog.
pub const MAX_GREETINGS: usize = 64;
/// Most resets that wait for a receive descriptor.
pub const MAX_RESETS: usize = 4096;
/// How long a client may take to say to which port it wants.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// Host ports of streams that the host opened count up from here, away from those that programs choose.
const FIRST_HOST_PORT: u32 = 1 << 30;
const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const FIRST_ID: u64 = 2;
/// Most events taken per round; the epoll instance stays readable if there are more.
const ROUND: usize = 64;

/// A stream's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    host_port: u32,
    guest_port: u32,
}

/// A stream and its socket.
#[derive(Debug)]
struct Stream {
    key: Key,
    connection: Connection,
    socket: OwnedFd,
    /// The socket may have something to read.
    readable: bool,
    /// It stands in the queue.
    queued: bool,
    /// The guest has left: no longer in `by_key`, only to be flushed.
    guest_left: bool,
    /// Directions of the socket that were shut already.
    write_shut: bool,
    read_shut: bool,
}

#[derive(Debug)]
struct Client {
    greeting: Greeting,
    until: Instant,
}

/// Packets that were not as they should be, by reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Dropped: not from the guest's own context id.
    pub forged: u64,
    /// Answered by RST: wrong destination, type, operation or length.
    pub malformed: u64,
    /// Answered by RST: of no stream.
    pub stray: u64,
    /// Answered by RST: against the rules of its stream.
    pub violations: u64,
    /// Answered by RST: a request while nobody accepts, that the accepting client has no room for, or for one stream too many.
    pub refused: u64,
    /// Resets lost because the guest took none.
    pub resets_lost: u64,
}

/// The table of streams. It takes no memory while there are none.
pub struct Muxer {
    guest_cid: u64,
    epoll: OwnedFd,
    timer: OwnedFd,
    /// When the timer will fire.
    timer_at: Option<Instant>,
    listener: Listener,
    /// Who takes the guest's connections, if anybody does.
    accepter: Option<Accepter>,
    /// There may be clients to accept.
    listener_ready: bool,
    clients: HashMap<u64, Client>,
    streams: HashMap<u64, Stream>,
    by_key: HashMap<Key, u64>,
    next_id: u64,
    next_host_port: u32,
    queue: VecDeque<u64>,
    resets: VecDeque<Header>,
    counters: Counters,
}

impl Muxer {
    /// An empty table for the guest `guest_cid`, listening at `path`.
    pub fn new(guest_cid: u64, path: &Path) -> Result<Self, VsockError> {
        let failed = |what| move |source: rustix::io::Errno| VsockError::Poll { what, source: source.into() };
        let listener = Listener::create(path)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(failed("create an epoll instance"))?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)
            .map_err(failed("create a timer"))?;
        for (fd, token) in [(listener.socket(), LISTENER), (&timer, TIMER)] {
            epoll::add(&epoll, fd, EventData::new_u64(token), EventFlags::IN | EventFlags::ET)
                .map_err(failed("watch the listening socket and the timer"))?;
        }
        Ok(Self {
            guest_cid,
            epoll,
            timer,
            timer_at: None,
            listener,
            accepter: None,
            listener_ready: false,
            clients: HashMap::new(),
            streams: HashMap::new(),
            by_key: HashMap::new(),
            next_id: FIRST_ID,
            next_host_port: FIRST_HOST_PORT,
            queue: VecDeque::new(),
            resets: VecDeque::new(),
            counters: Counters::default(),
        })
    }

    /// Readable when [`Muxer::poll`] has something to do.
    pub fn epoll(&self) -> impl AsFd + '_ {
        &self.epoll
    }

    /// What went wrong so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Streams at present, those included that the guest has left.
    pub fn stream_count(&self) -> usize {
        self.streams.len()
    }

    /// Whether there is anything that the guest may know of: a stream, or a reset on its way.
    pub fn is_known_to_guest(&self) -> bool {
        !self.by_key.is_empty() || !self.resets.is_empty()
    }

    /// The guest's connections go to `accepter` from now on.
    pub fn set_accepter(&mut self, accepter: Accepter) {
        self.accepter = Some(accepter);
    }

    /// Closes every stream: the guest has forgotten them all. Clients that have not named their port may stay.
    pub fn reset(&mut self) {
        self.streams.clear();
        self.by_key.clear();
        self.queue.clear();
        self.resets.clear();
    }

    /// Takes a packet from the guest. `payload` is shorter than the header says if the packet was malformed.
    pub fn from_guest(&mut self, header: &Header, payload: &[u8]) {
        if header.src_cid != self.guest_cid {
            self.counters.forged += 1;
            return;
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let to_us = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let id = if to_us { self.by_key.get(&key).copied() } else { None };
        let whole = usize::try_from(header.len).is_ok_and(|len| len == payload.len());
        match (Op::from_number(header.op), id) {
            (Some(Op::Reset), None) => {}
            (Some(Op::Reset), Some(id)) => self.guest_leaves(id),
            (Some(op), Some(id)) if whole => self.receive(id, op, header, payload),
            (Some(Op::Request), None) if whole && to_us => self.accept_guest(key, header),
            (Some(_), None) if whole && to_us => {
                self.counters.stray += 1;
                self.push_reset(header.reset());
            }
            (_, id) => {
                self.counters.malformed += 1;
                self.push_reset(header.reset());
                id.into_iter().for_each(|id| self.remove(id));
            }
        }
    }

    fn receive(&mut self, id: u64, op: Op, header: &Header, payload: &[u8]) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let Header { flags, buf_alloc, fwd_cnt, .. } = *header;
        match stream.connection.receive(&Segment { op, flags, buf_alloc, fwd_cnt }, payload) {
            Ok(Verdict::Open) => self.progress(id),
            Ok(Verdict::Accepted) => {
                let answer = format!("OK {}\n", stream.key.guest_port);
                // The socket is new and the line short: it fits unless the client has left. Then what it sent still counts.
                if socket::write(&stream.socket, answer.as_bytes()).ok() != Some(answer.len()) {
                    stream.connection.host_receives_no_more();
                }
                self.progress(id);
            }
            Ok(Verdict::Finished) => {
                self.push_reset(header.reset());
                self.guest_leaves(id);
            }
            Ok(Verdict::Reset) => self.guest_leaves(id),
            Err(_violation) => {
                self.counters.violations += 1;
                self.push_reset(header.reset());
                self.remove(id);
            }
        }
    }

    /// The guest asks for the host's port.
    fn accept_guest(&mut self, key: Key, header: &Header) {
        let id = self.new_id();
        let Ok(socket) = self.hand_over(key.host_port, id) else {
            self.counters.refused += 1;
            self.push_reset(header.reset());
            return;
        };
        let Header { flags, buf_alloc, fwd_cnt, .. } = *header;
        let connection = Connection::by_guest(&Segment { op: Op::Request, flags, buf_alloc, fwd_cnt });
        // A guest that uses the name again no longer waits for the reset of what bore it before.
        self.resets.retain(|reset| {
            (reset.src_port, reset.dst_port, reset.src_cid, reset.kind)
                != (key.host_port, key.guest_port, HOST_CID, TYPE_STREAM)
        });
        self.insert(id, key, connection, socket);
    }

    /// Gives a connection to `port` to the client that accepts; our end is watched under `id`.
    fn hand_over(&mut self, port: u32, id: u64) -> io::Result<OwnedFd> {
        if self.streams.len() >= MAX_STREAMS {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let accepter = self.accepter.as_mut().ok_or(io::ErrorKind::ConnectionRefused)?;
        let (ours, theirs) = socket::pair()?;
        epoll::add(&self.epoll, &ours, EventData::new_u64(id), everything())?;
        accepter(port, theirs.as_fd())?;
        Ok(ours)
    }

    /// Connects `stream`, which must not block, to the guest's port. It is told `OK port\n` if the guest accepts, and closed if it refuses or
    /// does not answer in time.
    pub fn connect_host(&mut self, stream: OwnedFd, guest_port: u32, now: Instant) -> io::Result<()> {
        if self.streams.len() >= MAX_STREAMS {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let id = self.new_id();
        self.watch(&stream, id)?;
        self.insert_by_host(id, stream, guest_port, now);
        Ok(())
    }

    fn insert_by_host(&mut self, id: u64, stream: OwnedFd, guest_port: u32, now: Instant) {
        let key = Key { host_port: self.new_host_port(guest_port), guest_port };
        let connection = Connection::by_host(now);
        if let Some(until) = connection.deadline() {
            self.arm(until, now);
        }
        self.insert(id, key, connection, stream);
        if let Some(stream) = self.streams.get_mut(&id) {
            // What was written before it was watched, or behind a request line, is not announced again.
            stream.readable = true;
        }
    }

    /// Whether [`Muxer::to_guest`] may have a packet.
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.queue.is_empty()
    }

    /// The next packet for the guest. Its payload, of the length that the header says, is put in `room`, which must not be empty.
    pub fn to_guest(&mut self, room: &mut [u8], now: Instant) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(id) = self.queue.pop_front() {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.queued = false;
            let packet = stream.next_packet(room, now);
            let (key, deadline) = (stream.key, stream.connection.deadline());
            if let Some(deadline) = deadline {
                self.arm(deadline, now);
            }
            self.enqueue(id);
            if let Some((segment, len)) = packet {
                return Some(Header {
                    len,
                    op: segment.op as u16,
                    flags: segment.flags,
                    buf_alloc: segment.buf_alloc,
                    fwd_cnt: segment.fwd_cnt,
                    ..self.header(key)
                });
            }
        }
        None
    }

    /// Serves the sockets that are ready and the deadlines that have passed.
    pub fn poll(&mut self, now: Instant) -> io::Result<()> {
        let mut events = Vec::with_capacity(ROUND);
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&at_once)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut fired = false;
        for epoll::Event { flags, data } in events {
            match data.u64() {
                LISTENER => self.listener_ready = true,
                TIMER => fired = true,
                id if self.clients.contains_key(&id) => self.greet(id, now),
                id => self.socket_event(id, flags),
            }
        }
        if fired || self.timer_at.is_some_and(|at| at <= now) {
            self.timer_at = None;
            self.expire(now);
        }
        self.accept_clients(now);
        Ok(())
    }

    fn socket_event(&mut self, id: u64, flags: EventFlags) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        if gone {
            // Both directions are shut: the peer is gone, or it has said its last word after we said ours.
            stream.connection.host_receives_no_more();
        }
        stream.readable |= gone || flags.intersects(EventFlags::IN | EventFlags::RDHUP);
        self.progress(id);
    }

    fn accept_clients(&mut self, now: Instant) {
        while self.listener_ready && self.clients.len() < MAX_GREETINGS {
            // An error means that descriptors are short: try again at the next event, when some may have been closed.
            let Ok(accepted) = self.listener.accept() else { break };
            let Some(socket) = accepted else {
                self.listener_ready = false;
                break;
            };
            let id = self.new_id();
            if self.watch(&socket, id).is_ok() {
                let until = now + GREETING_TIMEOUT;
                self.clients.insert(id, Client { greeting: Greeting::new(socket), until });
                self.arm(until, now);
            }
        }
    }

    fn greet(&mut self, id: u64, now: Instant) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        match client.greeting.read() {
            Greeted::Later => {}
            Greeted::Never => drop(self.clients.remove(&id)),
            Greeted::Connect(guest_port) => {
                if let Some(client) = self.clients.remove(&id)
                    && self.streams.len() < MAX_STREAMS
                {
                    self.insert_by_host(id, client.greeting.stream, guest_port, now);
                }
            }
        }
    }

    /// Ends everything whose time is over, and sets the timer for what comes next.
    fn expire(&mut self, now: Instant) {
        self.clients.retain(|_, client| client.until > now);
        let late = |stream: &Stream| {
            !stream.guest_left && stream.connection.deadline().is_some_and(|until| until <= now)
        };
        let expired: Vec<u64> =
            self.streams.iter().filter(|(_, stream)| late(stream)).map(|(id, _)| *id).collect();
        for id in expired {
            let Some(stream) = self.streams.get(&id) else { continue };
            let reset = Header { op: Op::Reset as u16, ..self.header(stream.key) };
            self.push_reset(reset);
            self.remove(id);
        }
        let waiting = self.streams.values().filter(|stream| !stream.guest_left);
        let deadlines = waiting.filter_map(|stream| stream.connection.deadline());
        if let Some(next) = deadlines.chain(self.clients.values().map(|client| client.until)).min() {
            self.arm(next, now);
        }
    }

    /// Makes sure that the timer fires at `at` or earlier.
    fn arm(&mut self, at: Instant, now: Instant) {
        if self.timer_at.is_some_and(|armed| armed <= at) {
            return;
        }
        // Zero would disarm it.
        let wait = at.saturating_duration_since(now).max(Duration::from_millis(1));
        let it_value = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        // It cannot fail with a valid time; if it did, the next event would bring the deadline.
        if timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value })
            .is_ok()
        {
            self.timer_at = Some(at);
        }
    }

    /// Moves the stream on after anything happened to it: bytes to the socket, its shutdowns, its place in the queue.
    fn progress(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.flush();
        if stream.guest_left && stream.connection.held().is_empty() {
            self.remove(id);
        } else {
            self.enqueue(id);
        }
    }

    fn enqueue(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.guest_left {
            return;
        }
        if stream.readable {
            stream.connection.starved();
        }
        let has_packet =
            stream.connection.has_control() || stream.readable && stream.connection.may_send() > 0;
        if has_packet && !std::mem::replace(&mut stream.queued, true) {
            self.queue.push_back(id);
        }
    }

    /// The guest has forgotten the stream. What it sent before still belongs to the host.
    fn guest_leaves(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.guest_left = true;
        let (key, queued) = (stream.key, std::mem::take(&mut stream.queued));
        self.by_key.remove(&key);
        if queued {
            self.queue.retain(|queued| *queued != id);
        }
        self.progress(id);
    }

    fn insert(&mut self, id: u64, key: Key, connection: Connection, socket: OwnedFd) {
        let stream = Stream {
            key,
            connection,
            socket,
            readable: false,
            queued: false,
            guest_left: false,
            write_shut: false,
            read_shut: false,
        };
        self.streams.insert(id, stream);
        self.by_key.insert(key, id);
        self.enqueue(id);
    }

    /// Forgets the stream and closes its socket, which also ends its being watched.
    fn remove(&mut self, id: u64) {
        let Some(stream) = self.streams.remove(&id) else { return };
        if !stream.guest_left {
            self.by_key.remove(&stream.key);
        }
        if stream.queued {
            self.queue.retain(|queued| *queued != id);
        }
    }

    fn push_reset(&mut self, reset: Header) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(reset);
        } else {
            self.counters.resets_lost += 1;
        }
    }

    fn watch(&self, socket: &OwnedFd, id: u64) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, socket, EventData::new_u64(id), everything())?)
    }

    /// Never used before, so that an event of a closed socket cannot be taken for another's.
    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn new_host_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let host_port = self.next_host_port;
            self.next_host_port = host_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            // Ends, as there are fewer streams than ports.
            if !self.by_key.contains_key(&Key { host_port, guest_port }) {
                return host_port;
            }
        }
    }

    fn header(&self, key: Key) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: TYPE_STREAM,
            ..Header::default()
        }
    }
}

fn everything() -> EventFlags {
    EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET
}

impl Stream {
    /// The next packet and the length of its payload, which is put in `room`.
    fn next_packet(&mut self, room: &mut [u8], now: Instant) -> Option<(Segment, u32)> {
        if let Some(segment) = self.connection.next_control(now) {
            return Some((segment, 0));
        }
        if !self.readable {
            return None;
        }
        let allowed = usize::try_from(self.connection.may_send()).unwrap_or(usize::MAX).min(room.len());
        let room = room.get_mut(..allowed).filter(|room| !room.is_empty())?;
        match socket::read(&self.socket, room) {
            Read::Bytes(count) => {
                // No truncation: the count is at most what may_send gave.
                let count = count as u32;
                return Some((self.connection.send(count), count));
            }
            Read::Later => self.readable = false,
            Read::End => {
                self.readable = false;
                self.connection.host_sends_no_more();
            }
            Read::Broken => {
                self.readable = false;
                self.connection.host_sends_no_more();
                self.connection.host_receives_no_more();
            }
        }
        Some((self.connection.next_control(now)?, 0))
    }

    /// Gives the socket what it takes of what is held for it, and then the ends that the guest has declared.
    fn flush(&mut self) {
        while !self.connection.held().is_empty() {
            match socket::write(&self.socket, self.connection.held()) {
                Ok(0) => break,
                Ok(count) => self.connection.forward(count),
                Err(_) => self.connection.host_receives_no_more(),
            }
        }
        // Either fails only if the peer is gone, and that is an event of its own.
        if self.connection.delivered_all() && !std::mem::replace(&mut self.write_shut, true) {
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
        if self.connection.guest_is_deaf() && !std::mem::replace(&mut self.read_shut, true) {
            let _ = shutdown(&self.socket, Shutdown::Read);
        }
    }
}
