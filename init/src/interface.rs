//! The machine's network interface: which it is, and its configuration from a lease.

use std::{net::Ipv4Addr, path::Path};

use crate::{
    dhcp::Lease,
    error::{self, Result},
    netlink::{Link, Netlink, Route, TABLE_MAIN},
};

/// The machine's NIC: the first Ethernet interface, in order of names, that a device driver made. Bridges, TAPs and
/// the like have no device.
///
/// # Errors
/// When the kernel refuses to list interfaces.
pub fn find_nic(netlink: &mut Netlink) -> Result<Option<Link>> {
    let has_device = |name: &str| Path::new("/sys/class/net").join(name).join("device").exists();
    let nics = netlink.links()?.into_iter().filter(|l| l.ethernet && l.mac.is_some() && has_device(&l.name));
    Ok(nics.min_by(|a, b| natural(&a.name).cmp(&natural(&b.name))))
}

/// `eth2` before `eth10`, `sdb` before `sdaa`.
pub fn natural(name: &str) -> (String, u64, String) {
    let digits = name.find(|c: char| c.is_ascii_digit()).unwrap_or(name.len());
    let (letters, rest) = name.split_at_checked(digits).unwrap_or((name, ""));
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (number, rest) = rest.split_at_checked(end).unwrap_or((rest, ""));
    let letters = format!("{:03}{letters}", letters.len());
    (letters, number.parse().unwrap_or(0), rest.to_owned())
}

/// Gives an interface the lease's address and the default route, instead of what it had.
///
/// # Errors
/// When the kernel refuses.
pub fn configure(netlink: &mut Netlink, index: u32, lease: &Lease) -> Result<()> {
    netlink.delete_addresses(index)?;
    netlink.add_address(index, lease.address, lease.prefix_len)?;
    let Some(gateway) = lease.gateway else { return Ok(()) };
    let destination = (Ipv4Addr::UNSPECIFIED, 0);
    // A gateway outside of the prefix is legal, and usual at some hosters.
    let onlink = !same_network(lease.address, gateway, lease.prefix_len);
    let gateway = Some(gateway);
    netlink.add_route(&Route { table: TABLE_MAIN, destination, gateway, index, onlink, scope_link: false })
}

/// Writes `/etc/resolv.conf`.
///
/// # Errors
/// When it cannot be written.
pub fn write_resolv_conf(dns: &[Ipv4Addr]) -> Result<()> {
    std::fs::create_dir_all("/etc").ok();
    let lines: String = dns.iter().map(|server| format!("nameserver {server}\n")).collect();
    error::write("/etc/resolv.conf", lines)
}

fn same_network(a: Ipv4Addr, b: Ipv4Addr, prefix_len: u8) -> bool {
    let differ = u32::from(a) ^ u32::from(b);
    differ.leading_zeros() >= u32::from(prefix_len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_names_as_people_do() {
        let mut names = ["eth10", "eth2", "sdaa", "sdb", "nvme1n1", "nvme0n1", "enp0s3"];
        names.sort_by_key(|n| natural(n));
        assert_eq!(names, ["enp0s3", "eth2", "eth10", "sdb", "nvme0n1", "nvme1n1", "sdaa"]);
    }

    #[test]
    fn knows_networks() {
        let a = |d| Ipv4Addr::new(10, 0, 2, d);
        assert!(same_network(a(1), a(255), 24));
        assert!(!same_network(a(1), a(255), 25));
        assert!(same_network(a(7), a(7), 32) && !same_network(a(7), a(6), 32));
        assert!(same_network(a(7), Ipv4Addr::new(200, 0, 0, 1), 0));
    }
}
