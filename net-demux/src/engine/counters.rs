//! A counter for each reason a frame is dropped.

use std::collections::BTreeMap;

macro_rules! reasons {
    ($($(#[doc = $doc:literal])* $variant:ident = $name:literal,)*) => {
        /// Why a frame was dropped.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Reason { $($(#[doc = $doc])* $variant,)* }

        impl Reason {
            /// Every reason.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// What operators and tenants read.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

reasons! {
    /// Lengths or versions contradict each other.
    Malformed = "malformed",
    /// Longer than 1514 bytes.
    Oversize = "oversize",
    /// IPv6 from a sliver.
    Ipv6 = "ipv6",
    /// Neither IP nor ARP, from a sliver.
    EtherType = "ether-type",
    /// A source MAC address that is not the sliver's.
    ForeignMac = "foreign-mac",
    /// A source address that is not the node's.
    ForeignSource = "foreign-source",
    /// A source port that is not the sliver's.
    PortNotOwned = "port-not-owned",
    /// An echo identifier that another sliver uses.
    IcmpIdTaken = "icmp-id-taken",
    /// More echo identifiers at once than a sliver may use.
    IcmpIdsExhausted = "icmp-ids-exhausted",
    /// An ICMP error about a packet the sliver cannot have received from there.
    IcmpErrorNotOwned = "icmp-error-not-owned",
    /// An ICMP message slivers don't send.
    IcmpType = "icmp-type",
    /// Neither TCP, UDP nor ICMP.
    Protocol = "protocol",
    /// A source-route option, or options nobody can read.
    SourceRoute = "source-route",
    /// A destination slivers don't send to: not a unicast address, or one of the link's or machine's own.
    Destination = "destination",
    /// A later fragment whose first one was not seen, or not allowed.
    FragmentWithoutFirst = "fragment-without-first",
    /// ARP for something else than the gateway.
    ArpNotGateway = "arp-not-gateway",
    /// The node has no address yet.
    NoAddress = "no-address",
    /// Outside the prefix, and there is no gateway.
    NoRoute = "no-route",
    /// Nobody answers for the next hop.
    NeighbourUnreachable = "neighbour-unreachable",
    /// Too many frames or next hops wait for an answer.
    NeighbourQueueFull = "neighbour-queue-full",
    /// The sliver does not take its frames.
    RingFull = "ring-full",
    /// The sliver's machine broke the ring's rules.
    RingBroken = "ring-broken",
    /// The NIC took no more.
    NicFull = "nic-full",
    /// The host took no more.
    HostFull = "host-full",
    /// For another machine on the link.
    NotForUs = "not-for-us",
    /// From outside, with the node's own address as source.
    Martian = "martian",
    /// For a sliver, but sent to the whole link.
    LinkBroadcast = "link-broadcast",
    /// From the host, with a source port or identifier that a sliver owns, or about one.
    HostPortOwned = "host-port-owned",
}

/// Counters.
#[derive(Debug, Clone)]
pub struct Drops([u64; Reason::ALL.len()]);

impl Default for Drops {
    fn default() -> Self {
        Self([0; Reason::ALL.len()])
    }
}

impl Drops {
    /// Counts one frame.
    pub fn count(&mut self, reason: Reason) {
        self.0[reason as usize] += 1;
    }

    /// Frames dropped for this reason.
    #[cfg(test)]
    pub fn get(&self, reason: Reason) -> u64 {
        self.0[reason as usize]
    }

    /// The reasons that occurred, by name.
    pub fn named(&self) -> BTreeMap<String, u64> {
        Reason::ALL
            .iter()
            .map(|&r| (r.name().to_owned(), self.0[r as usize]))
            .filter(|(_, n)| *n > 0)
            .collect()
    }
}
