//! The host's own place on the network.
//!
//! The NIC has no address; net-demux takes its frames and gives the host those that are no sliver's, through the TAP
//! `host0`, which has the NIC's MAC and the address that DHCP gives. The TAP is persistent: net-demux may die and come
//! back without the host losing its address.

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
    netlink::{Link, Netlink},
    say, tap,
};
use serde::Serialize;

use crate::{ME, bring_up::Devices};

/// The host's interface.
pub const HOST: &str = "host0";
/// Where the node manager learns the address.
pub const HOST_JSON: &str = "/run/commonage/host.json";

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
        interface::write_resolv_conf(&lease.dns)?;
        let (address, prefix_len, gateway) = (lease.address, lease.prefix_len, lease.gateway);
        write_host_json(Path::new(HOST_JSON), &HostJson { address, prefix_len, gateway, dns: &lease.dns })?;
        self.address = Some(address);
        Ok(())
    }
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
}
