//! `nodemgr`: the node manager's process. Reads the command line, puts the parts together, waits for signals.
//!
//! Signals: **SIGTERM** ends the node manager and leaves every sliver running, for the next node manager to take over (an upgrade, a
//! crash's twin). **SIGINT** first saves all slivers, or shuts down gracefully those that cannot be saved (the node is going down), then ends.
//! SIGKILL is like SIGTERM.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Parser;
use commonage_isolation::cgroup::Cgroups;
use commonage_isolation::{Capacity, PortRange};
use commonage_nodemgr::capacity::{self, Said};
use commonage_nodemgr::manager::{Manager, Settings};
use commonage_nodemgr::ssh::{self, HostKey};
use commonage_nodemgr::{host, log};
use commonage_plc_api::boot::NodeConfig;
use tokio::signal::unix::{SignalKind, signal};

/// The node manager: creates slivers and binds resources, called only from slivers on this node.
///
/// SIGTERM ends it and leaves all slivers running; SIGINT saves all slivers first, or shuts them down.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The state partition: database, slivers' disks, SSH host key.
    #[arg(long, default_value = "/state")]
    state: PathBuf,
    /// The image partition: bases (base-NAME.erofs).
    #[arg(long, default_value = "/image")]
    images: PathBuf,
    /// Sockets and what else ends with the node's uptime.
    #[arg(long, default_value = "/run/commonage")]
    run: PathBuf,
    /// The node's own configuration.
    #[arg(long, default_value = "/etc/commonage/node.json")]
    node_config: PathBuf,
    /// The sliver kernel (vmlinux) and initrd (sliver-initrd).
    #[arg(long, default_value = "/usr/lib/commonage")]
    lib: PathBuf,
    /// The machine program.
    #[arg(long, default_value = "/bin/sliver-vmm")]
    vmm: PathBuf,
    /// Makes slivers' file systems.
    #[arg(long, default_value = "/sbin/mke2fs")]
    mke2fs: PathBuf,
    /// Boot every sliver, where most would be clones of a template
    #[arg(long)]
    no_templates: bool,
    /// Where cgroup2 is mounted.
    #[arg(long, default_value = "/sys/fs/cgroup")]
    cgroup_root: PathBuf,
    /// Where the SSH front door listens.
    #[arg(long, default_value = "0.0.0.0:22")]
    ssh: SocketAddr,
    /// Memory for guests, MiB; by default the machine's less 384.
    #[arg(long)]
    memory_mib: Option<u64>,
    /// Disk for slivers, MiB; by default nine tenths of the state partition.
    #[arg(long)]
    disk_mib: Option<u64>,
    /// Outgoing bandwidth that may be guaranteed, bits a second.
    #[arg(long, default_value_t = 1_000_000_000)]
    link_bps: u64,
    /// Processes for slivers; by default the kernel's limit less 1,024.
    #[arg(long)]
    pids: Option<u64>,
    /// First port that blocks are cut from.
    #[arg(long, default_value_t = PortRange::DEFAULT.first)]
    first_port: u16,
    /// Last port that slivers may own; the ports above are the node's own.
    #[arg(long, default_value_t = PortRange::DEFAULT.last)]
    last_port: u16,
}

fn main() -> Result<()> {
    let args = Args::parse();
    log::start()?;
    capacity::raise_descriptors();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run(args))
}

async fn run(args: Args) -> Result<()> {
    // Signals first: from here on none is lost.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let text = std::fs::read(&args.node_config)
        .with_context(|| format!("cannot read {}", args.node_config.display()))?;
    let node: NodeConfig = serde_json::from_slice(&text)
        .with_context(|| format!("{} is damaged", args.node_config.display()))?;
    let ports = PortRange { first: args.first_port, last: args.last_port };
    let said = Said { memory_mib: args.memory_mib, disk_mib: args.disk_mib, pids: args.pids };
    let capacity = capacity::of_machine(&args.state, said, args.link_bps, ports)?;
    let Capacity { memory_mib, disk_mib, .. } = capacity;
    tracing::info!("node {}: {memory_mib} MiB memory, {disk_mib} MiB disk to give", node.node);

    let host_key = HostKey::load_or_create(&args.state.join("ssh_host_ed25519_key"))?;
    let host = host::follow(&args.run)?;
    let cgroups = Cgroups::prepare(&args.cgroup_root)?;
    let settings = Settings {
        node: node.node,
        state: args.state,
        images: args.images,
        run: args.run,
        lib: args.lib,
        node_config: args.node_config,
        vmm: args.vmm,
        mke2fs: args.mke2fs,
        ssh_host_key: host_key.public_openssh(),
        templates: !args.no_templates,
        prefault: true,
    };
    let manager = Manager::open(settings, capacity, Some(cgroups), host)?;
    manager.start().await;

    let front_door = tokio::net::TcpListener::bind(args.ssh).await;
    let front_door = front_door.with_context(|| format!("cannot listen at {} for SSH", args.ssh))?;
    let directory = std::sync::Arc::clone(&manager);
    let mut ssh = tokio::spawn(ssh::serve(front_door, host_key, directory));
    tracing::info!("up; SSH at {}", args.ssh);
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: ending; slivers go on"),
        _ = interrupt.recv() => {
            tracing::info!("SIGINT: saving all slivers");
            manager.power_off().await;
            tracing::info!("all slivers are down");
        }
        ended = &mut ssh => ended.context("the SSH front door's task ended")?.context("the SSH front door closed")?,
    }
    log::flush();
    // Not waiting for tasks that are in the middle of something: every answer that was given is on the disk.
    std::process::exit(0)
}
