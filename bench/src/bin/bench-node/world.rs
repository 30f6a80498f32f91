//! The node around the slivers: a network card with net-demux on it, and a node manager inside this very process.

use std::io::{BufRead as _, BufReader};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use commonage_init::{netlink::Netlink, tap};
use commonage_isolation::cgroup::Cgroups;
use commonage_isolation::{Capacity, PortRange};
use commonage_isolation_api::{NodeId, SliceName};
use commonage_nodemgr::host;
use commonage_nodemgr::manager::{Manager, Settings};
use commonage_vmm_api::{MachineConfig, Start};

use crate::meter;
use crate::places::Places;

/// The host's side of the network.
const HOST: &str = "host0";
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const HOST_JSON: &str = r#"{"address":"10.0.2.15","prefix_len":24,"gateway":"10.0.2.2","dns":["10.0.2.3"]}"#;
/// How long a card may take until it carries frames.
const CARRIER: Duration = Duration::from_secs(10);
/// More than anybody asks for: what slivers really take is what is measured here.
const PLENTY: u64 = 1 << 32;

/// The node, up.
pub struct World {
    /// Where things are.
    pub places: Places,
    /// The node manager.
    pub manager: Arc<Manager>,
    /// One that boots every sliver, to compare. It has no sliver while the other has, because both count users from the same number.
    pub cold: Arc<Manager>,
    demux: Child,
}

impl World {
    /// Brings the network up and opens the node managers. `prefault`: clones copy at once what the first one wrote.
    ///
    /// # Errors
    /// A program or device of the node is missing.
    pub async fn start(places: Places, prefault: bool) -> Result<Self> {
        places.make()?;
        let demux = network(&places)?;
        std::fs::write(places.run.join("host.json"), HOST_JSON).context("cannot write host.json")?;
        let manager = manager_of(&places, true, prefault).await?;
        let cold = manager_of(&places, false, false).await?;
        Ok(Self { places, manager, cold, demux })
    }

    /// Whether a sliver's machine is a clone.
    pub fn is_clone(&self, slice: &SliceName) -> Result<bool> {
        let path = self.manager.paths(slice).machine();
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let config: MachineConfig = serde_json::from_slice(&text)?;
        Ok(matches!(config.start, Start::Restore { .. }))
    }

    /// What the templates take, KiB of memory.
    pub fn templates_kib(&self) -> Result<u64> {
        let directory = self.places.run.join("templates");
        Ok(if directory.exists() { meter::disk(&directory)? / 1024 } else { 0 })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.demux.kill();
        let _ = self.demux.wait();
    }
}

/// The card and the host's TAP, with net-demux between them, ready.
fn network(places: &Places) -> Result<Child> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    let nic = links.iter().find(|l| l.name == places.nic);
    let nic = nic.with_context(|| format!("there is no network card {}", places.nic))?;
    netlink.set_up(nic.index)?;
    netlink.set_promiscuous(nic.index)?;
    tap::create_persistent(HOST)?;
    let host = netlink.link_index(HOST)?;
    netlink.set_mac(host, nic.mac.context("the network card has no address")?)?;
    netlink.set_up(host)?;
    ensure!(
        netlink.wait_running(nic.index, Instant::now() + CARRIER)?,
        "the network card {} has no carrier",
        places.nic
    );
    let mut command = Command::new(&places.net_demux);
    command.args(["--nic", &places.nic, "--tap", HOST, "--control"]).arg(places.run.join("net-demux.sock"));
    let demux = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut demux = demux.with_context(|| format!("cannot run {}", places.net_demux.display()))?;
    let mut said = BufReader::new(demux.stderr.take().context("net-demux's messages are gone")?).lines();
    loop {
        match said.next() {
            Some(line) if line.as_ref().is_ok_and(|l| l.contains("ready: ")) => break,
            Some(line) => eprintln!("{}", line?),
            None => bail!("net-demux ended: {}", demux.wait()?),
        }
    }
    // It must never wait for somebody to read what it says.
    std::thread::spawn(move || said.map_while(Result::ok).for_each(|line| eprintln!("{line}")));
    netlink.add_address(host, ADDRESS, 24)?;
    Ok(demux)
}

/// A node manager, that clones or not. It has not started anything, and knows the slice that may acquire.
async fn manager_of(places: &Places, templates: bool, prefault: bool) -> Result<Arc<Manager>> {
    let state = places.state.join(if templates { "node" } else { "cold" });
    std::fs::create_dir_all(&state).with_context(|| format!("cannot make {}", state.display()))?;
    let capacity = Capacity {
        memory_mib: PLENTY,
        disk_mib: PLENTY,
        link_bps: PLENTY,
        pids: PLENTY,
        ports: PortRange::DEFAULT,
    };
    let node: NodeId = "3f0e4a52-0000-4000-8000-000000000001".parse().map_err(anyhow::Error::msg)?;
    let settings = Settings {
        node,
        state,
        images: places.images.clone(),
        run: places.run.clone(),
        lib: places.lib.clone(),
        node_config: places.run.join("node.json"),
        vmm: places.vmm.clone(),
        mke2fs: places.mke2fs.clone(),
        ssh_host_key: String::new(),
        templates,
        prefault,
    };
    make_group(&places.cgroups)?;
    let host = host::follow(&places.run)?;
    let manager = Manager::open(settings, capacity, Some(Cgroups::prepare(&places.cgroups)?), host)?;
    let kept = manager.keep_agent().await;
    kept.map_err(|e| anyhow::anyhow!("cannot enter the slice that acquires: {e}"))?;
    Ok(manager)
}

fn make_group(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot make the control group {}", path.display()))
}
