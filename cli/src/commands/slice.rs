//! Slices: PDN-04-017 §3.3's calls by their names.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use commonage_isolation_api::{NodeId, Ports, SliceName};
use commonage_plc_api::node::SliverOutcome;
use commonage_plc_api::rest::{BootState, PrincipalName, RestartPolicy, SetResources, Slice, SliceSliver};
use commonage_plc_client::Client;
use jiff::{Span, SpanRelativeTo, Timestamp};

use crate::output::Output;
use crate::profile::Profile;

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes a slice at PLC; nothing happens on nodes yet (PIs).
    Create {
        /// `site_name`.
        name: SliceName,
    },
    /// Removes a slice and all its slivers (PIs, owners).
    Delete {
        /// Which.
        name: SliceName,
    },
    /// The slices you may see.
    List,
    /// One slice, with a line for each sliver.
    Show {
        /// Which.
        name: SliceName,
    },
    /// Says who is responsible for a slice and may log in to it (PIs, owners).
    SetOwners {
        /// Which.
        name: SliceName,
        /// All owners.
        #[arg(required = true)]
        owners: Vec<PrincipalName>,
    },
    /// Sets how the slivers start (PIs, owners).
    SetState {
        /// Which.
        name: SliceName,
        /// rc.vinit: a script that each sliver runs when it starts.
        #[arg(long, value_name = "FILE")]
        boot_script: Option<PathBuf>,
        /// What is in a new sliver: debian or mini.
        #[arg(long)]
        base: Option<String>,
        /// Whether a sliver is started again when its machine ends: always, on-failure or never.
        #[arg(long, value_name = "POLICY")]
        restart: Option<RestartPolicy>,
    },
    /// Gives a slice its share and its time (PIs; owners of an instantiated slice may renew).
    SetResources {
        /// Which.
        name: SliceName,
        /// Weight among the site's slices.
        #[arg(long)]
        share: u32,
        /// From now on for so long, like 7d or 12h.
        #[arg(long = "for", value_name = "TIME", required_unless_present = "until")]
        span: Option<Span>,
        /// Until then, like 2027-01-31T00:00:00Z.
        #[arg(long, value_name = "UTC", conflicts_with = "span")]
        until: Option<Timestamp>,
        /// Memory of each sliver, MiB.
        #[arg(long)]
        memory_mib: Option<u32>,
        /// Disk of each sliver, MiB.
        #[arg(long)]
        disk_mib: Option<u32>,
        /// Length of each sliver's port block.
        #[arg(long)]
        ports: Option<u16>,
        /// A TCP port wanted exactly, on every node.
        #[arg(long = "tcp-port")]
        tcp: Vec<u16>,
        /// A UDP port wanted exactly, on every node.
        #[arg(long = "udp-port")]
        udp: Vec<u16>,
    },
    /// Sets the nodes that the slice runs on (PIs, owners).
    Instantiate {
        /// Which.
        name: SliceName,
        /// A node's id or host name.
        #[arg(long = "node", value_name = "NODE")]
        nodes: Vec<String>,
        /// On every node there is.
        #[arg(long, conflicts_with = "nodes", required_unless_present = "nodes")]
        all_nodes: bool,
        /// Return when each sliver's boot script has run, or failed to.
        #[arg(long)]
        wait: bool,
        /// Wait so many seconds at most.
        #[arg(long, default_value_t = 300, requires = "wait")]
        timeout: u64,
    },
}

/// Does it.
pub async fn run(command: Command, profile: &Profile, output: &Output) -> Result<ExitCode> {
    let plc = profile.client()?;
    let slice = match command {
        Command::Create { name } => plc.create_slice(&name).await?,
        Command::Delete { name } => {
            plc.delete_slice(&name).await?;
            output.told(&serde_json::json!({}), &[format!("slice {name} is gone")])?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::List => {
            let slices = plc.slices().await?;
            output.table(&slices, &["SLICE", "PHASE", "SLIVERS", "UNTIL"], |s| {
                let until = s.resources.as_ref().map(|r| r.end.to_string()).unwrap_or_default();
                vec![
                    s.name.to_string(),
                    format!("{:?}", s.phase).to_lowercase(),
                    s.slivers.len().to_string(),
                    until,
                ]
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Show { name } => plc.slice(&name).await?,
        Command::SetOwners { name, owners } => plc.set_owners(&name, owners.into_iter().collect()).await?,
        Command::SetState { name, boot_script, base, restart } => {
            let mut state: BootState = plc.slice(&name).await?.state;
            if let Some(path) = boot_script {
                state.boot_script = std::fs::read_to_string(&path)
                    .with_context(|| format!("cannot read {} as text", path.display()))?;
            }
            if let Some(base) = base {
                state.base = base;
            }
            state.restart = restart.unwrap_or(state.restart);
            plc.set_state(&name, &state).await?
        }
        Command::SetResources { name, share, span, until, memory_mib, disk_mib, ports, tcp, udp } => {
            let end = match (until, span) {
                (Some(until), _) => until,
                (None, Some(span)) => Timestamp::now()
                    .checked_add(span.to_duration(SpanRelativeTo::days_are_24_hours())?)
                    .context("--for reaches beyond the end of time")?,
                (None, None) => bail!("say --for TIME or --until UTC"),
            };
            let (tcp, udp): (BTreeSet<u16>, BTreeSet<u16>) =
                (tcp.into_iter().collect(), udp.into_iter().collect());
            let some_ports = ports.is_some() || !tcp.is_empty() || !udp.is_empty();
            let ports = some_ports.then(|| Ports { block: ports.unwrap_or(64), tcp, udp });
            plc.set_resources(&name, &SetResources { share, end, memory_mib, disk_mib, ports }).await?
        }
        Command::Instantiate { name, nodes, all_nodes, wait, timeout } => {
            let slice = plc.instantiate_slice(&name, resolve(&plc, &nodes, all_nodes).await?).await?;
            if wait {
                return waited(&settle(&plc, slice, timeout, output).await?, output);
            }
            slice
        }
    };
    show(&slice, output)?;
    Ok(ExitCode::SUCCESS)
}

/// Node ids of names that are ids or host names.
async fn resolve(plc: &Client, named: &[String], all: bool) -> Result<BTreeSet<NodeId>> {
    let nodes = plc.nodes().await?;
    if all {
        return Ok(nodes.into_iter().map(|n| n.node).collect());
    }
    let find = |name: &String| {
        let mut found = nodes.iter().filter(|n| n.node.as_str() == name || &n.hostname == name);
        match (found.next(), found.next()) {
            (Some(node), None) => Ok(node.node.clone()),
            (Some(_), Some(_)) => {
                bail!("several nodes are called {name}; name one by its id (`commonage node list`)")
            }
            (None, _) => bail!("there is no node {name}; `commonage node list` shows all"),
        }
    };
    named.iter().map(find).collect()
}

/// The slice once every sliver has come to rest, or as it is when time is up.
async fn settle(plc: &Client, mut slice: Slice, timeout_s: u64, output: &Output) -> Result<Slice> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(timeout_s);
    let mut told = Vec::new();
    loop {
        let news: Vec<String> = slice.slivers.iter().map(line).collect();
        for line in news.iter().filter(|line| !told.contains(*line)) {
            output.progress(line);
        }
        told = news;
        let left = deadline.saturating_duration_since(std::time::Instant::now()).as_secs();
        if slice.settled() || left == 0 {
            return Ok(slice);
        }
        slice =
            plc.slice_after(&slice.name, slice.revision, u32::try_from(left.min(30)).unwrap_or(30)).await?;
    }
}

/// Tells how the wait ended: 0 when every sliver runs and its boot script succeeded, else 3.
fn waited(slice: &Slice, output: &Output) -> Result<ExitCode> {
    show(slice, output)?;
    let good =
        |s: &SliceSliver| s.current && matches!(s.outcome, SliverOutcome::Running { boot_script_exit: 0 });
    Ok(if slice.slivers.iter().all(good) { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

fn show(slice: &Slice, output: &Output) -> Result<()> {
    let mut lines = vec![format!("slice {} is {}", slice.name, format!("{:?}", slice.phase).to_lowercase())];
    let owners: Vec<&str> = slice.owners.iter().map(PrincipalName::as_str).collect();
    lines
        .push(format!("  owners: {}", if owners.is_empty() { "none".to_owned() } else { owners.join(", ") }));
    if let Some(r) = &slice.resources {
        let (share, end, memory, disk) = (r.share, r.end, r.memory_mib, r.disk_mib);
        lines.push(format!("  share {share} until {end}; each sliver: {memory} MiB memory, {disk} MiB disk"));
    }
    lines.extend(slice.slivers.iter().map(|s| format!("  {}", line(s))));
    output.told(slice, &lines)
}

fn line(sliver: &SliceSliver) -> String {
    let state = match &sliver.outcome {
        SliverOutcome::Pending => "waits for its node".to_owned(),
        SliverOutcome::Starting => "is starting".to_owned(),
        SliverOutcome::Running { boot_script_exit: 0 } => "runs".to_owned(),
        SliverOutcome::Running { boot_script_exit } => {
            format!("runs; its boot script ended with {boot_script_exit}")
        }
        SliverOutcome::Failed { reason } => format!("failed: {reason}"),
        SliverOutcome::Stopped { reason } => format!("stopped: {reason}"),
    };
    let ports = sliver.ports.as_ref().map(|p| format!(", ports {}-{}", p.first, p.last)).unwrap_or_default();
    let ssh = sliver.ssh.as_ref().map(|ssh| format!(", {ssh}")).unwrap_or_default();
    format!("{}: {state}{ports}{ssh}", sliver.hostname)
}
