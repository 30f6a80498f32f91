//! The connections a guest makes to the host, as its machine hands them over ([`Request::Accept`]).
//!
//! | port | what |
//! |---|---|
//! | 806 | a call of the node manager's API: passed on, a few at a time; while those wait nothing more is taken, and the machine refuses what it cannot deliver |
//! | 807 | the knock of a guest that booted: listened to once, and only if somebody waits for it |
//!
//! Anything else is closed. Which machine a connection came through is all that is known of the caller, and all that is needed.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use commonage_nodemgr_api::guest::{CONTROL_PORT, Knock};
use commonage_nodemgr_api::http::PORT;
use commonage_vmm_api::{Request, Response};
use tokio::io::AsyncReadExt as _;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::machine::unexpected;
use super::socket::GuestSocket;
use super::wire::Wire;

/// Between two connections taken: a guest that connects without end costs the host little.
const PAUSE: Duration = Duration::from_millis(1);
/// How long a knock may take.
const KNOCK_WAIT: Duration = Duration::from_secs(10);
/// Longest knock, bytes.
const MAX_KNOCK: u64 = 256;
/// Between a subscription that broke and the next.
const AGAIN: Duration = Duration::from_secs(1);

/// Takes a guest's connections until dropped.
#[derive(Debug)]
pub struct Visits(AbortHandle);

impl Drop for Visits {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Visits {
    /// Subscribes at the machine behind `control`. Calls go to `calls` (none: closed); `knock` is told when the guest has knocked and
    /// hung up.
    ///
    /// # Errors
    /// The machine cannot be reached.
    pub async fn receive(
        control: PathBuf,
        calls: Option<mpsc::Sender<GuestSocket>>,
        mut knock: Option<oneshot::Sender<()>>,
    ) -> io::Result<Self> {
        let first = subscribe(&control).await?;
        let task = tokio::spawn(async move {
            let mut wire = Ok(first);
            loop {
                if let Ok(wire) = wire {
                    let Err(e) = serve(wire, calls.as_ref(), &mut knock).await;
                    tracing::debug!("{}: {e}", control.display());
                }
                // The machine ended, most likely, and whoever owns this drops it.
                tokio::time::sleep(AGAIN).await;
                wire = subscribe(&control).await;
            }
        });
        Ok(Self(task.abort_handle()))
    }
}

async fn subscribe(control: &std::path::Path) -> io::Result<Wire> {
    let wire = Wire::connect(control).await?;
    wire.send(&Request::Accept, &[]).await?;
    Ok(wire)
}

async fn serve(
    mut wire: Wire,
    calls: Option<&mpsc::Sender<GuestSocket>>,
    knock: &mut Option<oneshot::Sender<()>>,
) -> io::Result<std::convert::Infallible> {
    loop {
        let port = match wire.next().await? {
            Response::Connection { port } => port,
            other => return Err(unexpected(&other)),
        };
        let [connection] = wire.take::<1>()?;
        match port {
            PORT => {
                // What is no socket is the machine's lie: it is closed and costs nobody else anything.
                if let (Some(calls), Ok(socket)) = (calls, GuestSocket::new(connection)) {
                    calls.send(socket).await.map_err(|_| io::ErrorKind::BrokenPipe)?;
                }
            }
            CONTROL_PORT if knock.is_some() => {
                if listen(connection).await
                    && let Some(knock) = knock.take()
                {
                    knock.send(()).ok();
                }
            }
            _ => {}
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether it is a knock. Reads to the end: a template is made when nothing of the connection is left.
async fn listen(connection: OwnedFd) -> bool {
    let whole = async {
        let mut said = Vec::new();
        GuestSocket::new(connection)?.take(MAX_KNOCK).read_to_end(&mut said).await?;
        Ok::<_, io::Error>(said)
    };
    let said = tokio::time::timeout(KNOCK_WAIT, whole).await;
    said.is_ok_and(|said| said.is_ok_and(|said| serde_json::from_slice::<Knock>(&said).is_ok()))
}

#[cfg(test)]
#[path = "visits_test.rs"]
mod tests;
