//! The benches' command lines. `cargo bench` adds `--bench`, which says nothing.

use clap::Args;

/// What every bench takes.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// As little as gives every figure: under three minutes
    #[arg(long)]
    pub quick: bool,
    /// Print one JSON object as the last line, and nothing else on standard output
    #[arg(long)]
    pub json: bool,
    /// Where to measure
    #[arg(long, value_enum, default_value_t = On::Auto)]
    pub on: On,
    #[arg(long, hide = true)]
    bench: bool,
}

/// Where to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum On {
    /// Here as root with hardware virtualisation, otherwise in an emulated node
    Auto,
    /// On this machine itself
    Here,
    /// In a node that QEMU emulates
    Emulated,
}
