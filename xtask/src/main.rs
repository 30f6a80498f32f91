//! `cargo xtask`: what one does with the source tree. `images` builds what boots, `test` runs every check, `demo` shows it all working.
//!
//! Exit codes: 0 when all went well, 2 when packages must be installed first (the line to paste is printed) or the command line is wrong,
//! 1 for everything else.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Parser, Subcommand};
use commonage_images::{Context, packages, progress};

mod demo;
mod test;
#[cfg(test)]
mod threat_model;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Builds, tests and shows Commonage.", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Build everything that boots into the cache: kernels, bases, the node image, the boot CD's parts.
    Images {
        /// Print the paths as one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Check format and lints, run all tests; then boot emulated machines for those that need them.
    Test(test::Options),
    /// Start a whole testbed in emulated machines, make slices on it, and prove that they work.
    Demo(demo::Options),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Verb::Images { json } => images(json),
        Verb::Test(options) => test::run(&options),
        Verb::Demo(options) => demo::run(&options),
    };
    let Err(error) = done else { return ExitCode::SUCCESS };
    eprintln!("error: {error:#}");
    let ours = error.downcast_ref::<commonage_images::Error>();
    ExitCode::from(ours.map_or(1, commonage_images::Error::exit_code))
}

fn images(json: bool) -> Result<()> {
    let started = Instant::now();
    let images = commonage_images::build(&Context::from_env()?)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&images)?);
        return Ok(());
    }
    let parts = [
        ("boot CD: vmlinuz", &images.boot_kernel),
        ("boot CD: initramfs", &images.boot_initramfs),
        ("sliver: vmlinux", &images.sliver_kernel),
        ("sliver: initrd", &images.sliver_initrd),
    ];
    let node = images.node_files.iter().map(|(name, path)| (format!("node: {name}"), path));
    for (name, path) in parts.into_iter().map(|(n, p)| (n.to_owned(), p)).chain(node) {
        let size = progress::megabytes(path.metadata()?.len());
        println!("{name:<26}{size:>10}  {}", path.display());
    }
    eprintln!("images are ready ({})", progress::seconds(started.elapsed()));
    Ok(())
}

/// Sees that what emulated machines need is installed, before anything else takes its time.
fn machines() -> Result<()> {
    packages::ensure(&Context::from_env()?, &[packages::BUILD, packages::MACHINES])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
        assert!(Arguments::try_parse_from(["xtask", "demo", "--nodes", "0"]).is_err());
        let parsed = Arguments::try_parse_from(["xtask", "test", "--quick"]);
        assert!(matches!(parsed, Ok(Arguments { command: Verb::Test(_) })));
    }
}
