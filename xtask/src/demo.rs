//! `cargo xtask demo`: its command line. The demonstration itself is the testbed's.

use anyhow::Result;
use clap::{Args, ValueEnum};
use commonage_testbed::demo::{self, Demo};
use commonage_testbed::node;

/// What to show.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// What the emulated nodes boot by.
    #[arg(long, value_enum, default_value_t = Firmware::Bios)]
    firmware: Firmware,
    /// What the slivers are made of.
    #[arg(long, value_enum, default_value_t = Base::Debian)]
    base: Base,
    /// How many nodes.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    nodes: u8,
    /// How many slices, each with a sliver on every node.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    slivers: u8,
    /// Verify, tear down and end, instead of staying up until Ctrl-C.
    #[arg(long)]
    once: bool,
    /// Print one JSON object at the end, and nothing else on standard output.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Firmware {
    Bios,
    Uefi,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Base {
    Mini,
    Debian,
}

/// Shows it.
pub(crate) fn run(options: &Options) -> Result<()> {
    crate::machines()?;
    demo::run(&Demo {
        nodes: options.nodes.into(),
        slivers: options.slivers.into(),
        firmware: match options.firmware {
            Firmware::Bios => node::Firmware::Bios,
            Firmware::Uefi => node::Firmware::Uefi,
        },
        base: match options.base {
            Base::Mini => "mini".to_owned(),
            Base::Debian => "debian".to_owned(),
        },
        once: options.once,
        json: options.json,
    })
}
