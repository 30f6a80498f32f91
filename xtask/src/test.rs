//! `cargo xtask test`: every check there is, the quick ones first. Ends on the test runner's own summary.

use std::collections::BTreeSet;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use commonage_images::{Context, binaries, build};
use serde_json::Value;

/// Tests of whole machines, which alone are not run here: they need a KVM that can run Linux, and get it from the testbed's, which runs them
/// inside an emulated machine.
const NESTED: [&str; 3] = ["machine", "sliver", "slivers"];

/// Packages with tests that need root. To another user they are left out whole.
const NEEDS_ROOT: [&str; 5] =
    ["commonage-init", "commonage-net-demux", "commonage-node-init", "commonage-nodemgr", "commonage-vmm"];

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
    let excluded: &[&str] = if Context::is_root() { &[] } else { &NEEDS_ROOT };
    let mut arguments = vec!["test".to_owned(), "--workspace".to_owned()];
    for package in excluded {
        eprintln!("not root: the tests of {package} that need more than a plain user are left out");
        arguments.extend(["--exclude".to_owned(), (*package).to_owned()]);
    }
    // The same packages as above, so that nothing is built anew; their libraries, programs and all tests but the nested.
    arguments.extend(["--lib", "--bins"].map(str::to_owned));
    for name in tests_but_nested(excluded)? {
        arguments.extend(["--test".to_owned(), name]);
    }
    // One test at a time: some boot whole machines, and their time limits count on having the processors.
    arguments.extend(["--", "--ignored", "--test-threads=1"].map(str::to_owned));
    cargo(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The names of all test targets but those of [`NESTED`] and of packages that are `excluded`.
fn tests_but_nested(excluded: &[&str]) -> Result<BTreeSet<String>> {
    let output = binaries::cargo(&Context::from_env()?)
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let included =
        packages.iter().filter(|p| p["name"].as_str().is_some_and(|name| !excluded.contains(&name)));
    let targets = included.flat_map(|package| package["targets"].as_array().into_iter().flatten());
    let tests = targets.filter(|target| target["kind"][0] == "test");
    let names = tests.filter_map(|target| target["name"].as_str());
    Ok(names.filter(|name| !NESTED.contains(name)).map(str::to_owned).collect())
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
    use std::path::Path;

    use super::*;

    /// Adds the packages under `directory` with tests that need root; it belongs to `package` unless it is one itself.
    fn needing_root(directory: &Path, package: &str, found: &mut BTreeSet<String>) {
        let manifest = std::fs::read_to_string(directory.join("Cargo.toml")).unwrap_or_default();
        let name = manifest.lines().find_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
        let package = name.unwrap_or(package);
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("target") {
                needing_root(&path, package, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                if text.lines().any(|line| line.trim_start().starts_with("#[ignore = \"needs root")) {
                    found.insert(package.to_owned());
                }
            }
        }
    }

    #[test]
    fn tests_that_need_root_are_known() {
        let mut found = BTreeSet::new();
        needing_root(&Context::from_env().unwrap().workspace, "", &mut found);
        assert!(found.iter().eq(&NEEDS_ROOT), "{found:?} is not {NEEDS_ROOT:?}");
    }

    #[test]
    fn nested_tests_are_run_by_the_testbed() {
        let testbed = Context::from_env().unwrap().workspace.join("tests/tests/vmm.rs");
        let text = std::fs::read_to_string(testbed).unwrap();
        for name in NESTED {
            assert!(text.contains(&format!("build(\"{name}\")")), "nobody builds the test {name}");
        }
        assert!(tests_but_nested(&[]).unwrap().contains("firmware"));
    }
}
