//! Relative shares (PDN-04-017 §3.3): `rspec.share = (s_i / Σ s) × S` over a site's active slices.
//!
//! A slice share s_i is a plain number; site shares S are whole shares; rspec.share is in thousandths of a share.
//! Integers only, rounded down, so that what a site's slices get never adds up to more than S. A node cannot schedule
//! a share of nothing, so a slice that would round to 0 gets one thousandth, taken from the largest.

/// Thousandths in a share.
pub const THOUSANDTHS: u64 = 1000;
/// Largest slice share.
pub const MAX_SLICE_SHARE: u32 = 1_000_000;
/// Largest site share: an rspec's share is at most 10,000,000 thousandths.
pub const MAX_SITE_SHARES: u32 = 10_000;

/// The rspec.share of each slice, thousandths, in the order of `slice_shares`. `None` if there are more slices than thousandths.
pub fn divide(site_shares: u32, slice_shares: &[u32]) -> Option<Vec<u32>> {
    let whole = u64::from(site_shares) * THOUSANDTHS;
    if slice_shares.len() as u64 > whole {
        return None;
    }
    let sum: u64 = slice_shares.iter().map(|s| u64::from(*s)).sum();
    let part = |s: u32| {
        let exact = (u128::from(s) * u128::from(whole)).checked_div(u128::from(sum)).unwrap_or(0);
        u32::try_from(exact).unwrap_or(u32::MAX)
    };
    let mut parts: Vec<u32> = slice_shares.iter().map(|s| part(*s).max(1)).collect();
    let given: u64 = parts.iter().map(|p| u64::from(*p)).sum();
    // Raising zeros to one may have given away more than there is. The largest pay, and none falls below another that was smaller.
    for _ in whole..given {
        if let Some(largest) = parts.iter_mut().max() {
            *largest = largest.saturating_sub(1).max(1);
        }
    }
    Some(parts)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ten_to_one_is_ten_times_the_capacity() {
        assert_eq!(divide(100, &[10, 1]), Some(vec![90_909, 9_090]));
    }

    #[test]
    fn one_slice_has_all() {
        assert_eq!(divide(100, &[7]), Some(vec![100_000]));
    }

    #[test]
    fn none_is_none() {
        assert_eq!(divide(100, &[]), Some(vec![]));
    }

    #[test]
    fn the_tiny_get_something_and_the_largest_pays() {
        assert_eq!(divide(1, &[1_000_000, 1, 1]), Some(vec![998, 1, 1]));
    }

    #[test]
    fn more_slices_than_thousandths_cannot_be_served() {
        assert_eq!(divide(1, &vec![1; 1001]), None);
        assert_eq!(divide(1, &vec![1; 1000]), Some(vec![1; 1000]));
    }

    proptest! {
        #[test]
        fn shares_are_fair(
            site in 1..=MAX_SITE_SHARES,
            slices in proptest::collection::vec(prop_oneof![1..=20_u32, 1..=MAX_SLICE_SHARE], 1..60),
        ) {
            let whole = u64::from(site) * THOUSANDTHS;
            let parts = divide(site, &slices).unwrap();
            let given: u64 = parts.iter().map(|p| u64::from(*p)).sum();
            prop_assert!(given <= whole, "{given} of {whole}");
            let sum: u64 = slices.iter().map(|s| u64::from(*s)).sum();
            let zeros = slices.iter().filter(|s| u64::from(**s) * whole < sum).count() as u64;
            for (s, p) in slices.iter().zip(&parts) {
                prop_assert!(*p >= 1);
                let exact = u64::from(*s) * whole / sum;
                prop_assert!(u64::from(*p) <= exact.max(1));
                prop_assert!(u64::from(*p) + zeros >= exact, "{p} for {exact}");
            }
            for (a, pa) in slices.iter().zip(&parts) {
                for (b, pb) in slices.iter().zip(&parts) {
                    // Equals may differ by the one thousandth that was left over.
                    if a > b { prop_assert!(pa + 1 >= *pb); }
                }
            }
        }

        #[test]
        fn a_slice_more_never_gives_the_others_more(
            site in 1..=MAX_SITE_SHARES,
            slices in proptest::collection::vec(1..=1000_u32, 1..20),
            more in 1..=1000_u32,
        ) {
            let before = divide(site, &slices).unwrap();
            let after = divide(site, &[slices.as_slice(), &[more]].concat()).unwrap();
            for (b, a) in before.iter().zip(&after) {
                prop_assert!(a <= b || (*b == 1 && *a == 1) || a - b <= 1);
            }
        }
    }
}
