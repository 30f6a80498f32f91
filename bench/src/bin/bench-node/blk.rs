//! A guest's disk: sliver-vmm's virtio-blk and QEMU's in turns, on one and the same file.

use std::io::Write as _;

use anyhow::{Context as _, Result};
use clap::Args;
use commonage_bench::figures::{Blk, BlkRound, GUEST};

use crate::machine::{self, Kind, Machine, Parts};
use crate::places::Places;
use crate::say;

const MACHINES: [Kind; 3] = [Kind::Ours, Kind::Qemu("threads"), Kind::Qemu("io_uring")];

/// How much to measure.
#[derive(Debug, Args)]
pub struct Options {
    /// Rounds; each machine runs every load once in each.
    #[arg(long)]
    rounds: u32,
    /// How long each load runs, milliseconds.
    #[arg(long)]
    window_ms: u64,
    /// Size of the file, MiB.
    #[arg(long, default_value_t = 128)]
    file_mib: u64,
    #[command(flatten)]
    places: Places,
}

/// Measures.
pub fn measure(options: &Options) -> Result<Blk> {
    let Options { rounds, window_ms, file_mib, places } = options;
    places.make()?;
    let disk = places.state.join("blk.img");
    fill(&disk, *file_mib).with_context(|| format!("cannot write {}", disk.display()))?;
    let parts = Parts { disk, base: None, cmdline: format!("bench=blk window_ms={window_ms}") };
    let mut all = Vec::new();
    for round in 1..=*rounds {
        for kind in MACHINES {
            let mut machine = Machine::start(kind, places, &parts, &places.run.join("blk"))?;
            let (line, _) = machine.wait(GUEST).with_context(|| kind.name())?;
            let json = line.split_once(GUEST).map(|(_, json)| json).unwrap_or_default();
            let loads = serde_json::from_str(json).with_context(|| format!("{}: {line}", kind.name()))?;
            say!("round {round} of {rounds}: {}", kind.name());
            all.push(BlkRound { machine: kind.name(), loads });
        }
    }
    let version = machine::version(&places.qemu)?;
    Ok(Blk { file_mib: *file_mib, window_ms: *window_ms, version, rounds: all })
}

/// A file without holes.
fn fill(path: &std::path::Path, mib: u64) -> Result<()> {
    let mut file = std::fs::File::create(path)?;
    for n in 0..mib {
        file.write_all(&vec![n as u8 | 1; 1 << 20])?;
    }
    Ok(file.sync_all()?)
}
