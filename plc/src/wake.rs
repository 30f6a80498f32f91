//! Who waits for which change. A long poll subscribes first and reads the database then, so no change falls between.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use commonage_isolation_api::{NodeId, SliceName};
use tokio::sync::watch;

/// What changes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Topic {
    /// What a node should run.
    Node(NodeId),
    /// A slice, or what is reported of it.
    Slice(SliceName),
    /// When the next slice expires.
    Expiry,
}

/// All who wait.
#[derive(Debug, Clone, Default)]
pub struct Wakers(Arc<Mutex<HashMap<Topic, watch::Sender<()>>>>);

impl Wakers {
    /// Sees every change of `topic` from now on.
    pub fn subscribe(&self, topic: Topic) -> watch::Receiver<()> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(topic).or_insert_with(|| watch::Sender::new(())).subscribe()
    }

    /// Tells those who wait for these. Entries that nobody waits for any more go.
    pub fn wake(&self, topics: &BTreeSet<Topic>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for topic in topics {
            if let Some(sender) = all.get(topic) {
                if sender.receiver_count() == 0 {
                    all.remove(topic);
                } else {
                    sender.send_replace(());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_topic_wakes_and_nothing_is_lost() {
        let wakers = Wakers::default();
        let slice = |name: &str| Topic::Slice(name.parse().unwrap());
        let (mut a, b) = (wakers.subscribe(slice("x_a")), wakers.subscribe(slice("x_b")));
        wakers.wake(&BTreeSet::from([slice("x_a"), Topic::Expiry]));
        a.changed().await.unwrap();
        assert!(!b.has_changed().unwrap());
    }

    #[test]
    fn entries_nobody_waits_for_go() {
        let wakers = Wakers::default();
        drop(wakers.subscribe(Topic::Expiry));
        wakers.wake(&BTreeSet::from([Topic::Expiry]));
        assert!(wakers.0.lock().unwrap().is_empty());
    }
}
