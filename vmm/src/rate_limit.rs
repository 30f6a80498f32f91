//! How fast a device may be used: token buckets that may go into debt.
//!
//! A request is begun while every bucket holds something, and then costs what it costs, though the bucket may not have held as much. So a request
//! of any size is begun at some time, and the debt it leaves makes the next one wait. In any stretch of time at most
//! *rate × time + depth + one request* is used.
//!
//! A pure function of the times passed in. Times are nanoseconds since an arbitrary origin; waits are rounded up, so that whoever waits as long
//! as told can go on.
#![forbid(unsafe_code)]

use commonage_vmm_api::RateLimit;

/// Nanoseconds in a second, and parts in a token.
const SECOND: i128 = 1_000_000_000;

/// One bucket, one second deep.
///
/// Its level is counted in token-nanoseconds, a billion to a token: a nanosecond adds exactly `per_second` of them, so nothing is ever rounded away.
#[derive(Debug, Clone)]
struct Bucket {
    per_second: i128,
    /// At most `per_second * SECOND`. Below zero: debt.
    level: i128,
    /// When `level` was right, nanoseconds.
    at: u64,
}

impl Bucket {
    /// A full bucket; none if there is no bound.
    fn new(per_second: u64, now: u64) -> Option<Self> {
        let per_second = i128::from(per_second);
        (per_second > 0).then(|| Self { per_second, level: per_second * SECOND, at: now })
    }

    fn refill(&mut self, now: u64) {
        // A clock that went back adds nothing, and neither does it add the same time twice.
        let elapsed = i128::from(now.saturating_sub(self.at));
        self.at = self.at.max(now);
        let gained = self.per_second.saturating_mul(elapsed);
        self.level = self.level.saturating_add(gained).min(self.per_second * SECOND);
    }

    /// Nanoseconds until it holds something, rounded up.
    fn wait(&mut self, now: u64) -> u64 {
        self.refill(now);
        let missing = 1 - self.level;
        if missing <= 0 {
            return 0;
        }
        u64::try_from((missing + self.per_second - 1) / self.per_second).unwrap_or(u64::MAX)
    }

    fn take(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(i128::from(tokens) * SECOND);
    }
}

/// The buckets of one device.
#[derive(Debug, Clone, Default)]
pub struct Limiter {
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
}

impl Limiter {
    /// Full buckets at time `now`.
    pub fn new(rate: RateLimit, now: u64) -> Self {
        Self {
            bytes: Bucket::new(rate.bytes_per_second, now),
            requests: Bucket::new(rate.requests_per_second, now),
        }
    }

    /// Nanoseconds from `now` until the next request may be begun; 0 if it may at once.
    pub fn wait(&mut self, now: u64) -> u64 {
        let buckets = [&mut self.bytes, &mut self.requests];
        buckets.into_iter().flatten().map(|bucket| bucket.wait(now)).max().unwrap_or(0)
    }

    /// A request of `bytes` was begun at the time last asked about.
    pub fn take(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.requests {
            bucket.take(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NS: u64 = SECOND as u64;

    fn limiter(bytes_per_second: u64, requests_per_second: u64) -> Limiter {
        Limiter::new(RateLimit { bytes_per_second, requests_per_second }, 0)
    }

    #[test]
    fn no_bound_never_waits() {
        let mut limiter = limiter(0, 0);
        for _ in 0..1000 {
            assert_eq!(limiter.wait(0), 0);
            limiter.take(u64::MAX);
        }
    }

    #[test]
    fn a_second_of_depth_then_the_rate() {
        let mut limiter = limiter(0, 4);
        for _ in 0..4 {
            assert_eq!(limiter.wait(0), 0);
            limiter.take(0);
        }
        // Empty: the first part of a token lets the next request begin.
        assert_eq!(limiter.wait(0), 1);
        limiter.take(0);
        assert_eq!(limiter.wait(0), NS / 4 + 1);
        assert_eq!(limiter.wait(NS / 4), 1);
        assert_eq!(limiter.wait(NS / 4 + 1), 0);
    }

    #[test]
    fn a_request_larger_than_the_bucket_is_begun_and_paid_for() {
        let mut limiter = limiter(1000, 0);
        assert_eq!(limiter.wait(0), 0);
        limiter.take(60_000);
        assert_eq!(limiter.wait(0), 59 * NS + 1);
        assert_eq!(limiter.wait(59 * NS + 1), 0);
    }

    #[test]
    fn extremes_neither_overflow_nor_stall() {
        let mut limiter = limiter(u64::MAX, 1);
        assert_eq!(limiter.wait(u64::MAX), 0);
        limiter.take(u64::MAX);
        limiter.take(u64::MAX);
        assert!(limiter.wait(u64::MAX) > 0);
        let mut slow = Limiter::new(RateLimit { bytes_per_second: 1, requests_per_second: 0 }, 0);
        slow.take(u64::MAX);
        assert_eq!(slow.wait(0), u64::MAX);
        // A clock that goes back.
        assert_eq!(slow.wait(5), slow.wait(3));
    }

    /// The obvious bucket: exact, one nanosecond at a time.
    struct Reference {
        rate: i128,
        level: i128,
        at: u64,
    }

    impl Reference {
        fn advance(&mut self, now: u64) {
            while self.at < now {
                self.at += 1;
                self.level = (self.level + self.rate).min(self.rate * SECOND);
            }
        }
    }

    proptest! {
        #[test]
        fn it_agrees_with_one_nanosecond_at_a_time(
            rate in prop_oneof![1u64..10, 1_000_000u64..2_000_000_000],
            steps in prop::collection::vec((0u64..2000, prop::option::of(0u64..50)), 1..60),
        ) {
            let mut bucket = Bucket::new(rate, 0).unwrap();
            let mut reference = Reference { rate: i128::from(rate), level: i128::from(rate) * SECOND, at: 0 };
            // Near its bottom, where something happens.
            bucket.level = 0;
            reference.level = 0;
            let mut now = 0;
            for (elapsed, cost) in steps {
                now += elapsed;
                reference.advance(now);
                prop_assert_eq!(bucket.wait(now) == 0, reference.level > 0);
                prop_assert_eq!(bucket.level, reference.level);
                if let Some(cost) = cost {
                    bucket.take(cost);
                    reference.level -= i128::from(cost) * SECOND;
                }
            }
        }

        #[test]
        fn whoever_waits_as_told_goes_on_and_no_earlier(
            bytes in 1u64..1_000_000_000_000,
            requests in 1u64..1_000_000,
            costs in prop::collection::vec(0u64..1 << 40, 1..100),
        ) {
            let mut limiter = limiter(bytes, requests);
            let mut now = 0;
            for cost in costs {
                let wait = limiter.wait(now);
                if wait > 1 {
                    prop_assert!(limiter.clone().wait(now + wait - 1) > 0);
                }
                now += wait;
                prop_assert_eq!(limiter.wait(now), 0);
                limiter.take(cost);
            }
        }

        #[test]
        fn no_stretch_of_time_gets_more_than_its_share(
            rate in 1u64..10_000_000_000,
            arrivals in prop::collection::vec((0u64..3_000_000_000, 0u64..20_000_000_000), 1..60),
        ) {
            let mut limiter = limiter(rate, 0);
            let mut now = 0;
            let mut begun: Vec<(u64, u64)> = Vec::new();
            for (pause, cost) in arrivals {
                now += pause;
                now += limiter.wait(now);
                prop_assert_eq!(limiter.wait(now), 0);
                limiter.take(cost);
                begun.push((now, cost));
            }
            for (first, (start, _)) in begun.iter().enumerate() {
                let mut used: i128 = 0;
                for (end, cost) in &begun[first..] {
                    // Whatever came before the last request of a stretch fits; the last one may exceed it.
                    let share = i128::from(rate) * (SECOND + i128::from(end - start));
                    prop_assert!(used * SECOND < share);
                    used += i128::from(*cost);
                }
            }
        }
    }
}
