//! plcd: serves PLC from one state directory.
//!
//! Prints one JSON line `{"listening": "ADDRESS:PORT"}` when it takes calls. SIGTERM and SIGINT end it after the calls under way.
#![forbid(unsafe_code)]

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use commonage_plc::serve::{Config, Server};
use jiff::SignedDuration;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// PlanetLab Central: the database of principals, sites, nodes and slices, and the boot server.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Option<Serve>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prints the API's description (OpenAPI, JSON).
    Openapi,
}

#[derive(Debug, Args)]
struct Serve {
    /// Where everything is kept: database, keys, boot files. Made on the first start; the administrator's profile is in DIR/admin.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Where to listen; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8443")]
    listen: SocketAddr,
    /// A name or address that clients use for PLC (repeatable), besides 127.0.0.1, localhost and the address listened on.
    #[arg(long = "name", value_name = "NAME")]
    names: Vec<String>,
    /// How far from now an owner may extend a slice, days.
    #[arg(long, value_name = "DAYS", default_value_t = 56, value_parser = clap::value_parser!(u16).range(1..))]
    max_lifetime_days: u16,
}

#[tokio::main]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    match (cli.command, cli.serve) {
        (Some(Command::Openapi), _) => {
            std::io::stdout().write_all(commonage_plc::document()?.as_bytes())?;
            Ok(())
        }
        (None, Some(serve)) => run(serve).await,
        (None, None) => anyhow::bail!("--state DIR is missing: say where PLC keeps everything"),
    }
}

async fn run(serve: Serve) -> Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    // One descriptor a connection: take what may be had.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let server = Server::start(Config {
        state: serve.state,
        listen: serve.listen,
        names: serve.names,
        max_lifetime: SignedDuration::from_hours(i64::from(serve.max_lifetime_days) * 24),
    })
    .await?;
    let address = server.address();
    tracing::info!(%address, "PLC takes calls");
    writeln!(std::io::stdout(), "{}", serde_json::json!({ "listening": address.to_string() }))?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    server.stop().await;
    Ok(())
}
