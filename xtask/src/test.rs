//! `cargo xtask test`: every check there is, the quick ones first. Ends on the test runner's own summary.

use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use commonage_images::{Context, binaries, build};

/// Whose ignored tests are run on this machine itself.
struct Ignored {
    package: &'static str,
    /// Which of its test targets; all if none is named.
    targets: &'static [&'static str],
    needs_root: bool,
}

const fn all_of(package: &'static str, needs_root: bool) -> Ignored {
    Ignored { package, targets: &[], needs_root }
}

/// Tests of whole machines, which alone are not run here: they need a KVM that can run Linux, and get it from the testbed's, which runs them inside an
/// emulated machine.
#[cfg(test)]
const NESTED: [&str; 2] = ["vmm/tests/machine.rs", "images/sliver-init/tests/sliver/main.rs"];

/// Every other package with ignored tests.
const IGNORED: &[Ignored] = &[
    all_of("commonage-images", false),
    all_of("commonage-init", true),
    all_of("commonage-net-demux", true),
    all_of("commonage-node-init", true),
    Ignored { package: "commonage-nodemgr", targets: &["--lib"], needs_root: true },
    Ignored { package: "commonage-nodemgr", targets: &["--test", "ssh"], needs_root: false },
    all_of("commonage-testbed", false),
    Ignored { package: "commonage-sliver-init", targets: &["--lib"], needs_root: false },
    Ignored { package: "commonage-vmm", targets: &["--test", "jail"], needs_root: true },
];

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
    let (run, left): (Vec<_>, Vec<_>) =
        IGNORED.iter().partition(|ignored| !ignored.needs_root || Context::is_root());
    for Ignored { package, targets, .. } in left {
        eprintln!("not root: the ignored tests of {package} {} are left out", targets.join(" "));
    }
    // Targets are named for all packages of a run, so each row with targets is a run of its own.
    let (whole, parts): (Vec<_>, Vec<_>) = run.into_iter().partition(|ignored| ignored.targets.is_empty());
    for part in parts {
        let targets = part.targets.iter().copied();
        ignored(["--package", part.package].into_iter().chain(targets))?;
    }
    ignored(whole.iter().flat_map(|ignored| ["--package", ignored.package]))
}

/// One test at a time: some boot whole machines, and their time limits count on having the processors.
fn ignored<'a>(which: impl Iterator<Item = &'a str>) -> Result<()> {
    let arguments = ["test"].into_iter().chain(which).chain(["--", "--ignored", "--test-threads=1"]);
    cargo(&arguments.collect::<Vec<_>>())
}

fn cargo(arguments: &[&str]) -> Result<()> {
    eprintln!("+ cargo {}", arguments.join(" "));
    let status = binaries::cargo(&Context::from_env()?)
        .args(arguments)
        .stdin(Stdio::null())
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("cargo {} failed", arguments.first().copied().unwrap_or_default());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// Adds the packages with ignored tests under `directory`, which belongs to `package` unless it is one itself.
    fn ignoring(directory: &Path, package: &str, found: &mut BTreeSet<String>) {
        let manifest = std::fs::read_to_string(directory.join("Cargo.toml")).unwrap_or_default();
        let name = manifest.lines().find_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
        let package = name.unwrap_or(package);
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("target") {
                ignoring(&path, package, found);
            } else if path.extension().is_some_and(|e| e == "rs")
                && NESTED.iter().all(|nested| !path.ends_with(nested))
            {
                let text = std::fs::read_to_string(&path).unwrap();
                if text.lines().any(|line| line.trim_start().starts_with("#[ignore")) {
                    found.insert(package.to_owned());
                }
            }
        }
    }

    #[test]
    fn every_ignored_test_is_run() {
        let mut found = BTreeSet::new();
        ignoring(&Context::from_env().unwrap().workspace, "", &mut found);
        let listed: BTreeSet<_> = IGNORED.iter().map(|ignored| ignored.package.to_owned()).collect();
        assert_eq!(found, listed);
    }
}
