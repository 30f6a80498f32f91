//! Remembers what was decided about a datagram's first fragment, for those that follow: they carry no ports.
//!
//! One table for each place frames come from, so that one sliver's fragments can neither push out nor be taken for another's. Entries
//! live for [`LIFETIME`]; a full table forgets its oldest. Fragments that overtake their first one are lost.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::time::Duration;

use super::Time;
use super::packet::Packet;

/// As long as Linux waits for a datagram's fragments.
pub const LIFETIME: Duration = Duration::from_secs(30);

/// What makes fragments belong together (RFC 791).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    id: u16,
}

impl Key {
    fn of(packet: &Packet) -> Self {
        Self {
            source: packet.source,
            destination: packet.destination,
            protocol: packet.protocol,
            id: packet.id,
        }
    }
}

/// A bounded table of decisions.
#[derive(Debug)]
pub struct Fragments<V> {
    capacity: usize,
    decisions: HashMap<Key, (V, Time)>,
    /// Keys by age. A key decided again stays in its place, so it may be forgotten early, never late.
    order: VecDeque<Key>,
}

impl<V: Copy> Fragments<V> {
    /// Remembers at most `capacity` datagrams.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, decisions: HashMap::new(), order: VecDeque::new() }
    }

    /// The first fragment was decided.
    pub fn decided(&mut self, now: Time, packet: &Packet, decision: V) {
        let key = Key::of(packet);
        if self.decisions.insert(key, (decision, now + LIFETIME)).is_none() {
            self.order.push_back(key);
        }
        while self.order.len() > self.capacity {
            if let Some(oldest) = self.order.pop_front() {
                self.decisions.remove(&oldest);
            }
        }
    }

    /// What was decided about the first fragment of the same datagram.
    pub fn decision(&self, now: Time, packet: &Packet) -> Option<V> {
        self.decisions.get(&Key::of(packet)).filter(|(_, until)| now < *until).map(|(decision, _)| *decision)
    }

    /// Forgets decisions that no longer hold.
    pub fn retain(&mut self, holds: impl Fn(V) -> bool) {
        self.decisions.retain(|_, (decision, _)| holds(*decision));
        self.order.retain(|key| self.decisions.contains_key(key));
    }
}
