//! One stream between a guest's port and a host's Unix socket, as a state machine without I/O: packets from the guest, bytes to and
//! from the socket, and time go in; packets for the guest, bytes for the socket, and verdicts come out.
//!
//! ```text
//!  by_host ──► Requesting ── RESPONSE ──► Established ── both directions told closed ──► Ending ── RST or deadline ──► gone
//!                  │ deadline, RST                ▲   └── guest: SHUTDOWN(both) or RST ──────────────────────────────► gone
//!                  ▼                              │
//!                 gone             by_guest ──────┘ (RESPONSE pending)
//! ```
//!
//! Invariants:
//! * at most [`BUF_ALLOC`] bytes from the guest are held, whatever it sends; a guest that exceeds its credit is a violator;
//! * no more bytes are sent to the guest than its credit allows;
//! * the host's bytes are not held at all: they wait in the Unix socket until there is both credit and a receive descriptor, so the
//!   end of the host's stream is only seen, and told, after its last byte was sent;
//! * "gone" for the guest does not end the stream for the host: what is held is still [`Connection::held`] and must be written first.
//!
//! All counters are bytes modulo 2^32, as on the wire.

use std::collections::VecDeque;
use std::num::Wrapping;
use std::time::{Duration, Instant};

use super::packet::{Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// The receive buffer that the guest is promised for each stream, bytes.
pub const BUF_ALLOC: u32 = 64 * 1024;
/// How long the guest may take to answer a REQUEST.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the guest may take to answer SHUTDOWN(both) by RST before it gets one. Linux's driver waits as long.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// The part of a packet that concerns one stream; its addresses and payload are elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// What it says.
    pub op: Op,
    /// SHUTDOWN flags.
    pub flags: u32,
    /// Size of the sender's receive buffer.
    pub buf_alloc: u32,
    /// Bytes the sender took out of its receive buffer so far.
    pub fwd_cnt: u32,
}

/// What a packet from the guest meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The stream goes on.
    Open,
    /// The guest accepted the host's request.
    Accepted,
    /// The guest is done with the stream and waits for a RST.
    Finished,
    /// The guest has forgotten the stream already.
    Reset,
}

/// A packet that no honest driver sends; the answer is RST.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The operation makes no sense now.
    #[error("{0:?} out of turn")]
    OutOfTurn(Op),
    /// Data after SHUTDOWN(SEND).
    #[error("data after the guest said that it would send no more")]
    DataAfterShutdown,
    /// More data than promised.
    #[error("{excess} bytes more than the guest had credit for")]
    CreditExceeded {
        /// How much more.
        excess: usize,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Requesting { until: Instant },
    Established,
    Ending { until: Instant },
}

/// Packets to send as soon as there is a descriptor. Flags, so that no flood of causes makes a flood of packets.
#[derive(Debug, Clone, Copy, Default)]
struct Pending {
    open: Option<Op>,
    credit_update: bool,
    credit_request: bool,
}

/// One stream.
#[derive(Debug)]
pub struct Connection {
    phase: Phase,
    pending: Pending,

    // Guest to host.
    held: VecDeque<u8>,
    /// Bytes taken out of `held` so far.
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest was last told.
    told_forwarded: Wrapping<u32>,
    /// SHUTDOWN flags the guest has sent.
    guest_closed: u32,

    // Host to guest.
    sent: Wrapping<u32>,
    /// Bytes the guest took out of its buffer, as it last told.
    guest_forwarded: Wrapping<u32>,
    guest_alloc: u32,
    credit_requested: bool,
    /// SHUTDOWN flags that hold for the host's side, and those the guest was told.
    host_closed: u32,
    told_closed: u32,
}

impl Connection {
    /// A stream the guest asked for by `request` and the host has accepted.
    pub fn by_guest(request: &Segment) -> Self {
        let mut connection = Self::new(Phase::Established, Op::Response);
        connection.guest_alloc = request.buf_alloc;
        connection
    }

    /// A stream the host asks for.
    pub fn by_host(now: Instant) -> Self {
        Self::new(Phase::Requesting { until: now + CONNECT_TIMEOUT }, Op::Request)
    }

    fn new(phase: Phase, open: Op) -> Self {
        Self {
            phase,
            pending: Pending { open: Some(open), ..Pending::default() },
            held: VecDeque::new(),
            forwarded: Wrapping(0),
            told_forwarded: Wrapping(0),
            guest_closed: 0,
            sent: Wrapping(0),
            guest_forwarded: Wrapping(0),
            guest_alloc: 0,
            credit_requested: false,
            host_closed: 0,
            told_closed: 0,
        }
    }

    /// A packet from the guest, with its payload.
    pub fn receive(&mut self, segment: &Segment, payload: &[u8]) -> Result<Verdict, Violation> {
        match (self.phase, segment.op) {
            (_, Op::Reset) => return Ok(Verdict::Reset),
            (Phase::Requesting { .. }, Op::Response) if self.pending.open.is_none() => {
                self.phase = Phase::Established;
                self.learn_credit(segment);
                return Ok(Verdict::Accepted);
            }
            (Phase::Requesting { .. }, op) | (_, op @ (Op::Request | Op::Response)) => {
                return Err(Violation::OutOfTurn(op));
            }
            (Phase::Established | Phase::Ending { .. }, _) => {}
        }
        self.learn_credit(segment);
        match segment.op {
            Op::Data => self.receive_data(payload)?,
            Op::CreditRequest => self.pending.credit_update = true,
            Op::Shutdown => return Ok(self.receive_shutdown(segment.flags)),
            Op::CreditUpdate | Op::Request | Op::Response | Op::Reset => {}
        }
        Ok(Verdict::Open)
    }

    fn receive_data(&mut self, payload: &[u8]) -> Result<(), Violation> {
        if self.guest_closed & SHUTDOWN_SEND != 0 {
            return Err(Violation::DataAfterShutdown);
        }
        let room = (BUF_ALLOC as usize).saturating_sub(self.held.len());
        if payload.len() > room {
            return Err(Violation::CreditExceeded { excess: payload.len() - room });
        }
        self.held.extend(payload);
        if self.host_closed & SHUTDOWN_RECEIVE != 0 {
            // Sent before the guest could know that nobody listens any more.
            self.forward(self.held.len());
        }
        Ok(())
    }

    fn receive_shutdown(&mut self, flags: u32) -> Verdict {
        self.guest_closed |= flags & SHUTDOWN_BOTH;
        if self.guest_closed & SHUTDOWN_RECEIVE != 0 {
            // Nothing that the host still writes can be delivered: its side of the stream ends here.
            self.host_closed |= SHUTDOWN_SEND;
        }
        if self.guest_closed == SHUTDOWN_BOTH { Verdict::Finished } else { Verdict::Open }
    }

    fn learn_credit(&mut self, segment: &Segment) {
        let advance = Wrapping(segment.fwd_cnt) - self.guest_forwarded;
        // A count ahead of what was sent is a lie; one behind an earlier count is stale (a driver may stamp two packets and queue
        // them in the other order). Modulo 2^32 both look alike, and neither is news.
        if advance <= self.in_flight() {
            self.guest_forwarded += advance;
            self.guest_alloc = segment.buf_alloc;
        }
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    fn in_flight(&self) -> Wrapping<u32> {
        self.sent - self.guest_forwarded
    }

    fn credit(&self) -> u32 {
        self.guest_alloc.saturating_sub(self.in_flight().0)
    }

    /// Whether [`Connection::next_control`] has something to say.
    pub fn has_control(&self) -> bool {
        match self.phase {
            Phase::Requesting { .. } => self.pending.open.is_some(),
            Phase::Established => {
                self.pending.open.is_some()
                    || self.pending.credit_update
                    || self.pending.credit_request
                    || self.closing() != self.told_closed
            }
            Phase::Ending { .. } => false,
        }
    }

    /// The next packet without payload for the guest.
    pub fn next_control(&mut self, now: Instant) -> Option<Segment> {
        if let Some(op) = self.pending.open.take() {
            return Some(self.segment(op, 0));
        }
        if self.phase != Phase::Established {
            return None;
        }
        let closing = self.closing();
        if closing != self.told_closed {
            self.told_closed = closing;
            if closing == SHUTDOWN_BOTH {
                self.phase = Phase::Ending { until: now + CLOSE_TIMEOUT };
            }
            return Some(self.segment(Op::Shutdown, closing));
        }
        if std::mem::take(&mut self.pending.credit_update) {
            return Some(self.segment(Op::CreditUpdate, 0));
        }
        if std::mem::take(&mut self.pending.credit_request) {
            return Some(self.segment(Op::CreditRequest, 0));
        }
        None
    }

    /// SHUTDOWN flags the guest should know. When each side has said its last word and the host has got all of it, nothing is left
    /// to receive either, and the stream ends without waiting for someone to close a socket.
    fn closing(&self) -> u32 {
        if self.host_closed & SHUTDOWN_SEND != 0 && self.delivered_all() {
            SHUTDOWN_BOTH
        } else {
            self.host_closed
        }
    }

    /// How many of the host's bytes may be sent to the guest now.
    pub fn may_send(&self) -> u32 {
        let open = self.phase == Phase::Established && self.host_closed & SHUTDOWN_SEND == 0;
        if open { self.credit() } else { 0 }
    }

    /// The host has bytes, but [`Connection::may_send`] is 0: asks a stingy driver for credit, once.
    pub fn starved(&mut self) {
        let open = self.phase == Phase::Established && self.host_closed & SHUTDOWN_SEND == 0;
        if open && self.credit() == 0 && !self.credit_requested {
            self.credit_requested = true;
            self.pending.credit_request = true;
        }
    }

    /// `count` bytes of the host, at most [`Connection::may_send`], go to the guest: the header to go with them.
    pub fn send(&mut self, count: u32) -> Segment {
        debug_assert!(count <= self.may_send());
        self.sent += count;
        self.segment(Op::Data, 0)
    }

    fn segment(&mut self, op: Op, flags: u32) -> Segment {
        // Every packet carries the credit, so every packet is an update.
        self.told_forwarded = self.forwarded;
        self.pending.credit_update = false;
        Segment { op, flags, buf_alloc: BUF_ALLOC, fwd_cnt: self.forwarded.0 }
    }

    /// Bytes that the host should get, first part first.
    pub fn held(&self) -> &[u8] {
        let (first, second) = self.held.as_slices();
        if first.is_empty() { second } else { first }
    }

    /// The host has got `count` of the bytes held.
    pub fn forward(&mut self, count: usize) {
        let count = count.min(self.held.len());
        self.held.drain(..count);
        if self.held.is_empty() {
            // An idle stream costs no memory.
            self.held = VecDeque::new();
        }
        // No truncation: held never exceeds BUF_ALLOC.
        self.forwarded += count as u32;
        // Soon enough that a steady sender never waits, late enough that not each packet is answered by one. A guest out of
        // credit has BUF_ALLOC bytes untold, so it always hears of them.
        if (self.forwarded - self.told_forwarded).0 >= BUF_ALLOC / 4 && self.guest_closed & SHUTDOWN_SEND == 0
        {
            self.pending.credit_update = true;
        }
    }

    /// Whether the guest has said that it sends no more, and all it sent is forwarded: the host should see the end.
    pub fn delivered_all(&self) -> bool {
        self.guest_closed & SHUTDOWN_SEND != 0 && self.held.is_empty()
    }

    /// Whether the guest has said that it will receive no more: the host should not write.
    pub fn guest_is_deaf(&self) -> bool {
        self.guest_closed & SHUTDOWN_RECEIVE != 0
    }

    /// The host sends no more: the end of its stream was read.
    pub fn host_sends_no_more(&mut self) {
        self.host_closed |= SHUTDOWN_SEND;
    }

    /// The host receives no more: what is held for it is lost.
    pub fn host_receives_no_more(&mut self) {
        self.host_closed |= SHUTDOWN_RECEIVE;
        self.forward(self.held.len());
    }

    /// Whether the host still receives.
    pub fn host_receives(&self) -> bool {
        self.host_closed & SHUTDOWN_RECEIVE == 0
    }

    /// Whether the guest has not answered the host's request yet.
    pub fn is_requesting(&self) -> bool {
        matches!(self.phase, Phase::Requesting { .. })
    }

    /// When the guest's time to answer is over and the stream is to be reset.
    pub fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Requesting { until } | Phase::Ending { until } => Some(until),
            Phase::Established => None,
        }
    }
}
