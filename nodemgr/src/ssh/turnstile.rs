//! How many may be in at a time, counted for each key: a source address, a slice. Nobody keeps others out by coming often.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

/// Counts who is in. Clones are the same. It holds an entry for those only who are in.
#[derive(Debug, Clone)]
pub(super) struct Turnstile<K>(Arc<Mutex<HashMap<K, usize>>>);

/// One who is in, until this is dropped.
#[derive(Debug)]
pub(super) struct Entry<K: Eq + Hash> {
    turnstile: Turnstile<K>,
    key: K,
}

impl<K: Eq + Hash + Clone> Turnstile<K> {
    pub(super) fn new() -> Self {
        Self(Arc::default())
    }

    /// Lets one more in under this key, unless `most` are.
    pub(super) fn enter(&self, key: K, most: usize) -> Option<Entry<K>> {
        let mut inside = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = inside.get(&key).copied().unwrap_or(0);
        if count >= most {
            return None;
        }
        inside.insert(key.clone(), count + 1);
        Some(Entry { turnstile: self.clone(), key })
    }
}

impl<K: Eq + Hash> Drop for Entry<K> {
    fn drop(&mut self) {
        let mut inside = self.turnstile.0.lock().unwrap_or_else(PoisonError::into_inner);
        match inside.get_mut(&self.key) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(inside.remove(&self.key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_each_key_by_itself_and_forgets_those_who_left() {
        let turnstile = Turnstile::new();
        let first = turnstile.enter("a", 2);
        let second = turnstile.enter("a", 2);
        assert!(first.is_some() && second.is_some());
        assert!(turnstile.enter("a", 2).is_none());
        assert!(turnstile.enter("b", 2).is_some());
        drop(first);
        let third = turnstile.enter("a", 2);
        assert!(third.is_some() && turnstile.enter("a", 2).is_none());
        drop((second, third));
        assert!(turnstile.0.lock().unwrap().is_empty());
    }
}
