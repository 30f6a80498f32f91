//! Which templates there are, how they fared, and what is to be done next. Pure: time and facts are passed in.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::Key;

/// Most templates at a time. Each holds what a booted guest has written, some tens of MiB of the host's memory; shapes are tenants' choice.
const MAX: usize = 8;
/// How long one that no sliver needs is kept.
const KEPT_UNUSED: Duration = Duration::from_secs(600);
/// Between attempts to make one: the first wait and the last.
const FIRST_BACKOFF: Duration = Duration::from_secs(10);
const LAST_BACKOFF: Duration = Duration::from_secs(600);
/// Clones in a row that may fail before the template is given up.
const MAX_FAILED_CLONES: u32 = 3;

/// The templates of a node.
#[derive(Debug, Default)]
pub struct Shelf {
    there: BTreeMap<Key, There>,
    failed: BTreeMap<Key, Failed>,
}

#[derive(Debug)]
struct There {
    last_needed: Instant,
    failed_clones: u32,
    has_clone: bool,
}

#[derive(Debug, Clone, Copy)]
struct Failed {
    not_before: Instant,
    backoff: Duration,
}

/// What to do about a template that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Use it.
    There,
    /// Make it.
    Make,
    /// It failed a moment ago: do without, for so long.
    Later(Duration),
}

impl Shelf {
    /// It is wanted.
    pub fn take(&mut self, key: &Key, now: Instant) -> Verdict {
        if let Some(there) = self.there.get_mut(key) {
            there.last_needed = now;
            return Verdict::There;
        }
        match self.failed.get(key) {
            Some(failed) if now < failed.not_before => Verdict::Later(failed.not_before - now),
            _ => Verdict::Make,
        }
    }

    /// It was made, or found.
    pub fn made(&mut self, key: &Key, now: Instant) {
        self.there.insert(key.clone(), There { last_needed: now, failed_clones: 0, has_clone: false });
    }

    /// It could not be made.
    pub fn failed(&mut self, key: &Key, now: Instant) {
        let before = self.failed.get(key).map(|failed| failed.backoff);
        let backoff = before.map_or(FIRST_BACKOFF, |before| (before * 2).min(LAST_BACKOFF));
        // Bounded: what is over is forgotten, and one that is wanted again and again is there.
        self.failed.retain(|_, failed| failed.not_before + LAST_BACKOFF > now);
        self.failed.insert(key.clone(), Failed { not_before: now + backoff, backoff });
    }

    /// A clone of it is ready. True for the first one.
    pub fn cloned(&mut self, key: &Key) -> bool {
        self.failed.remove(key);
        let Some(there) = self.there.get_mut(key) else { return false };
        there.failed_clones = 0;
        !std::mem::replace(&mut there.has_clone, true)
    }

    /// A clone did not come up, perhaps because the machine refused the template. True if the template is to be removed.
    pub fn clone_failed(&mut self, key: &Key, refused: bool, now: Instant) -> bool {
        let Some(there) = self.there.get_mut(key) else { return false };
        there.failed_clones += 1;
        if !refused && there.failed_clones < MAX_FAILED_CLONES {
            return false;
        }
        self.there.remove(key);
        self.failed(key, now);
        true
    }

    /// Makes room for one more: the key of one to be removed, if there must be one.
    ///
    /// # Errors
    /// All are needed.
    pub fn make_room(&mut self, in_use: &BTreeSet<Key>) -> Result<Option<Key>, String> {
        if self.there.len() < MAX {
            return Ok(None);
        }
        let idle = self.there.iter().filter(|(key, _)| !in_use.contains(key));
        let oldest = idle.min_by_key(|(_, there)| there.last_needed).map(|(key, _)| key.clone());
        let oldest = oldest.ok_or(format!("{MAX} templates of other shapes are in use"))?;
        self.there.remove(&oldest);
        Ok(Some(oldest))
    }

    /// Takes off what no sliver has needed for a while.
    pub fn unused(&mut self, in_use: &BTreeSet<Key>, now: Instant) -> Vec<Key> {
        let mut gone = Vec::new();
        self.there.retain(|key, there| {
            if in_use.contains(key) {
                there.last_needed = now;
            }
            let kept = now.saturating_duration_since(there.last_needed) < KEPT_UNUSED;
            if !kept {
                gone.push(key.clone());
            }
            kept
        });
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> Key {
        Key::parse(&format!("{n:024x}")).unwrap()
    }

    #[test]
    fn failures_are_waited_out_longer_and_longer_and_forgotten_when_a_clone_works() {
        let (mut shelf, mut now, key) = (Shelf::default(), Instant::now(), key(1));
        assert_eq!(shelf.take(&key, now), Verdict::Make);
        for wait in [10, 20, 40, 80, 160, 320, 600, 600] {
            shelf.failed(&key, now);
            assert_eq!(shelf.take(&key, now), Verdict::Later(Duration::from_secs(wait)));
            now += Duration::from_secs(wait);
            assert_eq!(shelf.take(&key, now), Verdict::Make);
        }
        shelf.made(&key, now);
        assert!(shelf.cloned(&key));
        assert!(!shelf.cloned(&key), "only the first clone is the first");
        assert!(shelf.clone_failed(&key, true, now), "a refusal counts at once");
        assert_eq!(shelf.take(&key, now), Verdict::Later(FIRST_BACKOFF));
        assert!(!shelf.clone_failed(&key, true, now), "it is gone already");
    }

    #[test]
    fn clones_that_fail_in_a_row_condemn_it_and_single_ones_do_not() {
        let (mut shelf, now, key) = (Shelf::default(), Instant::now(), key(1));
        shelf.made(&key, now);
        for _ in 0..5 {
            assert!(!shelf.clone_failed(&key, false, now));
            assert!(!shelf.clone_failed(&key, false, now));
            shelf.cloned(&key);
        }
        assert!(!shelf.clone_failed(&key, false, now));
        assert!(!shelf.clone_failed(&key, false, now));
        assert!(shelf.clone_failed(&key, false, now));
    }

    #[test]
    fn there_are_at_most_so_many_and_the_idle_ones_go() {
        let (mut shelf, start) = (Shelf::default(), Instant::now());
        for n in 0..MAX {
            assert_eq!(shelf.make_room(&BTreeSet::new()), Ok(None));
            shelf.made(&key(n), start + Duration::from_secs(n as u64));
        }
        let all: BTreeSet<Key> = (0..MAX).map(key).collect();
        shelf.make_room(&all).unwrap_err();
        let but_two = all.iter().filter(|k| **k != key(3) && **k != key(5)).cloned().collect();
        assert_eq!(shelf.make_room(&but_two), Ok(Some(key(3))));
        assert_eq!(shelf.unused(&but_two, start + Duration::from_secs(604)), []);
        assert_eq!(shelf.unused(&but_two, start + Duration::from_secs(605)), [key(5)]);
        assert_eq!(shelf.unused(&BTreeSet::new(), start + Duration::from_secs(1205)).len(), MAX - 2);
    }
}
