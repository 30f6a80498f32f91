//! A node's life: bring up, run, end.
//!
//! ```text
//! mounts ─► modules ─► configuration ─► partitions ─► NIC, TAP ─► net-demux ─► DHCP ─► node manager ─► up … ─► end
//! ```
//!
//! Both services may die at any time; they are started again and find their slivers' machines alive. If the node's own
//! address changes, its slivers have an address that is not theirs any more: the node restarts.

use std::{
    fs,
    os::fd::AsFd as _,
    process::Command,
    time::{Duration, Instant},
};

use commonage_init::{Result, mounts, poll, power::End, say, signals::Signals, supervisor::Supervisor};

use crate::{
    ME, bring_up,
    bring_up::Devices,
    button::Buttons,
    faults::{Faults, Order},
    host_network::{HOST, HostNetwork, Told},
    shut_down,
};

/// The services' names.
pub const DEMUX: &str = "net-demux";
/// The services' names.
pub const MANAGER: &str = "nodemgr";

const RUN: &str = "/run/commonage";
const NODE_CONFIG: &str = "/etc/commonage/node.json";

/// Lives until told to end, and says how.
pub fn run(signals: Signals) -> Result<End> {
    let phase = |name: &str| say!(ME, "phase {name}");
    phase("mounts");
    mounts::mount_api()?;
    mounts::mount_cgroup2()?;
    fs::create_dir_all(RUN).ok();

    phase("modules");
    let mut devices = Devices::open()?;
    bring_up::settle()?;

    phase("configuration");
    let config = bring_up::node_config(NODE_CONFIG)?;
    say!(ME, "this is node {}", config.node);

    phase("partitions");
    bring_up::mount_partitions(&mut devices)?;

    phase("network");
    let (network, nic) = HostNetwork::prepare(&mut devices)?;
    let mut node = Node {
        signals,
        supervisor: Supervisor::default(),
        network,
        buttons: Buttons::open(),
        faults: Faults::open(),
        manager_started: false,
        complain: Instant::now() + COMPLAINTS,
    };
    let mut demux = Command::new("/bin/net-demux");
    demux.args(["--nic", &nic.name, "--tap", HOST, "--control", "/run/commonage/net-demux.sock"]);
    node.supervisor.start(DEMUX, demux, Instant::now())?;
    node.network.start_dhcp()?;
    phase("address");
    let how = node.live()?;
    phase("end");
    shut_down::stop(&mut node.supervisor, &node.signals);
    Ok(how)
}

struct Node {
    signals: Signals,
    supervisor: Supervisor,
    network: HostNetwork,
    buttons: Buttons,
    faults: Faults,
    manager_started: bool,
    /// When to complain next that there is no address.
    complain: Instant,
}

/// Between complaints.
const COMPLAINTS: Duration = Duration::from_secs(60);

impl Node {
    /// The loop.
    fn live(&mut self) -> Result<End> {
        loop {
            for signal in self.signals.read() {
                match signal {
                    libc::SIGINT | libc::SIGTERM => return Ok(End::Restart),
                    libc::SIGUSR1 => return Ok(End::Halt),
                    libc::SIGUSR2 => return Ok(End::PowerOff),
                    _ => {}
                }
            }
            if self.buttons.pressed() {
                say!(ME, "power button");
                return Ok(End::PowerOff);
            }
            for order in self.faults.read() {
                match order {
                    Order::Restart => {
                        say!(ME, "restarting, as ordered");
                        return Ok(End::Restart);
                    }
                    Order::Kill(service) if self.supervisor.kill(&service) => say!(ME, "killed {service}"),
                    Order::Kill(_) => {}
                }
            }
            self.keep_services();
            if let Some(end) = self.keep_address()? {
                return Ok(end);
            }
            let no_address = !self.network.has_address();
            if no_address && self.complain <= Instant::now() {
                say!(ME, "warning: still no address; check the cable and the network's DHCP server");
                self.complain = Instant::now() + COMPLAINTS;
            }
            let dhcp = self.network.dhcp();
            let mut fds = vec![self.signals.as_fd()];
            fds.extend(dhcp.map(|d| d.as_fd()));
            fds.extend(self.buttons.fds());
            fds.extend(self.faults.fd());
            let deadlines =
                [dhcp.map(|d| d.deadline()), self.supervisor.deadline(), no_address.then_some(self.complain)];
            let deadline = deadlines.into_iter().flatten().min();
            poll::wait(&fds, deadline)?;
        }
    }

    fn keep_services(&mut self) {
        for death in self.supervisor.reap(Instant::now()) {
            let again = death
                .again_in
                .map_or(String::new(), |p| format!("; starting it again in {} ms", p.as_millis()));
            say!(ME, "warning: {} ended ({}){again}", death.name, death.status);
        }
        for (name, started) in self.supervisor.restart_due(Instant::now()) {
            match started {
                Ok(()) => say!(ME, "started {name}"),
                Err(e) => say!(ME, "warning: {e}"),
            }
        }
    }

    /// Lets DHCP work. The first address starts the node manager, another one ends the node.
    fn keep_address(&mut self) -> Result<Option<End>> {
        let told = self.network.step().unwrap_or_else(|e| {
            say!(ME, "warning: {e}");
            vec![]
        });
        for told in told {
            match told {
                Told::Moved(address) => {
                    say!(ME, "the node's address is now {address}: restarting, so that all slivers get it");
                    return Ok(Some(End::Restart));
                }
                Told::Configured(address) if !self.manager_started => {
                    self.start_manager()?;
                    self.manager_started = true;
                    say!(ME, "up: {address}");
                }
                Told::Configured(address) => say!(ME, "address {address} is configured again"),
            }
        }
        Ok(None)
    }

    fn start_manager(&mut self) -> Result<()> {
        let mut manager = Command::new("/bin/nodemgr");
        manager.args(["--state", "/state", "--images", "/image", "--run", RUN]);
        manager.args(["--node-config", NODE_CONFIG, "--lib", "/usr/lib/commonage"]);
        manager.env("PATH", "/sbin:/bin");
        self.supervisor.start(MANAGER, manager, Instant::now())
    }
}
