//! The sliver's network: the node's own address, of which only some ports are this sliver's.
//!
//! The kernel delivers what goes to the shared address locally only when the destination port is one of ours; anything else for
//! that address leaves by `eth0`, where the node hands it to whichever sliver, or the host, owns the port. So the local table, which
//! the kernel asks first, is asked by port instead.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use commonage_init::error::{Result, write};
use commonage_init::netlink::{Netlink, Route, Rule, TABLE_LOCAL, TABLE_MAIN};
use commonage_nodemgr_api::guest::GATEWAY;
use commonage_nodemgr_api::http::PortGrant;

/// The sliver's interface.
const INTERFACE: &str = "eth0";
/// Routes for our own address with a port that is not ours.
const TABLE_OTHERS: u32 = 100;
/// Everywhere.
const ANYWHERE: (Ipv4Addr, u8) = (Ipv4Addr::UNSPECIFIED, 0);

/// IP protocol numbers.
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Brings the loopback interface up.
///
/// # Errors
/// The kernel refuses.
pub fn bring_up_loopback() -> Result<()> {
    let mut netlink = Netlink::open()?;
    let lo = netlink.link_index("lo")?;
    netlink.set_up(lo)
}

/// Configures the interface, the routes and the rules. May be repeated.
///
/// # Errors
/// There is no interface, or the kernel refuses.
pub fn configure(address: Ipv4Addr, ports: &PortGrant) -> Result<()> {
    for (name, value) in sysctls(ports) {
        write(format!("/proc/sys/net/{name}"), value)?;
    }
    let mut netlink = Netlink::open()?;
    let index = netlink.link_index(INTERFACE)?;
    netlink.set_up(index)?;
    netlink.add_address(index, address, 32)?;
    let (gateway, mac) = GATEWAY;
    netlink.add_neighbour(index, gateway, mac)?;
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
    for rule in rules(address, ports) {
        netlink.add_rule(&rule)?;
    }
    // Only now, when the local table is asked by another rule.
    netlink.delete_rule(0)
}

fn sysctls(ports: &PortGrant) -> Vec<(String, String)> {
    let mut all = vec![("ipv4/ip_local_port_range".to_owned(), format!("{} {}", ports.first, ports.last))];
    // The node shares an IPv4 address only; what IPv6 would say on the link by itself is dropped.
    all.push((format!("ipv6/conf/{INTERFACE}/disable_ipv6"), "1".to_owned()));
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
    rules.push(Rule { priority: 30, table: TABLE_LOCAL, ..Rule::default() });
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
            (30, false, None, None, None, TABLE_LOCAL),
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
