//! The host's own place on the network.
//!
//! The NIC has no address; net-demux takes its frames and gives the host those that are no sliver's, through the TAP
//! `host0`, which has the NIC's MAC and the address that DHCP gives. The TAP is persistent: net-demux may die and come
//! back without the host losing its address.
//!
//! The slivers have the same address, and the ports in [`SLIVER_PORTS`] are theirs. What the host sends to one of those at
//! its own address must therefore leave by the TAP, where net-demux finds the sliver, instead of staying on the host.

use std::{
    fs,
    net::Ipv4Addr,
    path::Path,
    time::{Duration, Instant},
};

use commonage_init::{
    Error, Result,
    dhcp::{Change, Lease, Session},
    error as files, interface,
    netlink::{Link, Netlink, Route, Rule, TABLE_LOCAL},
    say, tap,
};
use commonage_nodemgr_api::guest::GATEWAY;
use serde::Serialize;

use crate::{ME, bring_up::Devices};

/// The host's interface.
pub const HOST: &str = "host0";
/// Where the node manager learns the address.
pub const HOST_JSON: &str = "/run/commonage/host.json";

/// Ports that may be slivers', both ends included. Below are the host's services, above its own connections.
pub const SLIVER_PORTS: (u16, u16) = (1024, 60_999);
/// Routes for the host's own address with a port that may be a sliver's.
const TABLE_SLIVERS: u32 = 100;
/// IP protocol numbers.
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Switches take a few seconds to agree on a speed.
const CARRIER: Duration = Duration::from_secs(15);
/// net-demux has this long to open the TAP.
const DEMUX: Duration = Duration::from_secs(20);

/// The node's address as the node manager reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct HostJson<'a> {
    address: Ipv4Addr,
    prefix_len: u8,
    gateway: Option<Ipv4Addr>,
    dns: &'a [Ipv4Addr],
}

/// The host's network.
pub struct HostNetwork {
    netlink: Netlink,
    host: u32,
    dhcp: Option<Session>,
    mac: [u8; 6],
    address: Option<Ipv4Addr>,
}

/// What the node must do about a change.
#[derive(Debug, PartialEq, Eq)]
pub enum Told {
    /// The host has its address.
    Configured(Ipv4Addr),
    /// The node has another address than its slivers were started with.
    Moved(Ipv4Addr),
}

impl HostNetwork {
    /// Prepares the NIC and the TAP. Says which NIC, for net-demux.
    pub fn prepare(devices: &mut Devices) -> Result<(Self, Link)> {
        let mut netlink = Netlink::open()?;
        let lo = netlink.link_index("lo")?;
        netlink.set_up(lo)?;
        let nic = devices.wait_for(|| interface::find_nic(&mut netlink))?;
        let no_nic = || Error::NoLink("with a driver (no Ethernet device at all)".into());
        let nic = nic.ok_or_else(no_nic)?;
        let mac = nic.mac.ok_or_else(no_nic)?;
        netlink.set_up(nic.index)?;
        netlink.set_promiscuous(nic.index)?;

        tap::create_persistent(HOST)?;
        let host = netlink.link_index(HOST)?;
        netlink.set_mac(host, mac)?;
        netlink.set_up(host)?;
        if !netlink.wait_running(nic.index, Instant::now() + CARRIER)? {
            say!(ME, "warning: {} has no carrier; is the cable plugged in?", nic.name);
        }
        Ok((Self { netlink, host, dhcp: None, mac, address: None }, nic))
    }

    /// Starts asking for an address, as soon as net-demux has opened the TAP.
    pub fn start_dhcp(&mut self) -> Result<()> {
        if !self.netlink.wait_running(self.host, Instant::now() + DEMUX)? {
            say!(ME, "warning: net-demux has not opened {HOST} yet");
        }
        self.dhcp = Some(Session::start(HOST, self.mac)?);
        Ok(())
    }

    /// The DHCP client, to wait for.
    pub fn dhcp(&self) -> Option<&Session> {
        self.dhcp.as_ref()
    }

    /// Whether a lease holds.
    pub fn has_address(&self) -> bool {
        self.dhcp.as_ref().is_some_and(Session::has_lease)
    }

    /// Lets the DHCP client do what is due.
    pub fn step(&mut self) -> Result<Vec<Told>> {
        let Some(dhcp) = &mut self.dhcp else { return Ok(vec![]) };
        let mut told = Vec::new();
        for change in dhcp.step()? {
            match change {
                Change::Bound(lease) if self.address.is_some_and(|a| a != lease.address) => {
                    told.push(Told::Moved(lease.address));
                }
                Change::Bound(lease) => {
                    self.configure(&lease)?;
                    told.push(Told::Configured(lease.address));
                }
                Change::Lost => {
                    say!(
                        ME,
                        "warning: the address lease ended; the host has no address until a DHCP server answers"
                    );
                    self.netlink.delete_addresses(self.host)?;
                }
            }
        }
        Ok(told)
    }

    fn configure(&mut self, lease: &Lease) -> Result<()> {
        interface::configure(&mut self.netlink, self.host, lease)?;
        reach_slivers(&mut self.netlink, self.host, lease.address)?;
        interface::write_resolv_conf(&lease.dns)?;
        let (address, prefix_len, gateway) = (lease.address, lease.prefix_len, lease.gateway);
        write_host_json(Path::new(HOST_JSON), &HostJson { address, prefix_len, gateway, dns: &lease.dns })?;
        self.address = Some(address);
        Ok(())
    }
}

/// Lets the host and the slivers talk to each other by the address they share. May be repeated, and must be after the
/// interface lost its addresses: its routes went with them.
fn reach_slivers(netlink: &mut Netlink, host: u32, address: Ipv4Addr) -> Result<()> {
    // What a sliver sends to the host comes from the host's own address.
    files::write(format!("/proc/sys/net/ipv4/conf/{HOST}/accept_local"), "1")?;
    let (gateway, mac) = GATEWAY;
    netlink.add_neighbour(host, gateway, mac)?;
    netlink.add_route(&Route {
        table: TABLE_SLIVERS,
        destination: (Ipv4Addr::UNSPECIFIED, 0),
        gateway: Some(gateway),
        index: host,
        onlink: true,
        scope_link: false,
    })?;
    rules(address).iter().try_for_each(|rule| netlink.add_rule(rule))?;
    // The kernel's own rule asks the local table before any other. Only now, when another rule asks it too.
    netlink.delete_rule(0)
}

/// In which order tables are asked: slivers' ports before the addresses that are delivered here.
fn rules(address: Ipv4Addr) -> Vec<Rule> {
    let to_slivers = |protocol| Rule {
        priority: 10,
        destination: Some((address, 32)),
        // What the host itself sends: what comes in was net-demux's decision.
        iif: Some("lo".into()),
        ip_protocol: Some(protocol),
        dport: Some(SLIVER_PORTS),
        table: TABLE_SLIVERS,
    };
    vec![to_slivers(TCP), to_slivers(UDP), Rule { priority: 30, table: TABLE_LOCAL, ..Rule::default() }]
}

/// Written aside and renamed: the node manager never reads half of it.
fn write_host_json(path: &Path, host: &HostJson<'_>) -> Result<()> {
    let text = serde_json::to_string(host).unwrap_or_default();
    let aside = path.with_extension("part");
    files::write(&aside, text + "\n")?;
    fs::rename(&aside, path).map_err(|source| Error::Io { what: format!("write {}", path.display()), source })
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd as _, process::Command};

    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

    use super::*;

    #[test]
    fn writes_what_the_node_manager_reads() {
        let a = |d| Ipv4Addr::new(10, 0, 2, d);
        let host = HostJson { address: a(15), prefix_len: 24, gateway: Some(a(2)), dns: &[a(3)] };
        assert_eq!(
            serde_json::to_string(&host).unwrap(),
            r#"{"address":"10.0.2.15","prefix_len":24,"gateway":"10.0.2.2","dns":["10.0.2.3"]}"#
        );
    }

    /// A network namespace.
    struct Namespace(String);

    impl Namespace {
        fn ip(arguments: &[&str]) -> String {
            let output = Command::new("ip").args(arguments).output().unwrap();
            assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8_lossy(&output.stdout).into_owned()
        }

        fn new() -> Self {
            let name = format!("node-init-{}", std::process::id());
            Self::ip(&["netns", "add", &name]);
            Self(name)
        }

        /// Runs something in a thread inside.
        fn run(&self, work: impl FnOnce() + Send) {
            let namespace = File::open(format!("/run/netns/{}", self.0)).unwrap();
            let inside = move || {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                work();
            };
            std::thread::scope(|scope| scope.spawn(inside).join().unwrap());
        }
    }

    impl Drop for Namespace {
        fn drop(&mut self) {
            let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
        }
    }

    /// As in a booting node: the address is there, goes, and comes back.
    #[test]
    #[ignore = "needs root (a network namespace) and iproute2"]
    fn the_host_reaches_slivers_by_its_own_address() {
        let namespace = Namespace::new();
        namespace.run(|| {
            let node = Ipv4Addr::new(192, 0, 2, 5);
            let mut netlink = Netlink::open().unwrap();
            let lo = netlink.link_index("lo").unwrap();
            netlink.set_up(lo).unwrap();
            tap::create_persistent(HOST).unwrap();
            let host = netlink.link_index(HOST).unwrap();
            netlink.set_up(host).unwrap();
            for _ in 0..2 {
                netlink.delete_addresses(host).unwrap();
                netlink.add_address(host, node, 24).unwrap();
                reach_slivers(&mut netlink, host, node).unwrap();
                for (protocol, port, by_tap) in [
                    ("tcp", "22", false),
                    ("tcp", "1024", true),
                    ("udp", "20000", true),
                    ("tcp", "60999", true),
                    ("tcp", "61000", false),
                ] {
                    let get = ["-n", &namespace.0, "route", "get", "192.0.2.5", "ipproto", protocol];
                    let route = Namespace::ip(&[&get[..], &["dport", port]].concat());
                    assert_eq!(route.contains("via 169.254.1.1 dev host0"), by_tap, "{port}: {route}");
                    assert_eq!(route.contains("local 192.0.2.5 dev lo"), !by_tap, "{port}: {route}");
                }
            }
        });
    }
}
