//! Who owns which port and which ICMP echo identifier: three flat tables of 65,536 entries, one look-up a packet.
//!
//! Invariant: a port or identifier has one owner at any time; 0, the host, owns what nobody was given. Identifiers are not granted but
//! claimed by a sliver's first echo request, at most [`IDS_PER_SLIVER`] at once; one that was idle for [`ID_IDLE`] may be taken by another.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use commonage_net_demux_api::control::{PortGrant, SliverId};

use super::Time;

/// Echo identifiers a sliver may hold at once.
pub const IDS_PER_SLIVER: usize = 64;

/// An identifier unused for so long may change hands.
pub const ID_IDLE: Duration = Duration::from_secs(60);

/// When a sliver holds all it may, its own identifier unused for so long makes way for a new one.
const OWN_ID_IDLE: Duration = Duration::from_secs(2);

/// Owns what no sliver owns.
pub const HOST: SliverId = SliverId(0);

/// Which table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    Tcp,
    Udp,
    Icmp,
}

/// Why ports were not granted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// A port belongs to another.
    #[error("{protocol} port {port} belongs to sliver {}: detach it first or grant another port", holder.0)]
    Held {
        /// "TCP" or "UDP".
        protocol: &'static str,
        port: u16,
        holder: SliverId,
    },
    /// The block is empty or contains port 0.
    #[error(
        "the port block {first}-{last} is not one: give a first port of at least 1 and a last port not below it"
    )]
    Block { first: u16, last: u16 },
    /// Port 0 cannot be owned.
    #[error("port 0 cannot be granted")]
    Zero,
}

/// Why an identifier was not claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClaimError {
    /// Another sliver uses it.
    Taken,
    /// The sliver holds as many as it may.
    Exhausted,
}

/// The tables.
#[derive(Debug)]
pub struct Owners {
    tcp: Box<[u32]>,
    udp: Box<[u32]>,
    icmp: Box<[u32]>,
    /// Per sliver, its identifiers and when each was last used.
    claims: HashMap<SliverId, BTreeMap<u16, Time>>,
}

impl Default for Owners {
    fn default() -> Self {
        let table = || vec![HOST.0; 1 << 16].into_boxed_slice();
        Self { tcp: table(), udp: table(), icmp: table(), claims: HashMap::new() }
    }
}

impl Owners {
    /// The owner of a port or identifier.
    pub fn get(&self, table: Table, number: u16) -> SliverId {
        let table = match table {
            Table::Tcp => &self.tcp,
            Table::Udp => &self.udp,
            Table::Icmp => &self.icmp,
        };
        SliverId(table[usize::from(number)])
    }

    /// Gives `sliver` exactly these ports instead of those it has, or, on error, changes nothing.
    pub fn grant(
        &mut self,
        sliver: SliverId,
        old: Option<&PortGrant>,
        new: &PortGrant,
    ) -> Result<(), GrantError> {
        if new.first == 0 || new.last < new.first {
            return Err(GrantError::Block { first: new.first, last: new.last });
        }
        if new.tcp.contains(&0) || new.udp.contains(&0) {
            return Err(GrantError::Zero);
        }
        for (protocol, table, port) in ports(new) {
            let holder = self.get(table, port);
            if holder != HOST && holder != sliver {
                return Err(GrantError::Held { protocol, port, holder });
            }
        }
        if let Some(old) = old {
            self.set(old, HOST);
        }
        self.set(new, sliver);
        Ok(())
    }

    /// Gives a sliver's ports and identifiers back to the host.
    pub fn release(&mut self, sliver: SliverId, grant: &PortGrant) {
        self.set(grant, HOST);
        for id in self.claims.remove(&sliver).unwrap_or_default().into_keys() {
            self.icmp[usize::from(id)] = HOST.0;
        }
    }

    /// Notes that a sliver sends an echo request with this identifier, and makes it its own if it may.
    pub fn claim(&mut self, now: Time, sliver: SliverId, id: u16) -> Result<(), ClaimError> {
        let holder = self.get(Table::Icmp, id);
        if holder != sliver && holder != HOST {
            let theirs = self.claims.entry(holder).or_default();
            if theirs.get(&id).is_some_and(|&used| now < used + ID_IDLE) {
                return Err(ClaimError::Taken);
            }
            theirs.remove(&id);
        }
        let mine = self.claims.entry(sliver).or_default();
        if holder != sliver && mine.len() >= IDS_PER_SLIVER {
            let oldest = mine.iter().min_by_key(|(_, used)| **used).map(|(&id, &used)| (id, used));
            let Some((oldest, _)) = oldest.filter(|(_, used)| now >= *used + OWN_ID_IDLE) else {
                // The other's idle claim may be gone by now; so must be its entry in the table.
                self.icmp[usize::from(id)] = HOST.0;
                return Err(ClaimError::Exhausted);
            };
            mine.remove(&oldest);
            self.icmp[usize::from(oldest)] = HOST.0;
        }
        mine.insert(id, now);
        self.icmp[usize::from(id)] = sliver.0;
        Ok(())
    }

    fn set(&mut self, grant: &PortGrant, owner: SliverId) {
        for (_, table, port) in ports(grant) {
            let table = if table == Table::Tcp { &mut self.tcp } else { &mut self.udp };
            table[usize::from(port)] = owner.0;
        }
    }
}

fn ports(grant: &PortGrant) -> impl Iterator<Item = (&'static str, Table, u16)> {
    let block = || grant.first..=grant.last;
    let tcp = block().chain(grant.tcp.iter().copied()).map(|port| ("TCP", Table::Tcp, port));
    let udp = block().chain(grant.udp.iter().copied()).map(|port| ("UDP", Table::Udp, port));
    tcp.chain(udp)
}

#[cfg(test)]
mod test {
    use super::*;

    fn grant(first: u16, last: u16) -> PortGrant {
        PortGrant { first, last, tcp: [80].into(), udp: [53].into() }
    }

    #[test]
    fn conflicts_name_port_and_holder_and_change_nothing() {
        let mut owners = Owners::default();
        owners.grant(SliverId(7), None, &grant(20000, 20063)).unwrap();
        let error = owners.grant(SliverId(8), None, &grant(20064, 20127)).unwrap_err();
        assert_eq!(error, GrantError::Held { protocol: "TCP", port: 80, holder: SliverId(7) });
        assert_eq!(
            error.to_string(),
            "TCP port 80 belongs to sliver 7: detach it first or grant another port"
        );
        assert_eq!(owners.get(Table::Udp, 20064), HOST);
        owners.release(SliverId(7), &grant(20000, 20063));
        owners.grant(SliverId(8), None, &grant(20000, 20063)).unwrap();
        assert_eq!(owners.get(Table::Tcp, 80), SliverId(8));
        assert_eq!(owners.get(Table::Udp, 80), HOST);
    }

    #[test]
    fn a_new_grant_replaces_the_old_one() {
        let mut owners = Owners::default();
        owners.grant(SliverId(7), None, &grant(20000, 20063)).unwrap();
        owners.grant(SliverId(7), Some(&grant(20000, 20063)), &grant(20032, 20095)).unwrap();
        assert_eq!(owners.get(Table::Tcp, 20000), HOST);
        assert_eq!(owners.get(Table::Tcp, 20095), SliverId(7));
    }

    #[test]
    fn refuses_blocks_that_are_none() {
        let mut owners = Owners::default();
        assert!(matches!(owners.grant(SliverId(1), None, &grant(5, 4)), Err(GrantError::Block { .. })));
        assert!(matches!(owners.grant(SliverId(1), None, &grant(0, 4)), Err(GrantError::Block { .. })));
        let zero = PortGrant { udp: [0].into(), ..grant(1, 2) };
        assert_eq!(owners.grant(SliverId(1), None, &zero), Err(GrantError::Zero));
    }

    #[test]
    fn identifiers_change_hands_only_when_idle() {
        let mut owners = Owners::default();
        let at = Duration::from_secs;
        owners.claim(at(0), SliverId(1), 5).unwrap();
        assert_eq!(owners.claim(at(59), SliverId(2), 5), Err(ClaimError::Taken));
        owners.claim(at(60), SliverId(2), 5).unwrap();
        assert_eq!(owners.get(Table::Icmp, 5), SliverId(2));
        assert_eq!(owners.claim(at(61), SliverId(1), 5), Err(ClaimError::Taken));
    }

    #[test]
    fn a_sliver_holds_a_bounded_number_of_identifiers() {
        let mut owners = Owners::default();
        for id in 0..IDS_PER_SLIVER as u16 {
            owners.claim(Duration::from_millis(id.into()), SliverId(1), id).unwrap();
        }
        assert_eq!(owners.claim(Duration::from_millis(100), SliverId(1), 999), Err(ClaimError::Exhausted));
        owners.claim(Duration::from_secs(3), SliverId(1), 999).unwrap();
        assert_eq!(owners.get(Table::Icmp, 0), HOST, "the one unused for longest made way");
        assert_eq!(owners.get(Table::Icmp, 999), SliverId(1));
        assert_eq!(owners.get(Table::Icmp, 1), SliverId(1));
    }
}
