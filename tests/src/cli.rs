//! The `commonage` command, run as a person would.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// The command with one principal's profile.
#[derive(Debug, Clone)]
pub struct Cli {
    binary: PathBuf,
    profile: PathBuf,
}

/// What a command that failed said.
#[derive(Debug, thiserror::Error)]
#[error("`commonage {command}` ended with {status}: {stderr}")]
pub struct CliError {
    /// Its arguments.
    pub command: String,
    /// Its exit status.
    pub status: std::process::ExitStatus,
    /// Its standard error.
    pub stderr: String,
}

impl Cli {
    /// The command at `binary`, acting as the principal of `profile`.
    pub fn new(binary: &Path, profile: &Path) -> Self {
        Self { binary: binary.to_owned(), profile: profile.to_owned() }
    }

    /// The same command for another principal.
    #[must_use]
    pub fn acting_as(&self, profile: &Path) -> Self {
        Self::new(&self.binary, profile)
    }

    /// The command line a person would type, for messages.
    pub fn shown(&self) -> String {
        format!("{} --profile {}", self.binary.display(), self.profile.display())
    }

    /// Runs it with `--json` and reads its answer.
    ///
    /// # Errors
    /// [`CliError`] when it failed.
    pub fn run(&self, args: &[&str]) -> Result<Value> {
        let output = Command::new(&self.binary)
            .arg("--json")
            .arg("--profile")
            .arg(&self.profile)
            .args(args)
            .output()
            .with_context(|| format!("cannot run {}", self.binary.display()))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            bail!(CliError { command: args.join(" "), status: output.status, stderr });
        }
        if output.stdout.trim_ascii().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!(
                "`commonage {}` did not print JSON: {}",
                args.join(" "),
                String::from_utf8_lossy(&output.stdout)
            )
        })
    }
}
