//! The per-node agent of PLC, the first brokerage service (PDN-04-017 §3.2).
//!
//! It runs in a privileged sliver, so it reaches the node manager only as every sliver does, over vsock, and PLC only as every sliver does, over the sliver's network.
//! It pulls the whole desired state of its node by long poll, makes the node so ([`reconcile`]), and reports what is there. Nothing is remembered between rounds: an agent that was killed,
//! or a node that missed a week, ends in the right state.
#![forbid(unsafe_code)]

mod nodemgr;
mod reconcile;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use commonage_isolation_api::SliceName;
use commonage_nodemgr_api::http::{Sliver, SliverState};
use commonage_plc_api::boot::NodeConfig;
use commonage_plc_api::node::{Desired, SliverOutcome, SliverReport, Status};
use commonage_plc_client::Client;
use tokio::sync::watch;
use tracing::{info, warn};

use nodemgr::NodeManager;
use reconcile::{Action, plan};

/// Where the node manager lays the node's configuration.
const NODE_CONFIG: &str = "/run/commonage/node.json";
/// PLC is asked again after this many seconds at worst.
const LONG_POLL_S: u32 = 600;
/// How often the node manager is asked while slivers are on their way, and while all are at rest.
const BUSY: Duration = Duration::from_millis(250);
const IDLE: Duration = Duration::from_secs(10);
/// A report is sent at least this often, so that PLC knows that the node lives.
const REPORT: Duration = Duration::from_secs(300);
/// Waits between failed calls of PLC grow up to this.
const MAX_BACKOFF: Duration = Duration::from_secs(60);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    tracing_subscriber::fmt().with_target(false).with_ansi(false).with_writer(std::io::stderr).init();
    let path = Path::new(NODE_CONFIG);
    let text = std::fs::read(path)
        .with_context(|| format!("cannot read {NODE_CONFIG}, which the node manager lays"))?;
    let config: NodeConfig =
        serde_json::from_slice(&text).with_context(|| format!("{NODE_CONFIG} is damaged"))?;
    let plc = Arc::new(Client::new(&config.plc, &config.ca_pem, &config.cert_pem, &config.key_pem)?);
    let (sender, desired) = watch::channel(None);
    let puller = tokio::spawn(pull(Arc::clone(&plc), sender));
    let keeper = keep(&plc, &NodeManager, desired);
    tokio::select! {
        result = puller => result.context("the task that pulls desired state ended"),
        result = keeper => result,
    }
}

/// Keeps `sender` at what PLC wants, for ever.
async fn pull(plc: Arc<Client>, sender: watch::Sender<Option<Desired>>) {
    let mut backoff = Duration::from_secs(1);
    loop {
        // The first call answers at once, whatever the revision; so does the first one after a failure.
        let have = sender.borrow().as_ref().map_or(0, |d| d.revision);
        let wait = if have == 0 { 0 } else { LONG_POLL_S };
        match plc.desired(have, wait).await {
            Ok(desired) => {
                backoff = Duration::from_secs(1);
                // A PLC restored from a backup may count from lower: what it says holds.
                sender.send_if_modified(|old| {
                    let new = old.as_ref() != Some(&desired);
                    if new {
                        info!(revision = desired.revision, slivers = desired.slivers.len(), "PLC wants");
                        *old = Some(desired.clone());
                    }
                    new
                });
            }
            Err(error) => {
                warn!("{error}; asking again in {} s", backoff.as_secs());
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(MAX_BACKOFF);
            }
        }
    }
}

/// Makes the node what `desired` says, whenever either changes, and reports.
async fn keep(plc: &Client, node: &NodeManager, mut desired: watch::Receiver<Option<Desired>>) -> Result<()> {
    let mut sent: Option<(Status, tokio::time::Instant)> = None;
    loop {
        let wanted = desired.borrow_and_update().clone();
        let status = match round(node, wanted.as_ref()).await {
            Ok(status) => status,
            Err(error) => {
                warn!("{error:#}; trying again");
                tokio::time::sleep(BUSY).await;
                continue;
            }
        };
        let busy = status
            .slivers
            .iter()
            .any(|s| matches!(s.state, SliverOutcome::Pending | SliverOutcome::Starting));
        let stale = sent.as_ref().is_none_or(|(old, at)| *old != status || at.elapsed() > REPORT);
        if stale {
            match plc.put_status(&status).await {
                Ok(()) => sent = Some((status, tokio::time::Instant::now())),
                Err(error) => warn!("PLC did not take the report: {error}"),
            }
        }
        let pause = if busy { BUSY } else { IDLE };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            changed = desired.changed() => {
                changed.context("the task that pulls desired state ended")?;
            }
        }
    }
}

/// One look at the node, the calls that bring it nearer to what is wanted, and the report of how it is then.
async fn round(node: &NodeManager, wanted: Option<&Desired>) -> Result<Status> {
    let about = node.node().await?;
    // What could not be done. It is tried again in each round, for as long as PLC wants it.
    let mut failures: BTreeMap<SliceName, String> = BTreeMap::new();
    let mut there = node.slivers().await?;
    if let Some(wanted) = wanted {
        let actions = plan(&wanted.slivers, &there, &node.rcaps().await?, &about.caller);
        let acted = !actions.is_empty();
        for action in actions {
            let slice = action.slice().cloned();
            match (perform(node, action).await, slice) {
                (Err(error), Some(slice)) => {
                    warn!("{slice}: {error}");
                    failures.insert(slice, error.to_string());
                }
                (Err(error), None) => warn!("{error}"),
                (Ok(()), _) => {}
            }
        }
        if acted {
            there = node.slivers().await?;
        }
    }
    let slices = wanted.map(|w| w.slivers.as_slice()).unwrap_or_default();
    let slivers = slices.iter().map(|w| report(&w.slice, &there, &failures)).collect();
    Ok(Status {
        revision: wanted.map_or(0, |w| w.revision),
        address: about.address,
        ssh_host_key: about.ssh_host_key,
        version: about.version,
        slivers,
    })
}

async fn perform(node: &NodeManager, action: Action) -> Result<(), nodemgr::CallError> {
    match action {
        Action::Release(rcap) => node.release(rcap).await,
        Action::Delete(slice) => {
            info!("{slice}: delete");
            node.delete(&slice).await
        }
        Action::Create(sliver) => {
            info!("{}: acquire and bind", sliver.slice);
            let rcap = node.acquire(sliver.rspec).await?.rcap;
            match node.bind(sliver.slice, rcap.clone(), sliver.config).await {
                Ok(()) => Ok(()),
                Err(error) => {
                    // The right is of no use unbound. If this fails too, the next round finds it.
                    let _ = node.release(rcap).await;
                    Err(error)
                }
            }
        }
        Action::Renew { slice, rcap, end, share } => {
            info!("{slice}: renew until {end}");
            node.renew(rcap, end, share).await
        }
        Action::Configure(slice, config) => {
            info!("{slice}: configure");
            node.configure(&slice, config).await
        }
        Action::Refuse(_, reason) => Err(nodemgr::CallError::Refused(reason)),
    }
}

fn report(slice: &SliceName, there: &[Sliver], failures: &BTreeMap<SliceName, String>) -> SliverReport {
    let sliver = there.iter().find(|s| &s.slice == slice);
    let state = match (failures.get(slice), sliver.map(|s| &s.status)) {
        (Some(reason), _) => SliverOutcome::Failed { reason: reason.clone() },
        (None, None | Some(SliverState::Pending)) => SliverOutcome::Pending,
        (None, Some(SliverState::Starting)) => SliverOutcome::Starting,
        (None, Some(SliverState::Running { boot_script_exit })) => {
            SliverOutcome::Running { boot_script_exit: *boot_script_exit }
        }
        (None, Some(SliverState::Failed { reason })) => SliverOutcome::Failed { reason: reason.clone() },
        (None, Some(SliverState::Stopped { reason })) => SliverOutcome::Stopped { reason: reason.clone() },
    };
    SliverReport { slice: slice.clone(), state, ports: sliver.map(|s| s.ports.clone()) }
}
