//! The demultiplexer's own ARP: which MAC address the next hop of slivers' packets has (RFC 826), and the frames that wait for an answer.
//!
//! Pure: it tells what to ask and what to send. Everything is bounded, and a sliver that walks through the whole prefix spends
//! its own bounds: the gateway's entry is never pushed out.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::time::Duration;

use commonage_net_demux_api::control::SliverId;

use super::Time;
use super::counters::Reason;
use super::packet::Mac;

/// Between two questions.
pub const RETRY: Duration = Duration::from_secs(1);
/// Questions before giving up.
pub const TRIES: u8 = 3;
/// An answer older than this is asked again while it is still used.
pub const FRESH: Duration = Duration::from_secs(60);
/// An answer older than this is no longer used.
pub const KEEP: Duration = Duration::from_secs(120);
/// Frames waiting for one next hop.
pub const QUEUE: usize = 16;
/// Next hops a sliver may be waiting for.
pub const ASKING_PER_SLIVER: usize = 8;
/// Next hops in all, known or asked for.
const CAPACITY: usize = 1024;

#[derive(Debug)]
enum Entry {
    Asking { asker: SliverId, tries: u8, next: Time, queue: VecDeque<(SliverId, Vec<u8>)> },
    Known { mac: Mac, confirmed: Time, asked: Time },
}

/// What to do with a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Resolution {
    /// Send it there; if `ask`, ask again meanwhile.
    Send { mac: Mac, ask: bool },
    /// It waits; if `ask`, ask.
    Waits { ask: bool },
    /// It is dropped.
    Refused(Reason),
}

/// What time brought.
#[derive(Debug, Default)]
pub struct Due {
    /// Ask for these.
    pub ask: Vec<Ipv4Addr>,
    /// A frame of each of these was given up.
    pub lost: Vec<SliverId>,
}

/// The neighbours.
#[derive(Debug, Default)]
pub struct Neighbours {
    entries: HashMap<Ipv4Addr, Entry>,
    gateway: Option<Ipv4Addr>,
    /// Not after the earliest time at which an entry needs attention.
    deadline: Option<Time>,
}

impl Neighbours {
    /// Forgets everything: another address, perhaps another link.
    pub fn reset(&mut self, gateway: Option<Ipv4Addr>) {
        *self = Self { gateway, ..Self::default() };
    }

    /// Where to send a frame for `hop`.
    pub fn resolve(&mut self, now: Time, hop: Ipv4Addr, sliver: SliverId, frame: &[u8]) -> Resolution {
        match self.entries.get_mut(&hop) {
            Some(Entry::Known { mac, confirmed, asked }) if now < *confirmed + KEEP => {
                let ask = now >= *confirmed + FRESH && now >= *asked + RETRY;
                if ask {
                    *asked = now;
                }
                Resolution::Send { mac: *mac, ask }
            }
            Some(Entry::Asking { queue, .. }) => {
                if queue.len() >= QUEUE {
                    return Resolution::Refused(Reason::NeighbourQueueFull);
                }
                queue.push_back((sliver, frame.to_vec()));
                Resolution::Waits { ask: false }
            }
            _ => {
                let gateway = self.gateway == Some(hop);
                let mine = |e: &&Entry| matches!(e, Entry::Asking { asker, .. } if *asker == sliver);
                if !gateway && self.entries.values().filter(mine).count() >= ASKING_PER_SLIVER
                    || !self.make_room(hop)
                {
                    return Resolution::Refused(Reason::NeighbourQueueFull);
                }
                let queue = [(sliver, frame.to_vec())].into();
                self.attend(now + RETRY);
                self.entries.insert(hop, Entry::Asking { asker: sliver, tries: 1, next: now + RETRY, queue });
                Resolution::Waits { ask: true }
            }
        }
    }

    /// `address` said it has `mac`. Known and asked-for addresses are updated, others only noted if `create`. Returns what waited.
    pub fn learn(
        &mut self,
        now: Time,
        address: Ipv4Addr,
        mac: Mac,
        create: bool,
    ) -> VecDeque<(SliverId, Vec<u8>)> {
        let known = Entry::Known { mac, confirmed: now, asked: now };
        self.attend(now + KEEP);
        match self.entries.get_mut(&address) {
            Some(entry) => match std::mem::replace(entry, known) {
                Entry::Asking { queue, .. } => queue,
                Entry::Known { .. } => VecDeque::new(),
            },
            None => {
                if create && self.make_room(address) {
                    self.entries.insert(address, known);
                }
                VecDeque::new()
            }
        }
    }

    /// Retries and gives up.
    pub fn tick(&mut self, now: Time) -> Due {
        let mut due = Due::default();
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return due;
        }
        self.entries.retain(|&hop, entry| match entry {
            Entry::Known { confirmed, .. } => now < *confirmed + KEEP,
            Entry::Asking { next, .. } if now < *next => true,
            Entry::Asking { tries, next, .. } if *tries < TRIES => {
                *tries += 1;
                *next = now + RETRY;
                due.ask.push(hop);
                true
            }
            Entry::Asking { queue, .. } => {
                due.lost.extend(queue.drain(..).map(|(sliver, _)| sliver));
                false
            }
        });
        let deadline = |entry: &Entry| match entry {
            Entry::Asking { next, .. } => *next,
            Entry::Known { confirmed, .. } => *confirmed + KEEP,
        };
        self.deadline = self.entries.values().map(deadline).min();
        due
    }

    /// When [`tick`](Self::tick) may have something to do.
    pub fn deadline(&self) -> Option<Time> {
        self.deadline
    }

    /// A sliver is gone; so is what it waits to send.
    pub fn forget(&mut self, sliver: SliverId) {
        for entry in self.entries.values_mut() {
            if let Entry::Asking { queue, .. } = entry {
                queue.retain(|(owner, _)| *owner != sliver);
            }
        }
    }

    fn attend(&mut self, at: Time) {
        self.deadline = Some(self.deadline.map_or(at, |deadline| deadline.min(at)));
    }

    /// Makes room for one more entry by forgetting the answer confirmed longest ago, if need be.
    fn make_room(&mut self, for_hop: Ipv4Addr) -> bool {
        if self.entries.len() < CAPACITY || self.entries.contains_key(&for_hop) {
            return true;
        }
        let oldest = self
            .entries
            .iter()
            .filter_map(|(hop, entry)| match entry {
                Entry::Known { confirmed, .. } if Some(*hop) != self.gateway => Some((*confirmed, *hop)),
                _ => None,
            })
            .min();
        oldest.is_some_and(|(_, hop)| self.entries.remove(&hop).is_some())
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const HOP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const MAC: Mac = [2, 9, 9, 9, 9, 9];

    fn at(seconds: u64) -> Time {
        Duration::from_secs(seconds)
    }

    #[test]
    fn asks_waits_and_sends_what_waited() {
        let mut n = Neighbours::default();
        assert_eq!(n.resolve(at(0), HOP, SliverId(1), b"a"), Resolution::Waits { ask: true });
        assert_eq!(n.resolve(at(0), HOP, SliverId(2), b"b"), Resolution::Waits { ask: false });
        let waited = n.learn(at(0), HOP, MAC, false);
        assert_eq!(waited, [(SliverId(1), b"a".to_vec()), (SliverId(2), b"b".to_vec())]);
        assert_eq!(n.resolve(at(59), HOP, SliverId(1), b"c"), Resolution::Send { mac: MAC, ask: false });
        assert_eq!(n.resolve(at(60), HOP, SliverId(1), b"c"), Resolution::Send { mac: MAC, ask: true });
        assert_eq!(n.resolve(at(60), HOP, SliverId(1), b"c"), Resolution::Send { mac: MAC, ask: false });
        assert_eq!(n.resolve(at(120), HOP, SliverId(1), b"c"), Resolution::Waits { ask: true });
    }

    #[test]
    fn gives_up_after_its_tries() {
        let mut n = Neighbours::default();
        n.resolve(at(0), HOP, SliverId(1), b"a");
        assert_eq!(n.deadline(), Some(at(1)));
        assert_eq!(n.tick(at(1)).ask, [HOP]);
        assert!(n.tick(at(1)).ask.is_empty());
        assert_eq!(n.tick(at(2)).ask, [HOP]);
        let due = n.tick(at(3));
        assert_eq!((due.ask, due.lost), (vec![], vec![SliverId(1)]));
        assert_eq!(n.deadline(), None);
    }

    #[test]
    fn a_scan_spends_only_the_scanners_bounds() {
        let mut n = Neighbours::default();
        n.reset(Some(HOP));
        let hop = |i: usize| Ipv4Addr::from(0x0a00_0000 + i as u32);
        for i in 0..ASKING_PER_SLIVER {
            assert_eq!(n.resolve(at(0), hop(i), SliverId(1), b"a"), Resolution::Waits { ask: true });
        }
        let refused = Resolution::Refused(Reason::NeighbourQueueFull);
        assert_eq!(n.resolve(at(0), hop(99), SliverId(1), b"a"), refused);
        assert_eq!(n.resolve(at(0), HOP, SliverId(1), b"a"), Resolution::Waits { ask: true });
        assert_eq!(n.resolve(at(0), hop(99), SliverId(2), b"a"), Resolution::Waits { ask: true });
        n.learn(at(0), HOP, MAC, false);
        for i in 0..2 * CAPACITY {
            n.learn(at(1), hop(i), MAC, true);
        }
        assert!(n.entries.len() <= CAPACITY);
        assert_eq!(n.resolve(at(1), HOP, SliverId(1), b"a"), Resolution::Send { mac: MAC, ask: false });
    }

    #[test]
    fn strangers_are_not_learned_from_hearsay() {
        let mut n = Neighbours::default();
        n.learn(at(0), HOP, MAC, false);
        assert_eq!(n.resolve(at(0), HOP, SliverId(1), b"a"), Resolution::Waits { ask: true });
    }
}
