//! The sliver's network: the node's own address, of which only some ports are this sliver's.
//!
//! The kernel delivers what goes to the shared address locally only when the destination port is one of ours; anything else for
//! that address leaves by `eth0`, where the node hands it to whichever sliver, or the host, owns the port. So the local table, which
//! the kernel asks first, is asked by port instead.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt as _;

use commonage_init::error::{Context as _, Result, write};
use commonage_init::netlink::{Netlink, Route, Rule, TABLE_LOCAL, TABLE_MAIN};
use commonage_nodemgr_api::guest::GATEWAY;
use commonage_nodemgr_api::http::PortGrant;

/// The sliver's interface.
const INTERFACE: &str = "eth0";
/// The ports that the kernel itself chooses from.
const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// Routes for our own address with a port that is not ours.
const TABLE_OTHERS: u32 = 100;
/// Everywhere.
const ANYWHERE: (Ipv4Addr, u8) = (Ipv4Addr::UNSPECIFIED, 0);

/// Asks the local table, when no rule about a port has matched.
const LOCAL_LAST: Rule =
    Rule { priority: 30, destination: None, iif: None, ip_protocol: None, dport: None, table: TABLE_LOCAL };

/// IP protocol numbers.
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Everything that no identity is needed for, done: the interfaces are up, though without an address, so that nothing is sent.
pub struct Network {
    netlink: Netlink,
    index: u32,
    port_range: File,
}

impl Network {
    /// Brings the interfaces up and lays the routes that all slivers have.
    ///
    /// # Errors
    /// There is no interface, or the kernel refuses.
    pub fn prepare() -> Result<Self> {
        // First of all, or the kernel would look for its IPv6 neighbours as soon as the interface is up.
        for (name, value) in sysctls() {
            write(format!("/proc/sys/net/{name}"), value)?;
        }
        let port_range =
            File::options().write(true).open(PORT_RANGE).what(|| format!("open {PORT_RANGE} for writing"))?;
        let mut netlink = Netlink::open()?;
        let lo = netlink.link_index("lo")?;
        netlink.set_up(lo)?;
        let index = netlink.link_index(INTERFACE)?;
        netlink.set_up(index)?;
        let (gateway, _) = GATEWAY;
        let to_gateway = Route {
            table: TABLE_MAIN,
            destination: (gateway, 32),
            gateway: None,
            index,
            onlink: false,
            scope_link: true,
        };
        netlink.add_route(&to_gateway)?;
        for table in [TABLE_MAIN, TABLE_OTHERS] {
            let default = Route {
                table,
                destination: ANYWHERE,
                gateway: Some(gateway),
                index,
                onlink: true,
                scope_link: false,
            };
            netlink.add_route(&default)?;
        }
        netlink.add_rule(&LOCAL_LAST)?;
        // Only now, when the local table is asked by another rule.
        netlink.delete_rule(0)?;
        Ok(Self { netlink, index, port_range })
    }

    /// Gives the interface its addresses, and the rules to the ports. May be repeated.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn configure(&mut self, mac: [u8; 6], address: Ipv4Addr, ports: &PortGrant) -> Result<()> {
        let range = format!("{} {}", ports.first, ports.last);
        self.port_range
            .write_all_at(range.as_bytes(), 0)
            .what(|| format!("write {range} to {PORT_RANGE}"))?;
        // Before the neighbour: the kernel forgets all of them when the interface's own address changes.
        self.netlink.set_mac(self.index, mac)?;
        let (gateway, gateway_mac) = GATEWAY;
        self.netlink.add_neighbour(self.index, gateway, gateway_mac)?;
        for rule in rules(address, ports) {
            self.netlink.add_rule(&rule)?;
        }
        self.netlink.add_address(self.index, address, 32)
    }
}

fn sysctls() -> Vec<(String, String)> {
    // The node shares an IPv4 address only; what IPv6 would say on the link by itself is dropped.
    let mut all = vec![(format!("ipv6/conf/{INTERFACE}/disable_ipv6"), "1".to_owned())];
    for interface in ["all", INTERFACE] {
        // What another sliver sends comes from our own address, by an interface.
        all.push((format!("ipv4/conf/{interface}/accept_local"), "1".to_owned()));
        all.push((format!("ipv4/conf/{interface}/rp_filter"), "0".to_owned()));
    }
    all
}

fn rules(address: Ipv4Addr, ports: &PortGrant) -> Vec<Rule> {
    let local = |priority, protocol, dport| Rule {
        priority,
        destination: Some((address, 32)),
        ip_protocol: Some(protocol),
        dport,
        table: TABLE_LOCAL,
        ..Rule::default()
    };
    let mut rules = Vec::new();
    for (protocol, exact) in [(TCP, &ports.tcp), (UDP, &ports.udp)] {
        rules.push(local(10, protocol, Some((ports.first, ports.last))));
        rules.extend(ranges(exact).into_iter().map(|range| local(11, protocol, Some(range))));
    }
    rules.push(local(12, ICMP, None));
    rules.push(Rule {
        priority: 20,
        destination: Some((address, 32)),
        iif: Some("lo".to_owned()),
        table: TABLE_OTHERS,
        ..Rule::default()
    });
    rules
}

/// Consecutive ports as ranges, both ends included: one rule each.
fn ranges(ports: &BTreeSet<u16>) -> Vec<(u16, u16)> {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for &port in ports {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(port) => *last = port,
            _ => ranges.push((port, port)),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn own_ports_are_local_and_others_leave() {
        let ports =
            PortGrant { first: 20000, last: 20063, tcp: [8080, 8081, 9000].into(), udp: BTreeSet::new() };
        let address = Ipv4Addr::new(192, 0, 2, 5);
        let told: Vec<_> = rules(address, &ports)
            .into_iter()
            .map(|r| (r.priority, r.destination.is_some(), r.iif, r.ip_protocol, r.dport, r.table))
            .collect();
        let wanted = vec![
            (10, true, None, Some(TCP), Some((20000, 20063)), TABLE_LOCAL),
            (11, true, None, Some(TCP), Some((8080, 8081)), TABLE_LOCAL),
            (11, true, None, Some(TCP), Some((9000, 9000)), TABLE_LOCAL),
            (10, true, None, Some(UDP), Some((20000, 20063)), TABLE_LOCAL),
            (12, true, None, Some(ICMP), None, TABLE_LOCAL),
            (20, true, Some("lo".to_owned()), None, None, TABLE_OTHERS),
        ];
        assert_eq!(told, wanted);
    }

    proptest! {
        #[test]
        fn ranges_hold_exactly_the_ports(ports in prop::collection::btree_set(any::<u16>(), 0..50)) {
            let again: BTreeSet<u16> = ranges(&ports).into_iter().flat_map(|(a, b)| a..=b).collect();
            prop_assert_eq!(again, ports);
        }
    }
}
