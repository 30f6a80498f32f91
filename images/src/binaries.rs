//! The static programs of nodes, slivers and PLC, built by cargo in release mode.
//!
//! cargo has its own cache, so they are no artifacts of ours: images take them in by their hashes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use serde::Deserialize;

use crate::Context;
use crate::error::{Error, Result};
use crate::progress::{Task, megabytes};
use crate::run::Log;

/// Packages of the workspace whose programs run on the building machine only.
const NOT_THESE: &[&str] = &["bench", "commonage-testbed", "xtask"];

/// Programs that must come out of that.
const PROGRAMS: &[&str] = &[
    "boot-cd",
    "commonage",
    "net-demux",
    "node-init",
    "nodemgr",
    "plc-agent",
    "plcd",
    "sliver-init",
    "sliver-vmm",
];

/// A line of cargo's JSON output; of the many kinds only those with an `executable` matter.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    #[serde(default)]
    fresh: bool,
}

/// cargo in the workspace, as it would be if this process were not itself started by `cargo run` or `cargo test`: ring's build script
/// asks to run again when one of the variables changes that cargo sets for its children, and half of the dependencies with it.
pub fn cargo(context: &Context) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(&context.workspace);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(set_by_cargo) {
            cargo.env_remove(name);
        }
    }
    cargo
}

/// Whether a variable describes the package that cargo runs, rather than cargo itself (`CARGO_HOME`, `CARGO_TARGET_DIR`, …).
fn set_by_cargo(name: &str) -> bool {
    let families = ["CARGO_BIN_", "CARGO_CRATE_", "CARGO_MANIFEST_", "CARGO_PKG_"];
    families.iter().any(|f| name.starts_with(f))
        || ["CARGO_PRIMARY_PACKAGE", "CARGO_TARGET_TMPDIR", "OUT_DIR"].contains(&name)
}

/// Builds them; returns their paths by name.
///
/// # Errors
/// When cargo fails; its last words are in the error.
pub fn build(context: &Context) -> Result<BTreeMap<String, PathBuf>> {
    let log = Log::create(&context.cache.root().join("logs/binaries.log"))?;
    let task = Task::start("binaries", Some(log.path()));
    let mut cargo = cargo(context);
    cargo.args(["build", "--release", "--workspace", "--bins"]);
    cargo.arg("--message-format=json-render-diagnostics");
    for package in NOT_THESE {
        cargo.args(["--exclude", package]);
    }
    let output = log.output("build the static binaries", &mut cargo)?;
    let messages = || output.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok());
    let built: BTreeMap<String, PathBuf> = messages()
        .filter_map(|m| m.executable)
        .filter_map(|path| Some((path.file_name()?.to_string_lossy().into_owned(), path)))
        .collect();
    if let Some(missing) = PROGRAMS.iter().find(|p| !built.contains_key(**p)) {
        let why = format!("no package makes {missing}; see {}", log.path().display());
        return Err(Error::unexpected("build the static binaries", why));
    }
    if messages().any(|m| m.executable.is_some() && !m.fresh) {
        let size = built.values().filter_map(|p| p.metadata().ok()).map(|m| m.len()).sum();
        task.done(&format!("built {}, {}", built.len(), megabytes(size)));
    }
    Ok(built)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_describes_a_package_is_hidden() {
        assert!(
            set_by_cargo("CARGO_PKG_NAME") && set_by_cargo("CARGO_MANIFEST_DIR") && set_by_cargo("OUT_DIR")
        );
        assert!(!set_by_cargo("CARGO_HOME") && !set_by_cargo("CARGO_TARGET_DIR") && !set_by_cargo("CARGO"));
    }
}
