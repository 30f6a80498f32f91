//! `bench-node`: measures on the node itself, as root. It is a node manager that makes slivers and counts what they take; the benches start
//! it, on a node that they emulate if need be, and read the one line that it ends with.
#![forbid(unsafe_code)]

mod blk;
mod clones;
mod density;
mod machine;
mod meter;
mod peer;
mod places;
mod slivers;
mod world;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use commonage_bench::figures::RESULT;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Prints one line of progress, in one write: others write to the same console.
macro_rules! say {
    ($($text:tt)*) => { $crate::line(commonage_bench::figures::PROGRESS, &format!($($text)*)) };
}
pub(crate) use say;

/// Measures slivers on this node.
#[derive(Debug, Parser)]
enum Command {
    /// What slivers cost.
    Density(density::Options),
    /// What a guest's disk does.
    Blk(blk::Options),
    /// That clones have nothing in common.
    Clones(clones::Options),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_ansi(false)
        .without_time()
        .with_writer(std::io::stderr)
        .init();
    match measure(&Command::parse()) {
        Ok(json) => {
            line(RESULT, &json);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(command: &Command) -> Result<String> {
    // Each sliver takes about ten.
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let json = match command {
        Command::Density(options) => serde_json::to_string(&runtime.block_on(density::measure(options))?),
        Command::Blk(options) => serde_json::to_string(&blk::measure(options)?),
        Command::Clones(options) => serde_json::to_string(&runtime.block_on(clones::check(options))?),
    };
    runtime.shutdown_background();
    Ok(json?)
}

fn line(prefix: &str, text: &str) {
    // A console that is gone is nobody's error.
    let _ = std::io::stdout().write_all(format!("{prefix}{text}\n").as_bytes());
}
