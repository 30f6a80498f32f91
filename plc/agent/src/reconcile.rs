//! From what is wanted and what is there to what to do: a function of values.
//!
//! The order is part of the plan: rights that nobody uses are given back and slivers that nobody wants are deleted first, so that what they held is free for what comes.

use std::collections::BTreeMap;

use commonage_isolation_api::{Rcap, Rspec, SliceName};
use commonage_nodemgr_api::http::{Acquired, Sliver, SliverConfig};
use commonage_plc_api::node::DesiredSliver;
use jiff::Timestamp;

/// A call to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Give back a right that is bound to nothing: an agent died between acquire and bind.
    Release(Rcap),
    /// Remove a sliver that is not wanted.
    Delete(SliceName),
    /// Acquire and bind.
    Create(Box<DesiredSliver>),
    /// Move the end, change the share.
    Renew {
        /// Whose.
        slice: SliceName,
        /// The right.
        rcap: Rcap,
        /// The new end.
        end: Timestamp,
        /// The new share, thousandths.
        share: u32,
    },
    /// Change keys, boot script and what happens when the machine ends.
    Configure(SliceName, SliverConfig),
    /// What is wanted cannot be had without losing the sliver's disk: say so and leave it alone.
    Refuse(SliceName, String),
}

impl Action {
    /// The slice it is about.
    pub fn slice(&self) -> Option<&SliceName> {
        match self {
            Self::Release(_) => None,
            Self::Delete(slice) | Self::Configure(slice, _) | Self::Refuse(slice, _) => Some(slice),
            Self::Renew { slice, .. } => Some(slice),
            Self::Create(sliver) => Some(&sliver.slice),
        }
    }
}

/// What to do so that `there` becomes `wanted`. `me` is the agent's own slice, which the node manager keeps.
pub fn plan(wanted: &[DesiredSliver], there: &[Sliver], rcaps: &[Acquired], me: &str) -> Vec<Action> {
    let there: BTreeMap<&SliceName, &Sliver> =
        there.iter().filter(|s| s.slice.as_str() != me).map(|s| (&s.slice, s)).collect();
    let mut actions: Vec<Action> =
        rcaps.iter().filter(|r| r.bound_to.is_none()).map(|r| Action::Release(r.rcap.clone())).collect();
    let unwanted = there.keys().filter(|slice| !wanted.iter().any(|w| &w.slice == **slice));
    actions.extend(unwanted.map(|slice| Action::Delete((*slice).clone())));
    for want in wanted.iter().filter(|w| w.slice.as_str() != me) {
        let Some(have) = there.get(&want.slice) else {
            actions.push(Action::Create(Box::new(want.clone())));
            continue;
        };
        if have.rspec.interval.start != want.rspec.interval.start {
            // Another slice of the same name, made while this node was away: what the old one left is not for the new one's owners.
            actions.extend([Action::Delete(want.slice.clone()), Action::Create(Box::new(want.clone()))]);
            continue;
        }
        let (rcap, end, share) = (have.rcap.clone(), want.rspec.interval.end, want.rspec.share);
        if have.rspec.interval.end != end || have.rspec.share != share {
            actions.push(Action::Renew { slice: want.slice.clone(), rcap, end, share });
        }
        let changeable = |c: &SliverConfig| (c.ssh_keys.clone(), c.boot_script.clone(), c.restart);
        if changeable(&have.config) != changeable(&want.config) {
            // The base of what lives stays; whether another one is wanted is said below.
            let config = SliverConfig { base: have.config.base.clone(), ..want.config.clone() };
            actions.push(Action::Configure(want.slice.clone(), config));
        }
        // Last, so that it is what is reported; who may log in and until when has been brought up to date all the same.
        if let Some(reason) = fixed_part_differs(want, have) {
            actions.push(Action::Refuse(want.slice.clone(), reason));
        }
    }
    actions
}

/// Whether something differs that a living sliver cannot change.
fn fixed_part_differs(want: &DesiredSliver, have: &Sliver) -> Option<String> {
    let advice =
        "delete the sliver from this node and instantiate it again to change it; its disk is lost then";
    if want.config.base != have.config.base {
        return Some(format!(
            "the sliver has base {}, {} is wanted: {advice}",
            have.config.base, want.config.base
        ));
    }
    let fixed = |r: &Rspec| (r.memory_mib, r.disk_mib, r.vcpus, r.ports.clone(), r.privileges.clone());
    if fixed(&want.rspec) == fixed(&have.rspec) {
        return None;
    }
    Some(format!(
        "memory, disk, processors, ports or privileges of the living sliver differ from what is wanted: {advice}"
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use commonage_isolation_api::Interval;
    use commonage_nodemgr_api::http::{PortGrant, SliverState};
    use proptest::prelude::*;

    use super::*;

    const ME: &str = "plc_agent";

    fn rcap(n: u8) -> Rcap {
        format!("{n:032x}").parse().unwrap()
    }

    fn rspec(share: u32, end_s: i64, memory_mib: u32) -> Rspec {
        let at = |s| Timestamp::from_second(s).unwrap();
        Rspec { share, memory_mib, ..Rspec::modest(Interval { start: at(0), end: at(end_s) }) }
    }

    fn config(script: &str, base: &str) -> SliverConfig {
        SliverConfig { base: base.into(), boot_script: script.into(), ..SliverConfig::default() }
    }

    fn ports() -> PortGrant {
        PortGrant { first: 20_000, last: 20_063, tcp: BTreeSet::new(), udp: BTreeSet::new() }
    }

    /// A node manager that does what it is told, as far as names, rights and configurations go.
    #[derive(Default)]
    struct Model {
        slivers: Vec<Sliver>,
        rcaps: Vec<Acquired>,
        next: u8,
    }

    impl Model {
        fn apply(&mut self, action: Action) {
            match action {
                Action::Release(rcap) => self.rcaps.retain(|r| r.rcap != rcap),
                Action::Delete(slice) => {
                    self.slivers.retain(|s| s.slice != slice);
                    self.rcaps.retain(|r| r.bound_to.as_ref() != Some(&slice));
                }
                Action::Create(want) => {
                    self.next += 1;
                    let rcap = rcap(self.next);
                    let bound_to = Some(want.slice.clone());
                    let rspec = want.rspec.clone();
                    self.rcaps.push(Acquired { rcap: rcap.clone(), rspec, ports: ports(), bound_to });
                    self.slivers.push(Sliver {
                        slice: want.slice,
                        status: SliverState::Starting,
                        rcap,
                        rspec: want.rspec,
                        ports: ports(),
                        config: want.config,
                    });
                }
                Action::Renew { slice, end, share, .. } => {
                    for sliver in self.slivers.iter_mut().filter(|s| s.slice == slice) {
                        sliver.rspec.interval.end = end;
                        sliver.rspec.share = share;
                    }
                }
                Action::Configure(slice, config) => {
                    for sliver in self.slivers.iter_mut().filter(|s| s.slice == slice) {
                        sliver.config = config.clone();
                    }
                }
                Action::Refuse(..) => {}
            }
        }
    }

    prop_compose! {
        fn desired()(slices in prop::collection::btree_map(0u8..6, (1u32..4, 1i64..4, 32u32..34, 0u8..3, 0u8..2), 0..6)) -> Vec<DesiredSliver> {
            slices.into_iter().map(|(n, (share, end, memory, script, base))| DesiredSliver {
                slice: format!("site_s{n}").parse().unwrap(),
                rspec: rspec(share, end, memory),
                config: config(&script.to_string(), ["debian", "mini"][usize::from(base)]),
            }).collect()
        }
    }

    proptest! {
        /// Whatever was there, one round of the plan reaches what is wanted, but for what is refused; a second round has nothing left to do.
        #[test]
        fn a_plan_reaches_what_is_wanted(before in desired(), after in desired(), orphans in 0u8..3) {
            let mut node = Model { next: 100, ..Model::default() };
            for sliver in &before {
                node.apply(Action::Create(Box::new(sliver.clone())));
            }
            for n in 0..orphans {
                node.rcaps.push(Acquired { rcap: rcap(n), rspec: rspec(1, 1, 32), ports: ports(), bound_to: None });
            }
            let mut refused = BTreeSet::new();
            for action in plan(&after, &node.slivers, &node.rcaps, ME) {
                if let Action::Refuse(slice, _) = &action {
                    refused.insert(slice.clone());
                }
                node.apply(action);
            }
            for want in &after {
                let have = node.slivers.iter().find(|s| s.slice == want.slice);
                prop_assert!(have.is_some());
                if !refused.contains(&want.slice) {
                    prop_assert_eq!(have.map(|h| (&h.rspec, &h.config)), Some((&want.rspec, &want.config)));
                }
                // Also where the rest is refused: who may log in, what runs at the next start, until when, with which share.
                let kept = have.map(|h| (h.rspec.share, h.rspec.interval, &h.config.ssh_keys, &h.config.boot_script));
                let (interval, config) = (want.rspec.interval, &want.config);
                prop_assert_eq!(kept, Some((want.rspec.share, interval, &config.ssh_keys, &config.boot_script)));
            }
            prop_assert_eq!(node.slivers.len(), after.len());
            prop_assert_eq!(node.rcaps.len(), after.len());
            let again = plan(&after, &node.slivers, &node.rcaps, ME);
            prop_assert!(again.iter().all(|a| matches!(a, Action::Refuse(..))), "{:?}", again);
        }
    }

    #[test]
    fn the_agent_leaves_itself_alone() {
        let mut node = Model::default();
        let me =
            DesiredSliver { slice: ME.parse().unwrap(), rspec: rspec(1, 9, 64), config: config("", "agent") };
        node.apply(Action::Create(Box::new(me)));
        assert_eq!(plan(&[], &node.slivers, &node.rcaps, ME), []);
    }

    #[test]
    fn a_slice_made_again_gets_nothing_of_the_one_before() {
        let mut want = DesiredSliver {
            slice: "site_s0".parse().unwrap(),
            rspec: rspec(1, 9, 64),
            config: config("", "mini"),
        };
        let mut node = Model::default();
        node.apply(Action::Create(Box::new(want.clone())));
        want.rspec.interval.start = Timestamp::from_second(5).unwrap();
        let actions = plan(std::slice::from_ref(&want), &node.slivers, &node.rcaps, ME);
        assert_eq!(actions, [Action::Delete(want.slice.clone()), Action::Create(Box::new(want))]);
    }

    #[test]
    fn unwanted_slivers_go_before_new_ones_come() {
        let want = |n: u8| DesiredSliver {
            slice: format!("site_s{n}").parse().unwrap(),
            rspec: rspec(1, 9, 64),
            config: config("", "mini"),
        };
        let mut node = Model::default();
        node.apply(Action::Create(Box::new(want(1))));
        let actions = plan(&[want(0)], &node.slivers, &node.rcaps, ME);
        assert!(matches!(&actions[..], [Action::Delete(_), Action::Create(_)]), "{actions:?}");
    }
}
