//! net-demux: the node's one network mouth. It holds the NIC's packet socket, the host's TAP and each sliver's ring, and decides by the owner
//! of the port whose each packet is. It keeps nothing on disk: after a restart the node manager attaches everything again.
#![warn(missing_docs)]

mod control;
mod device;
mod engine;
mod say;
mod shell;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use say::say;

/// Demultiplexes the node's one address among its slivers and the host.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// The NIC: up, without an address of its own.
    #[arg(long)]
    nic: String,
    /// The host's TAP: existing, persistent, with the NIC's MAC address.
    #[arg(long)]
    tap: String,
    /// The control socket to make.
    #[arg(long)]
    control: PathBuf,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    let Options { nic: nic_name, tap: tap_name, control: path } = options;
    let nic = device::Nic::open(nic_name).with_context(|| format!("cannot open the NIC {nic_name}"))?;
    if let Err(error) = nic.disable_offloads(nic_name) {
        say!("{nic_name} may join frames, which slivers cannot take: {error}");
    }
    for (path, error) in shell::silence_host_on(nic_name) {
        // Without IPv6 there is nothing to turn off.
        if !(error.kind() == std::io::ErrorKind::NotFound && path.contains("ipv6")) {
            say!("cannot set {path}: {error}: the host may answer for slivers");
        }
    }
    let tap = device::Tap::open(tap_name).with_context(|| format!("cannot open the TAP {tap_name}"))?;
    let listener = control::listen(path).with_context(|| format!("cannot listen at {}", path.display()))?;
    let [a, b, c, d, e, f] = nic.mac;
    let mut shell = shell::Shell::new(nic, tap, listener).context("cannot start")?;
    say!(
        "ready: NIC {nic_name} ({a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}), host {tap_name}, control {}",
        path.display()
    );
    shell.run().with_context(|| format!("lost {nic_name} or {tap_name}"))
}
