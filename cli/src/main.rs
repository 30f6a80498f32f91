//! `commonage`: what operators and experimenters type.
//!
//! Each command is one or a few calls of PLC's REST API, printed for people, or with `--json` as exactly what PLC answered.
//! Exit status: 0 done, 1 failed, 2 wrong usage, 3 waited for slivers and some failed or time was up.
#![forbid(unsafe_code)]

mod commands;
mod output;
mod profile;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

use commands::{node, offline_key, principal, release, site, slice};
use output::Output;

/// Works with a Commonage testbed: sites, principals, nodes, slices and what nodes boot.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    /// Directory with `url`, `ca.pem`, `cert.pem` and `key.pem`: where PLC is and who you are there.
    #[arg(long, global = true, env = "COMMONAGE_PROFILE", value_name = "DIR")]
    profile: Option<PathBuf>,
    /// Print JSON for programs.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Who am I to PLC?
    Me,
    /// Sites: organisations that host nodes and own slices.
    #[command(subcommand)]
    Site(site::Command),
    /// Principals: administrators, PIs and users.
    #[command(subcommand)]
    Principal(principal::Command),
    /// The SSH keys that you log in to slivers with.
    #[command(subcommand)]
    SshKey(principal::SshKeyCommand),
    /// Nodes and their boot CDs.
    #[command(subcommand)]
    Node(node::Command),
    /// Slices.
    #[command(subcommand)]
    Slice(slice::Command),
    /// The key that signs what nodes may run. Keep it off line.
    #[command(subcommand)]
    OfflineKey(offline_key::Command),
    /// What nodes boot.
    #[command(subcommand)]
    Release(release::Command),
    /// Prints completions for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = Output::new(cli.json);
    match run(cli, &output).await {
        Ok(code) => code,
        Err(error) => {
            output.error(&error);
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli, output: &Output) -> anyhow::Result<ExitCode> {
    let profile = profile::Profile::locate(cli.profile);
    match cli.command {
        Command::Me => output.value(&profile.client()?.me().await?)?,
        Command::Site(command) => site::run(command, &profile, output).await?,
        Command::Principal(command) => principal::run(command, &profile, output).await?,
        Command::SshKey(command) => principal::run_ssh_key(command, &profile, output).await?,
        Command::Node(command) => node::run(command, &profile, output).await?,
        Command::Slice(command) => return slice::run(command, &profile, output).await,
        Command::OfflineKey(command) => offline_key::run(command, output)?,
        Command::Release(command) => release::run(command, &profile, output).await?,
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "commonage", &mut std::io::stdout());
        }
    }
    Ok(ExitCode::SUCCESS)
}
