//! `cargo bench -p bench --bench blk`: a guest's disk under sliver-vmm and under QEMU, the same file in the same run.
#![forbid(unsafe_code)]

mod place;

use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use commonage_bench::figures::Blk;
use commonage_bench::options::Common;
use commonage_bench::report;

use place::{Place, Programs};

/// Loads a guest's disk under sliver-vmm and under QEMU in turns
#[derive(Debug, Parser)]
#[command(name = "blk", version)]
struct Options {
    /// Rounds; each machine runs every load once in each [default: 7; with --quick 3]
    #[arg(long)]
    rounds: Option<u32>,
    /// How long each load runs, milliseconds [default: 1,000; with --quick 400]
    #[arg(long)]
    window_ms: Option<u64>,
    #[command(flatten)]
    common: Common,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let quick = options.common.quick;
    let rounds = options.rounds.unwrap_or(if quick { 3 } else { 7 });
    let window = options.window_ms.unwrap_or(if quick { 400 } else { 1000 });
    let arguments =
        ["blk", "--rounds", &rounds.to_string(), "--window-ms", &window.to_string()].map(str::to_owned);
    let programs =
        Programs { node: env!("CARGO_BIN_EXE_bench-node"), guest: env!("CARGO_BIN_EXE_bench-guest") };
    let place = Place::prepare(options.common.on, programs)?;
    eprintln!("a guest's disk {}", place.describe());
    let run: Blk = place.run(&arguments, 1024, Duration::from_secs(3600))?;
    let table = report::table(&report::blk(&run));
    let table = format!("requests a second ÷ those of the better of QEMU's ways, {}\n{table}", run.version);
    if options.common.json {
        eprint!("{table}");
        println!(
            "{}",
            serde_json::to_string(&report::blk_json(&run, &place.describe(), place.is_emulated()))?
        );
    } else {
        print!("{table}");
    }
    Ok(())
}
