//! One boot, phase by phase:
//!
//! ```text
//! modules ─► configuration ─► network ─► facts ─► boot request ─► verify ─► clock ─► script (partition, install, kexec)
//! ```
//!
//! Each phase leaves what it made in place, and finds it right the next time: starting over is always safe.

use std::time::{Duration, Instant};

use commonage_init::{clock, error as files, modules::Modules, mounts, say, uevent::Uevents};
use commonage_nodemgr_api::Bytes;
use commonage_plc_api::boot::{BootRequest, NodeConfig};
use commonage_plc_client::Client;
use jiff::SignedDuration;

use crate::{
    ME, clock_floor,
    error::{Error, Result},
    facts, network, script,
};

/// Who this node is and whom it believes. Put on the CD when it is made for the node.
pub const NODE_CONFIG: &str = "/etc/commonage/node.json";

/// Devices are looked for this long.
const DEVICES: Duration = Duration::from_secs(20);

/// Tells which phase begins.
pub type Phase<'a> = &'a mut dyn FnMut(&'static str);

/// Boots up to the point where the next kernel is loaded and all is unmounted.
pub async fn boot(phase: Phase<'_>) -> Result<()> {
    phase("mounts");
    mounts::mount_api()?;

    phase("modules");
    let mut devices = Devices::open()?;
    devices.modules.coldplug().iter().for_each(|e| say!(ME, "warning: {e}"));
    // ext4 asks for its checksum by itself, where nobody can answer: it must be there before.
    for module in ["crc32c", "ext4"] {
        devices.modules.load(module).unwrap_or_else(|e| say!(ME, "warning: {e}"));
    }

    phase("configuration");
    let text = files::read(NODE_CONFIG).map_err(|e| Error::Config(e.to_string()))?;
    let config: NodeConfig = serde_json::from_str(&text).map_err(|e| Error::Config(e.to_string()))?;
    say!(ME, "this is node {} of {}", config.node, config.plc);

    phase("network");
    network::bring_up(&mut devices)?;

    phase("facts");
    let facts = facts::gather();
    say!(
        ME,
        "{} CPUs ({}, {}), {} MiB, {} disks, {}",
        facts.cpus,
        facts.cpu_model,
        if facts.virtualisation.is_empty() { "no hardware virtualisation" } else { &facts.virtualisation },
        facts.memory_mib,
        facts.disks.len(),
        facts.firmware
    );
    if facts.virtualisation.is_empty() {
        say!(
            ME,
            "warning: without hardware virtualisation this node cannot run slivers; enable it in the firmware's setup"
        );
    }

    phase("boot request");
    clock_floor::raise(&config.cert_pem)?;
    let client = Client::for_node(&config)?;
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(|e| Error::io("read random bytes", e.into()))?;
    let request = BootRequest { node: config.node.clone(), nonce: Bytes(nonce.into()), facts };
    let asked = Instant::now();
    let response = client.boot(&request).await?;

    phase("verify");
    let elapsed = SignedDuration::try_from(asked.elapsed()).unwrap_or(SignedDuration::MAX);
    let (script, grant) = response.verify(&config, &nonce, elapsed)?;
    say!(ME, "release {}, granted until {}", script.get().release, grant.expires);

    phase("clock");
    let now = grant.now.saturating_add(elapsed).unwrap_or(grant.now);
    clock::set(now.into())?;
    // The next kernel takes its time from there. A machine without that clock goes on; its time is then wrong until
    // somebody sets it.
    clock::save_to_hardware().unwrap_or_else(|e| say!(ME, "warning: {e}"));

    script::run(&script, text.as_bytes(), &client, &mut devices, phase).await
}

/// Drivers, and the announcements of what they find.
pub struct Devices {
    modules: Modules,
    uevents: Uevents,
}

impl Devices {
    fn open() -> Result<Self> {
        Ok(Self { uevents: Uevents::open()?, modules: Modules::open()? })
    }

    /// Waits, loading drivers, until `found` finds something.
    pub fn wait_for<T>(
        &mut self,
        found: impl FnMut() -> commonage_init::Result<Option<T>>,
    ) -> Result<Option<T>> {
        let told = |e| say!(ME, "warning: {e}");
        let deadline = Instant::now() + DEVICES;
        Ok(commonage_init::uevent::wait_for(&self.uevents, &mut self.modules, deadline, told, found)?)
    }
}
