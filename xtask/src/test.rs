//! `cargo xtask test`: every check there is, the quick ones first. Ends on the test runner's own summary.

use std::ffi::OsString;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use commonage_images::{Context, build};

/// How much to test.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only what needs no images and no machines: format, lints, unit tests.
    #[arg(long)]
    quick: bool,
}

/// Runs them all, or stops at the first that fails.
pub(crate) fn run(options: &Options) -> Result<()> {
    if !options.quick {
        crate::machines()?;
    }
    cargo(&["fmt", "--all", "--check"])?;
    cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    cargo(&["test", "--workspace"])?;
    if options.quick {
        return Ok(());
    }
    build(&Context::from_env()?)?;
    let root = Context::is_root();
    if !root {
        eprintln!("not root: the tests that make network namespaces are left out");
    }
    let some: &[&str] = if root {
        &["--workspace", "--exclude", "commonage-testbed"]
    } else {
        &["--package", "commonage-images", "--package", "commonage-nodemgr"]
    };
    // One at a time: some boot whole machines, and their time limits count on having the processors.
    let ignored = ["--", "--ignored", "--test-threads=1"];
    cargo(&[&["test"], some, &ignored].concat())?;
    cargo(&[&["test", "--package", "commonage-testbed"][..], &ignored].concat())
}

fn cargo(arguments: &[&str]) -> Result<()> {
    eprintln!("+ cargo {}", arguments.join(" "));
    let program = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let status = Command::new(program)
        .args(arguments)
        .current_dir(Context::from_env()?.workspace)
        .stdin(Stdio::null())
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("cargo {} failed", arguments.first().copied().unwrap_or_default());
    }
    Ok(())
}
