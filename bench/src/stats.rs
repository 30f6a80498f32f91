//! Percentiles and ratios of samples. No sample is ever discarded.

/// The smallest sample that at least `percent` of all are not above (nearest rank). Nothing of nothing.
pub fn percentile(samples: &[f64], percent: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied()
}

/// The middle sample.
pub fn median(samples: &[f64]) -> Option<f64> {
    percentile(samples, 50.0)
}

/// How much one thing takes for each unit of another: the ratio of the medians. Nothing if either has no samples.
pub fn ratio(ours: &[f64], theirs: &[f64]) -> Option<f64> {
    let (ours, theirs) = (median(ours)?, median(theirs)?);
    (theirs > 0.0).then(|| ours / theirs)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let samples = [5.0, 1.0, 4.0, 2.0, 3.0];
        assert_eq!(median(&samples), Some(3.0));
        assert_eq!(percentile(&samples, 99.0), Some(5.0));
        assert_eq!(percentile(&samples, 0.0), Some(1.0));
        assert_eq!(percentile(&samples, 20.0), Some(1.0));
        assert_eq!(percentile(&samples, 20.1), Some(2.0));
        assert_eq!(percentile(&[], 50.0), None);
    }

    #[test]
    fn ratios_are_of_medians() {
        assert_eq!(ratio(&[1.0, 2.0, 90.0], &[4.0]), Some(0.5));
        assert_eq!(ratio(&[1.0], &[]), None);
        assert_eq!(ratio(&[1.0], &[0.0]), None);
    }

    proptest! {
        #[test]
        fn enough_samples_are_not_above(samples in prop::collection::vec(0.0..1e6_f64, 1..80), percent in 0.0..100.0_f64) {
            let p = percentile(&samples, percent).unwrap();
            let not_above = samples.iter().filter(|s| **s <= p).count() as f64;
            prop_assert!(samples.contains(&p));
            prop_assert!(not_above >= percent / 100.0 * samples.len() as f64);
        }
    }
}
