//! From a bare kernel to a machine with drivers, file systems and limits.

use std::time::{Duration, Instant};

use commonage_init::{
    Error, Result, error as files,
    modules::Modules,
    mounts, power, say,
    uevent::{self, Uevents},
};
use commonage_plc_api::boot::NodeConfig;
use rustix::{
    mount::MountFlags,
    process::{Resource, Rlimit, setrlimit},
};

use crate::{ME, host_network::SLIVER_PORTS};

/// Devices are looked for this long.
const DEVICES: Duration = Duration::from_secs(20);
/// What no device asks for.
const MODULES: [&str; 5] = ["crc32c", "ext4", "tun", "button", "evdev"];
/// Open files of the node manager and the machines: several for each sliver.
const OPEN_FILES: u64 = 1 << 20;

/// Drivers, and the announcements of what they find.
pub struct Devices {
    modules: Modules,
    uevents: Uevents,
}

impl Devices {
    /// Loads drivers for what is there and the modules that nothing asks for.
    pub fn open() -> Result<Self> {
        let mut devices = Self { uevents: Uevents::open()?, modules: Modules::open()? };
        devices.modules.coldplug().iter().for_each(|e| say!(ME, "warning: {e}"));
        for module in MODULES.into_iter().chain(kvm()) {
            devices.modules.load(module).unwrap_or_else(|e| say!(ME, "warning: {e}"));
        }
        Ok(devices)
    }

    /// Waits, loading drivers, until `found` finds something.
    pub fn wait_for<T>(&mut self, found: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
        let told = |e| say!(ME, "warning: {e}");
        uevent::wait_for(&self.uevents, &mut self.modules, Instant::now() + DEVICES, told, found)
    }
}

/// The processor's kind of KVM. Without one the node comes up all the same, and can say so.
fn kvm() -> Option<&'static str> {
    let cpuinfo = files::read("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|l| l.starts_with("flags")).unwrap_or_default();
    let has = |flag| flags.split_whitespace().any(|f| f == flag);
    let module = if has("svm") {
        Some("kvm-amd")
    } else if has("vmx") {
        Some("kvm-intel")
    } else {
        None
    };
    if module.is_none() {
        say!(
            ME,
            "warning: this processor has no hardware virtualisation (or the firmware hides it): no sliver can run"
        );
    }
    module
}

/// Mounts the node's two partitions by label: the first state partition, and the image partition beside it.
pub fn mount_partitions(devices: &mut Devices) -> Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
    let state = mount(devices, "commonage-state", None, "/state", flags)?;
    mount(devices, "commonage-image", Some(&state), "/image", flags | MountFlags::RDONLY).map(drop)
}

/// Mounts one; returns the disk it is on.
fn mount(
    devices: &mut Devices,
    label: &str,
    on: Option<&str>,
    target: &str,
    flags: MountFlags,
) -> Result<String> {
    let found = devices.wait_for(|| mounts::partition(label, on))?;
    let missing = || Error::TimedOut(format!("no disk has a partition {label}; boot from the CD to make it"));
    let found = found.ok_or_else(missing)?;
    mounts::mount(&found.device.to_string_lossy(), target, "ext4", flags, "")?;
    say!(ME, "{} is {target}", found.device.display());
    Ok(found.disk)
}

/// Kernel settings, limits that children inherit, and the machine's name.
pub fn settle() -> Result<()> {
    let own_ports = format!("{} 65535", SLIVER_PORTS.1 + 1);
    for (setting, value) in [
        // The host's own outgoing connections: slivers own the ports below.
        ("net/ipv4/ip_local_port_range", own_ports.as_str()),
        // The node speaks IPv4 only; what the demux does not know must not go past it.
        ("net/ipv6/conf/all/disable_ipv6", "1"),
        ("net/ipv6/conf/default/disable_ipv6", "1"),
        // Nobody makes a name for what is not his, in a directory where the host works.
        ("fs/protected_hardlinks", "1"),
        ("fs/protected_symlinks", "1"),
        // A kernel that panics restarts, through the boot CD.
        ("kernel/panic", "10"),
        ("kernel/panic_on_oops", "1"),
    ] {
        files::write(format!("/proc/sys/{setting}"), value).unwrap_or_else(|e| say!(ME, "warning: {e}"));
    }
    let limit = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    setrlimit(Resource::Nofile, limit).unwrap_or_else(|e| say!(ME, "warning: limit of open files: {e}"));
    power::ctrl_alt_del_is_a_signal()
}

/// Who this node is.
pub fn node_config(path: &str) -> Result<NodeConfig> {
    let malformed = |e: serde_json::Error| Error::Malformed { what: path.into(), why: e.to_string() };
    let config: NodeConfig = serde_json::from_str(&files::read(path)?).map_err(malformed)?;
    rustix::system::sethostname(config.node.as_str().as_bytes())
        .unwrap_or_else(|e| say!(ME, "warning: host name: {e}"));
    Ok(config)
}
