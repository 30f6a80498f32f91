//! A DHCP client (RFC 2131) for one interface.
//!
//! [`Machine`] is the protocol: a function of time (a [`Duration`] since any fixed moment) and datagrams, without a
//! clock or a socket. [`Session`] gives it both. Servers are not believed more than needed: an answer must be for this
//! client's transaction and hardware address, and what it offers must make sense.
//!
//! ```text
//! Selecting ──offer──► Requesting ──ack──► Bound ──T1──► Renewing ──T2──► Rebinding ──end──► Selecting
//!     ▲                    │ nak, 4 tries    ▲              │ ack            │ ack, nak: Selecting
//!     └────────────────────┘                 └──────────────┴────────────────┘
//! ```

mod session;
pub mod wire;

use std::{net::Ipv4Addr, time::Duration};

pub use session::{Change, Session};
use wire::{Message, kind, option};

/// Retransmission starts with this pause and doubles (RFC 2131, 4.1) …
const FIRST_PAUSE: Duration = Duration::from_secs(4);
/// … up to this,
const LONGEST_PAUSE: Duration = Duration::from_secs(64);
/// give or take a second.
const JITTER_MS: u64 = 1_000;
/// Requests for an offer before starting over.
const REQUESTS: u32 = 4;
/// Renewals are not sent more often (RFC 2131, 4.4.5).
const LEAST_RENEWAL_PAUSE: Duration = Duration::from_secs(60);
/// Leases shorter than this are taken to be this long.
const LEAST_LEASE: Duration = Duration::from_secs(60);
/// Leases longer than this, and infinite ones, are taken to be this long: the timers stay within what clocks hold.
const LONGEST_LEASE: Duration = Duration::from_secs(10 * 365 * 86_400);
/// More name servers than this are not kept.
const MAX_DNS: usize = 3;

/// What a server gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix.
    pub prefix_len: u8,
    /// The first router.
    pub gateway: Option<Ipv4Addr>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// The server.
    pub server: Ipv4Addr,
    /// How long it holds.
    pub duration: Duration,
    /// When to ask this server to renew it.
    pub renew: Duration,
    /// When to ask any server.
    pub rebind: Duration,
}

/// What the machine wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send this datagram to port 67.
    Send {
        /// The limited broadcast address, or the server's.
        to: Ipv4Addr,
        /// The datagram.
        bytes: Vec<u8>,
    },
    /// The lease holds from now on. Told once for a new one, not for a renewal that changes nothing.
    Bound(Lease),
    /// The address must not be used any more.
    Lost,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Selecting,
    Requesting { offer: Lease, tries: u32 },
    Bound { lease: Lease, since: Duration },
    Renewing { lease: Lease, since: Duration },
    Rebinding { lease: Lease, since: Duration },
}

/// The protocol.
#[derive(Debug, Clone)]
pub struct Machine {
    mac: [u8; 6],
    state: State,
    transaction: u32,
    /// When the transaction began.
    began: Duration,
    /// When the request that an acknowledgement answers was sent: leases count from then (RFC 2131, 4.4.1).
    asked: Duration,
    pause: Duration,
    deadline: Duration,
    random: u64,
}

impl Machine {
    /// A client for this hardware address that starts at `now`. `seed` should be random: transactions must differ.
    pub fn new(mac: [u8; 6], seed: u64, now: Duration) -> Self {
        Self {
            mac,
            state: State::Selecting,
            transaction: 0,
            began: now,
            asked: now,
            pause: FIRST_PAUSE,
            deadline: now,
            random: seed | 1,
        }
    }

    /// When [`Machine::on_time`] wants to be called at the latest.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Does what is due.
    pub fn on_time(&mut self, now: Duration) -> Vec<Output> {
        if now < self.deadline {
            return vec![];
        }
        match self.state.clone() {
            State::Selecting => {
                if self.transaction == 0 {
                    self.begin(now);
                }
                self.wait_doubling(now);
                vec![self.discover(now)]
            }
            State::Requesting { tries, .. } if tries >= REQUESTS => self.restart(now),
            State::Requesting { offer, tries } => {
                self.wait_doubling(now);
                let request = self.request(now, &offer);
                self.state = State::Requesting { offer, tries: tries + 1 };
                vec![request]
            }
            State::Bound { lease, since } => {
                self.state = State::Renewing { lease, since };
                self.renew(now)
            }
            State::Renewing { lease, since } if now >= since + lease.rebind => {
                self.state = State::Rebinding { lease, since };
                self.renew(now)
            }
            State::Rebinding { lease, since } if now >= since + lease.duration => {
                let mut outputs = vec![Output::Lost];
                outputs.extend(self.restart(now));
                outputs
            }
            State::Renewing { .. } | State::Rebinding { .. } => self.renew(now),
        }
    }

    /// Takes a datagram that came to port 68. What is not for this client or makes no sense changes nothing.
    pub fn on_datagram(&mut self, now: Duration, datagram: &[u8]) -> Vec<Output> {
        let Some(message) = self.answer(datagram) else { return vec![] };
        match (self.state.clone(), message.kind()) {
            (State::Selecting, kind::OFFER) => {
                let Some(offer) = lease(&message) else { return vec![] };
                self.pause = FIRST_PAUSE;
                self.wait_doubling(now);
                let request = self.request(now, &offer);
                self.state = State::Requesting { offer, tries: 1 };
                vec![request]
            }
            (State::Requesting { offer, .. }, kind::ACK) => match lease(&message) {
                Some(lease) if lease.address == offer.address => self.bind(lease, None),
                _ => vec![],
            },
            (State::Requesting { .. }, kind::NAK) => self.restart(now),
            (State::Renewing { lease: old, .. } | State::Rebinding { lease: old, .. }, kind::ACK) => {
                match lease(&message) {
                    Some(lease) if lease.address == old.address => self.bind(lease, Some(&old)),
                    _ => vec![],
                }
            }
            (State::Renewing { .. } | State::Rebinding { .. }, kind::NAK) => {
                let mut outputs = vec![Output::Lost];
                outputs.extend(self.restart(now));
                outputs
            }
            _ => vec![],
        }
    }

    /// The lease that is held.
    pub fn lease(&self) -> Option<&Lease> {
        match &self.state {
            State::Bound { lease, .. } | State::Renewing { lease, .. } | State::Rebinding { lease, .. } => {
                Some(lease)
            }
            State::Selecting | State::Requesting { .. } => None,
        }
    }

    fn bind(&mut self, lease: Lease, old: Option<&Lease>) -> Vec<Output> {
        let since = self.asked;
        self.deadline = since + lease.renew;
        let same = old.is_some_and(|old| {
            (old.prefix_len, old.gateway, &old.dns) == (lease.prefix_len, lease.gateway, &lease.dns)
        });
        self.state = State::Bound { lease: lease.clone(), since };
        if same { vec![] } else { vec![Output::Bound(lease)] }
    }

    /// Back to looking for a server, with the next discovery after a pause (a server that refuses must not be flooded).
    fn restart(&mut self, now: Duration) -> Vec<Output> {
        self.state = State::Selecting;
        self.transaction = 0;
        self.pause = FIRST_PAUSE;
        self.wait_doubling(now);
        vec![]
    }

    fn begin(&mut self, now: Duration) {
        // 0 says that there is no transaction.
        self.transaction = (self.next_random() >> 32) as u32 | 1;
        self.began = now;
        self.pause = FIRST_PAUSE;
    }

    fn wait_doubling(&mut self, now: Duration) {
        let jitter = Duration::from_millis(self.next_random() % (2 * JITTER_MS + 1));
        self.deadline = now + self.pause + jitter - Duration::from_millis(JITTER_MS);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// Asks for a renewal, and again after half of what is left of this phase.
    fn renew(&mut self, now: Duration) -> Vec<Output> {
        let (lease, end, to) = match &self.state {
            State::Renewing { lease, since } => (lease.clone(), *since + lease.rebind, lease.server),
            State::Rebinding { lease, since } => {
                (lease.clone(), *since + lease.duration, Ipv4Addr::BROADCAST)
            }
            _ => return vec![],
        };
        let half = end.saturating_sub(now) / 2;
        self.deadline = (now + half.max(LEAST_RENEWAL_PAUSE)).min(end);
        // A transaction of its own for each, so that an answer is known to be to this one: the lease counts from it.
        self.begin(now);
        self.asked = now;
        let bytes = self.renewal(now, &lease);
        vec![Output::Send { to, bytes }]
    }

    fn discover(&self, now: Duration) -> Output {
        let message = self.message(now, kind::DISCOVER);
        Output::Send { to: Ipv4Addr::BROADCAST, bytes: message.encode() }
    }

    fn request(&mut self, now: Duration, offer: &Lease) -> Output {
        self.asked = now;
        let mut message = self.message(now, kind::REQUEST);
        message.options.insert(option::REQUESTED_ADDRESS, offer.address.octets().into());
        message.options.insert(option::SERVER_IDENTIFIER, offer.server.octets().into());
        Output::Send { to: Ipv4Addr::BROADCAST, bytes: message.encode() }
    }

    /// RFC 2131, 4.3.2: the address goes into `ciaddr`, and neither option 50 nor 54 is sent.
    fn renewal(&self, now: Duration, lease: &Lease) -> Vec<u8> {
        let mut message = self.message(now, kind::REQUEST);
        message.client = Some(lease.address);
        message.broadcast = false;
        message.encode()
    }

    fn message(&self, now: Duration, kind: u8) -> Message {
        let wanted = [option::SUBNET_MASK, option::ROUTER, option::DOMAIN_NAME_SERVER, option::LEASE_TIME];
        let identifier = [&[1], &self.mac[..]].concat();
        Message {
            transaction: self.transaction,
            seconds: u16::try_from(now.saturating_sub(self.began).as_secs()).unwrap_or(u16::MAX),
            // There is no address yet to which a unicast answer could come.
            broadcast: true,
            mac: self.mac,
            options: [
                (option::MESSAGE_TYPE, vec![kind]),
                (option::CLIENT_IDENTIFIER, identifier),
                (option::PARAMETER_REQUEST_LIST, wanted.into()),
            ]
            .into(),
            ..Message::default()
        }
    }

    /// Decodes an answer to the present transaction.
    fn answer(&self, datagram: &[u8]) -> Option<Message> {
        let message = Message::decode(datagram)?;
        let ours = message.reply
            && message.transaction == self.transaction
            && self.transaction != 0
            && message.mac == self.mac;
        ours.then_some(message)
    }

    /// xorshift64: jitter and transaction numbers need no better.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

/// What an offer or an acknowledgement gives, if it makes sense.
fn lease(message: &Message) -> Option<Lease> {
    let usable = |a: &Ipv4Addr| {
        !a.is_unspecified()
            && !a.is_loopback()
            && !a.is_multicast()
            && !a.is_broadcast()
            && a.octets()[0] < 240
    };
    let address = message.yours.filter(usable)?;
    let server = message.address(option::SERVER_IDENTIFIER)?;
    let prefix_len = match message.address(option::SUBNET_MASK) {
        Some(mask) => {
            let bits = u32::from(mask);
            let length = bits.leading_ones();
            // A mask with holes, or one that makes the whole world neighbours.
            if length == 0 || bits.checked_shl(length).unwrap_or(0) != 0 {
                return None;
            }
            u8::try_from(length).ok()?
        }
        // RFC 1122, 3.3.6: without a mask, the class's.
        None => match address.octets()[0] {
            0..128 => 8,
            128..192 => 16,
            _ => 24,
        },
    };
    let seconds = |code| message.number(code).map(|s| Duration::from_secs(s.into()));
    let duration = seconds(option::LEASE_TIME)?.clamp(LEAST_LEASE, LONGEST_LEASE);
    // RFC 2131, 4.4.5: T1 is half of the lease and T2 seven eighths, unless the server says otherwise.
    let sensible = |t: &Duration, end| *t >= LEAST_LEASE / 4 && *t < end;
    let rebind =
        seconds(option::REBINDING_TIME).filter(|t| sensible(t, duration)).unwrap_or(duration * 7 / 8);
    let renew = seconds(option::RENEWAL_TIME).filter(|t| sensible(t, rebind)).unwrap_or(rebind * 4 / 7);
    let gateway = message.addresses(option::ROUTER).find(usable);
    let dns = message.addresses(option::DOMAIN_NAME_SERVER).filter(usable).take(MAX_DNS).collect();
    Some(Lease { address, prefix_len, gateway, dns, server, duration, renew, rebind })
}

#[cfg(test)]
mod dhcp_test;
