//! Slices whose time is over leave their nodes.
//!
//! Wakes at the next end, when ends change, and every minute (the machine's clock may be set meanwhile).

use std::time::Duration;

use jiff::Timestamp;

use crate::db::{Db, now};
use crate::error::Result;
use crate::wake::Topic;

const AT_MOST: Duration = Duration::from_secs(60);

/// Runs until aborted.
pub async fn run(db: Db) {
    let mut changes = db.wakers().subscribe(Topic::Expiry);
    loop {
        changes.mark_unchanged();
        let wait = match round(&db).await {
            Ok(next) => next.map_or(AT_MOST, |end| until(now(), end)),
            Err(e) => {
                tracing::error!(error = %e, "slices could not be expired; trying again in a minute");
                AT_MOST
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

async fn round(db: &Db) -> Result<Option<Timestamp>> {
    let mut tx = db.write().await?;
    let next = crate::db::desired::expire(&mut tx).await?;
    tx.commit().await?;
    Ok(next)
}

/// How long to sleep; a millisecond at least, so that a clock that stands still costs little.
fn until(now: Timestamp, end: Timestamp) -> Duration {
    let wait = Duration::try_from(end.duration_since(now)).unwrap_or(Duration::ZERO);
    wait.clamp(Duration::from_millis(1), AT_MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeps_until_the_end_but_never_long_nor_backwards() {
        let at = |ms| Timestamp::from_millisecond(ms).unwrap();
        assert_eq!(until(at(1000), at(3000)), Duration::from_secs(2));
        assert_eq!(until(at(3000), at(1000)), Duration::from_millis(1));
        assert_eq!(until(at(0), at(10_000_000)), AT_MOST);
    }
}
