//! The CD's own way to PLC: the first NIC, an address by DHCP, name servers.

use std::time::{Duration, Instant};

use commonage_init::{dhcp::Session, interface, netlink::Netlink, say};

use crate::{
    ME,
    boot::Devices,
    error::{Error, Result},
};

/// Switches take a few seconds to agree on a speed, some many more until they forward.
const CARRIER: Duration = Duration::from_secs(15);
/// Long enough for four discoveries (4 + 8 + 16 + 32 s).
const DHCP: Duration = Duration::from_secs(60);

/// Brings the network up. The lease is not renewed: the CD is done long before.
pub fn bring_up(devices: &mut Devices) -> Result<()> {
    let mut netlink = Netlink::open()?;
    let lo = netlink.link_index("lo")?;
    netlink.set_up(lo)?;
    let nic = devices.wait_for(|| interface::find_nic(&mut netlink))?.ok_or(Error::NoNic)?;
    netlink.set_up(nic.index)?;
    if !netlink.wait_running(nic.index, Instant::now() + CARRIER)? {
        say!(ME, "warning: {} has no carrier; is the cable plugged in?", nic.name);
    }
    let mut dhcp = Session::start(&nic.name, nic.mac.ok_or(Error::NoNic)?)?;
    let lease = dhcp.acquire(&nic.name, DHCP)?;
    interface::configure(&mut netlink, nic.index, &lease)?;
    interface::write_resolv_conf(&lease.dns)?;
    let gateway = lease.gateway.map_or("no gateway".into(), |g| format!("gateway {g}"));
    say!(
        ME,
        "{} has {}/{}, {gateway}, name servers {:?}",
        nic.name,
        lease.address,
        lease.prefix_len,
        lease.dns
    );
    Ok(())
}
