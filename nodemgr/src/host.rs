//! The node's own address, as node-init writes it to `host.json` after DHCP and again whenever it changes.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use rustix::fs::inotify;
use serde::Deserialize;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use crate::error::Error;

const NAME: &str = "host.json";

/// The node's place on its network.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Host {
    /// Its one address.
    pub address: Ipv4Addr,
    /// Length of its prefix, bits.
    pub prefix_len: u8,
    /// Next hop for what is outside the prefix.
    pub gateway: Option<Ipv4Addr>,
    /// Name servers.
    #[serde(default)]
    pub dns: Vec<Ipv4Addr>,
}

/// Reads `host.json` in `run` and follows it. `None` until node-init has an address.
///
/// # Errors
/// The directory cannot be watched.
pub fn follow(run: &Path) -> Result<watch::Receiver<Option<Host>>, Error> {
    let failed = |e: rustix::io::Errno| Error::io("watch", run)(e.into());
    let watcher =
        inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).map_err(failed)?;
    let events = inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::CLOSE_WRITE;
    inotify::add_watch(&watcher, run, events).map_err(failed)?;
    // To tokio an inotify descriptor is what the reading end of a pipe is: readable, then read without waiting.
    let watcher = pipe::Receiver::from_owned_fd_unchecked(watcher).map_err(Error::io("watch", run))?;
    // Read after the watch stands: a change in between is seen twice rather than never.
    let path = run.join(NAME);
    let (sender, receiver) = watch::channel(read(&path));
    tokio::spawn(reread(watcher, path, sender));
    Ok(receiver)
}

async fn reread(watcher: pipe::Receiver, path: PathBuf, sender: watch::Sender<Option<Host>>) {
    while !sender.is_closed() {
        if watcher.readable().await.is_err() {
            return;
        }
        // What happened does not matter: the file says it. Reading empties the queue.
        while watcher.try_read(&mut [0u8; 4096]).is_ok_and(|n| n > 0) {}
        if let Some(host) = read(&path) {
            sender.send_if_modified(|old| {
                let changed = old.as_ref() != Some(&host);
                *old = Some(host);
                changed
            });
        }
    }
}

fn read(path: &Path) -> Option<Host> {
    let text = std::fs::read(path).ok()?;
    let parsed: Result<Host, _> = serde_json::from_slice(&text);
    parsed.inspect_err(|e| tracing::warn!("{} is malformed: {e}", path.display())).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_is_seen_when_it_comes_and_when_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let mut host = follow(dir.path()).unwrap();
        assert_eq!(*host.borrow_and_update(), None);
        for last in [15, 16] {
            let json = format!(
                r#"{{"address":"10.0.2.{last}","prefix_len":24,"gateway":"10.0.2.2","dns":["10.0.2.3"]}}"#
            );
            std::fs::write(dir.path().join("new"), json).unwrap();
            std::fs::rename(dir.path().join("new"), dir.path().join(NAME)).unwrap();
            host.changed().await.unwrap();
            let seen = host.borrow_and_update().clone().unwrap();
            assert_eq!(seen.address, Ipv4Addr::new(10, 0, 2, last));
        }
    }
}
