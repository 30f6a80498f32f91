//! Two small decisions about writes, as functions of values and time: when the image may be dirty, so that a flush has something to do, and
//! whether a write is tried on the spot or left to the ring.
#![forbid(unsafe_code)]

/// What a flush must wait for.
///
/// A write that was *answered* before a flush was begun must be durable when the flush is answered. So a flush has nothing to do if nothing was
/// written since the last flush that succeeded was begun, and no flush is under way (whose writes are not durable yet).
#[derive(Debug)]
pub struct Durability {
    written: bool,
    flushing: u32,
}

impl Default for Durability {
    /// The image may hold what an earlier machine wrote and did not flush.
    fn default() -> Self {
        Self { written: true, flushing: 0 }
    }
}

impl Durability {
    /// A write (or erasure) ended, well or badly.
    pub fn wrote(&mut self) {
        self.written = true;
    }

    /// A flush begins. False if there is nothing to do; otherwise [`Durability::flushed`] must follow.
    pub fn begin_flush(&mut self) -> bool {
        if !self.written && self.flushing == 0 {
            return false;
        }
        self.written = false;
        self.flushing += 1;
        true
    }

    /// A flush ended.
    pub fn flushed(&mut self, well: bool) {
        self.flushing = self.flushing.saturating_sub(1);
        self.written |= !well;
    }
}

/// Most bytes written on the spot.
const MOST: u64 = 2 << 20;
/// How long a write may take that finds room in the page cache: this, and [`NS_PER_BYTE`], nanoseconds.
const QUICK: u64 = 2_000_000;
/// The slowest copying expected, 100 MB/s: of an emulated processor.
const NS_PER_BYTE: u64 = 10;
/// How much longer than a slow write took the next ones go another way.
const PENALTY: u64 = 10;

/// Whether writes go to the page cache at once.
///
/// A write that finds room in the page cache is a copy, and the quickest way to do it is to do it. One that does not (the host is made to wait until dirty
/// pages are on its disk) sleeps, and everything that the event loop serves would sleep with it: after such a write, writes go by the ring for ten
/// times as long as it took, so that at most a tenth of the time is lost.
#[derive(Debug, Default)]
pub struct Patience {
    not_before: u64,
}

impl Patience {
    /// Whether to write `bytes` on the spot at time `now`, nanoseconds.
    pub fn on_the_spot(&self, bytes: u64, now: u64) -> bool {
        now >= self.not_before && bytes <= MOST
    }

    /// Writing `bytes` on the spot took `took`, until `now`, nanoseconds.
    pub fn learn(&mut self, bytes: u64, took: u64, now: u64) {
        if took > QUICK.saturating_add(bytes.saturating_mul(NS_PER_BYTE)) {
            self.not_before = now.saturating_add(took.saturating_mul(PENALTY));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_flush_is_real_and_the_next_is_not() {
        let mut durability = Durability::default();
        assert!(durability.begin_flush());
        durability.flushed(true);
        assert!(!durability.begin_flush());
        durability.wrote();
        assert!(durability.begin_flush());
    }

    #[test]
    fn a_flush_beside_a_flush_is_real() {
        let mut durability = Durability::default();
        assert!(durability.begin_flush());
        assert!(durability.begin_flush());
        durability.flushed(true);
        assert!(durability.begin_flush());
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Write,
        Begin,
        End { which: usize, well: bool },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            Just(Step::Write),
            Just(Step::Begin),
            (0usize..4, prop::bool::weighted(0.8)).prop_map(|(which, well)| Step::End { which, well }),
        ];
        prop::collection::vec(step, 0..80)
    }

    proptest! {
        /// Against a model that knows of each write which flushes cover it.
        #[test]
        fn a_flush_that_does_nothing_has_nothing_to_do(steps in steps()) {
            let mut durability = Durability::default();
            let mut not_durable = vec![0u32];
            let mut written = 1;
            // Flushes under way: the writes that each makes durable.
            let mut flushes: Vec<Vec<u32>> = Vec::new();
            for step in steps {
                match step {
                    Step::Write => {
                        durability.wrote();
                        not_durable.push(written);
                        written += 1;
                    }
                    Step::Begin if durability.begin_flush() => flushes.push(not_durable.clone()),
                    Step::Begin => prop_assert!(not_durable.is_empty()),
                    Step::End { which, well } if which < flushes.len() => {
                        let covered = flushes.remove(which);
                        durability.flushed(well);
                        if well {
                            not_durable.retain(|write| !covered.contains(write));
                        }
                    }
                    Step::End { .. } => {}
                }
            }
        }

        #[test]
        fn at_most_a_tenth_of_the_time_is_lost(writes in prop::collection::vec((0u64..MOST, 0u64..1_000_000_000), 1..100)) {
            let (mut patience, mut now, mut lost) = (Patience::default(), 0, 0);
            for (bytes, took) in writes {
                if patience.on_the_spot(bytes, now) {
                    now += took;
                    patience.learn(bytes, took, now);
                    if took > QUICK + bytes * NS_PER_BYTE {
                        lost += took;
                        prop_assert!(!patience.on_the_spot(bytes, now + took * PENALTY - 1));
                        prop_assert!(patience.on_the_spot(bytes, now + took * PENALTY));
                        now += took * PENALTY;
                    }
                } else {
                    now += took;
                }
            }
            prop_assert!(lost * PENALTY <= now);
        }

        #[test]
        fn too_much_is_never_written_on_the_spot(bytes in MOST + 1.., now in any::<u64>()) {
            prop_assert!(!Patience::default().on_the_spot(bytes, now));
        }
    }
}
