//! What no two clones of a template may have in common, and how that is told.

use std::collections::{BTreeMap, BTreeSet};

/// What a clone says of itself, by name.
pub type Identity = BTreeMap<String, String>;

/// Milliseconds since 1970 as the clone sees them: the one value that must be alike.
pub const CLOCK: &str = "clock";
/// Two initial sequence numbers of TCP connections.
pub const SEQUENCE: &str = "TCP initial sequence numbers";
/// The same without the part that the clock gives, so clones with one secret have almost one number.
pub const SEQUENCE_SECRET: &str = "TCP sequence secret";
/// The kernel counts initial sequence numbers up with the clock's nanoseconds, shifted by this.
pub const CLOCK_SHIFT: u32 = 6;
/// Two numbers are almost one when they are nearer than this: what the clock adds in 67 ms.
const NEAR: u32 = 1 << 20;

/// What of `clones` is alike that must not be: one line each. Each clone must have said the same names.
pub fn alike(clones: &[Identity]) -> Vec<String> {
    let names: BTreeSet<&String> = clones.iter().flat_map(BTreeMap::keys).collect();
    let mut problems = Vec::new();
    for name in names {
        let values: Vec<&String> = clones.iter().filter_map(|c| c.get(name)).collect();
        if values.len() < clones.len() {
            problems.push(format!("{name}: only {} of {} clones have one", values.len(), clones.len()));
        }
        let different = values.iter().collect::<BTreeSet<_>>().len();
        match name.as_str() {
            CLOCK => {}
            SEQUENCE_SECRET => problems.extend(secrets(&values)),
            _ if different < values.len() => {
                problems.push(format!("{name}: {} clones have only {different} of them", values.len()));
            }
            _ => {}
        }
        problems.extend(values.iter().any(|v| v.is_empty()).then(|| format!("{name}: empty")));
    }
    problems
}

/// Two clones share a secret if both of their numbers are almost the same.
fn secrets(values: &[&String]) -> Option<String> {
    let numbers = |text: &str| text.split(' ').map(|n| n.parse().ok()).collect::<Option<Vec<u32>>>();
    let parsed: Vec<Vec<u32>> = values.iter().filter_map(|v| numbers(v)).collect();
    if parsed.len() < values.len() {
        return Some(format!("{SEQUENCE_SECRET}: not all are numbers"));
    }
    let near = |a: u32, b: u32| a.wrapping_sub(b).min(b.wrapping_sub(a)) < NEAR;
    let same = |a: &[u32], b: &[u32]| a.iter().zip(b).all(|(a, b)| near(*a, *b));
    let pairs = (0..parsed.len()).flat_map(|i| (0..i).map(move |j| (i, j)));
    let shared = pairs.filter(|(i, j)| same(&parsed[*i], &parsed[*j])).count();
    (shared > 0).then(|| format!("{SEQUENCE_SECRET}: {shared} pairs of clones share it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clone(id: &str, secret: &str) -> Identity {
        [("machine-id", id), (SEQUENCE_SECRET, secret), (CLOCK, "5")]
            .map(|(k, v)| (k.into(), v.into()))
            .into()
    }

    #[test]
    fn different_clones_have_nothing_to_complain_of() {
        assert_eq!(alike(&[clone("a", "1 1"), clone("b", "2 3000000000")]), Vec::<String>::new());
    }

    #[test]
    fn what_is_alike_is_named() {
        assert_eq!(
            alike(&[clone("a", "1 1"), clone("a", "90000000 1")]),
            ["machine-id: 2 clones have only 1 of them"]
        );
    }

    #[test]
    fn a_shared_secret_is_seen_although_the_clock_went_on() {
        let problems = alike(&[clone("a", "4294967295 70"), clone("b", "3000 900")]);
        assert_eq!(problems, [format!("{SEQUENCE_SECRET}: 1 pairs of clones share it")]);
        assert_eq!(
            alike(&[clone("a", "1 1"), clone("b", "x 1")]),
            [format!("{SEQUENCE_SECRET}: not all are numbers")]
        );
    }

    #[test]
    fn what_is_missing_or_empty_is_named() {
        let mut missing = clone("a", "1 1");
        missing.remove("machine-id");
        let problems = alike(&[missing, clone("", "90000000 1")]);
        assert_eq!(problems, ["machine-id: only 1 of 2 clones have one", "machine-id: empty"]);
    }
}
