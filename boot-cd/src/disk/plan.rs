//! Decides which disk to use and how to partition it. Pure: from descriptions of disks to actions.
//!
//! A disk that has the state partition is the node's disk, whatever its name has become, and its state is never given
//! up: if what the script wants does not fit beside it, nothing is done. Otherwise the first disk that is large enough
//! is taken whole; what was on it before is lost.
//!
//! Positions are in logical blocks (LBA) of the disk, sizes in MiB.

/// Partition label of the node image.
pub const IMAGE_LABEL: &str = "commonage-image";
/// Partition label of what the node keeps.
pub const STATE_LABEL: &str = "commonage-state";

/// A state partition smaller than this is useless, MiB.
const LEAST_STATE_MIB: u64 = 64;
const MIB: u64 = 1 << 20;
/// A GPT takes the first blocks and the last ones: 16 KiB of entries, a header, and at the front the protective MBR.
const ENTRIES: u64 = 16 << 10;

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The kernel's name: `vda`.
    pub name: String,
    /// Its size in logical blocks.
    pub blocks: u64,
    /// Bytes in a logical block: 512 or 4096.
    pub block_size: u64,
    /// Its partitions, if it has a GPT that can be read.
    pub partitions: Option<Vec<Partition>>,
}

/// A partition that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Its number.
    pub id: u32,
    /// Its label.
    pub label: String,
    /// First block.
    pub first: u64,
    /// Last block.
    pub last: u64,
}

/// A partition to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct New {
    /// Its label.
    pub label: &'static str,
    /// First block.
    pub first: u64,
    /// How many.
    pub blocks: u64,
}

/// What to do with the chosen disk's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    Keep,
    /// Forget all partitions.
    Rewrite {
        /// The only partitions afterwards.
        add: Vec<New>,
    },
    /// Leave the others as they are.
    Change {
        /// Numbers of partitions to remove.
        remove: Vec<u32>,
        /// To add.
        add: Vec<New>,
    },
}

impl Action {
    /// Whether a partition with this label is new, so that what its blocks hold means nothing.
    pub fn adds(&self, label: &str) -> bool {
        match self {
            Self::Keep => false,
            Self::Rewrite { add } | Self::Change { add, .. } => add.iter().any(|n| n.label == label),
        }
    }
}

/// The decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan<'a> {
    /// On which disk.
    pub disk: &'a Disk,
    /// What.
    pub action: Action,
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// All disks are too small.
    #[error("no disk has {min_mib} MiB; there are: {disks}")]
    NoDisk {
        /// The script's wish.
        min_mib: u64,
        /// Names and sizes.
        disks: String,
    },
    /// The image partition does not fit beside the state.
    #[error("on {disk} there is no room for {image_mib} MiB of image beside the state partition")]
    NoRoom {
        /// Which disk.
        disk: String,
        /// The script's wish.
        image_mib: u64,
    },
}

/// Decides.
pub fn plan(disks: &[Disk], min_mib: u64, image_mib: u64) -> Result<Plan<'_>, PlanError> {
    if let Some(disk) = disks.iter().find(|d| d.find(STATE_LABEL).is_some()) {
        return Ok(Plan { disk, action: beside_state(disk, image_mib)? });
    }
    // The image partition must leave room for state, whatever the script says.
    let wanted_mib = min_mib.max(image_mib.saturating_add(LEAST_STATE_MIB + 4));
    let Some(disk) = disks.iter().find(|d| d.mib() >= wanted_mib) else {
        let disks: Vec<_> = disks.iter().map(|d| format!("{} ({} MiB)", d.name, d.mib())).collect();
        let disks = if disks.is_empty() { "none".into() } else { disks.join(", ") };
        return Err(PlanError::NoDisk { min_mib: wanted_mib, disks });
    };
    let align = disk.align();
    let image = New { label: IMAGE_LABEL, first: align, blocks: image_mib.saturating_mul(align) };
    let first = image.first + image.blocks;
    let state = New { label: STATE_LABEL, first, blocks: disk.end().saturating_sub(first) };
    Ok(Plan { disk, action: Action::Rewrite { add: vec![image, state] } })
}

/// Keeps the state partition; makes sure of the image partition.
fn beside_state(disk: &Disk, image_mib: u64) -> Result<Action, PlanError> {
    let blocks = image_mib.saturating_mul(disk.align());
    let old = disk.find(IMAGE_LABEL);
    if old.is_some_and(|p| p.last.saturating_sub(p.first).saturating_add(1) >= blocks) {
        return Ok(Action::Keep);
    }
    let others = disk.partitions.iter().flatten().filter(|p| p.label != IMAGE_LABEL);
    let mut taken: Vec<_> = others.map(|p| (p.first, p.last)).collect();
    taken.sort_unstable();
    let mut first = disk.align();
    for (start, last) in taken.into_iter().chain([(disk.end(), disk.end())]) {
        // A partition may lie beyond the end of a disk that was copied to a smaller one.
        if first.saturating_add(blocks) <= start.min(disk.end()) {
            let remove = disk.partitions.iter().flatten().filter(|p| p.label == IMAGE_LABEL).map(|p| p.id);
            let add = vec![New { label: IMAGE_LABEL, first, blocks }];
            return Ok(Action::Change { remove: remove.collect(), add });
        }
        let next = last.saturating_add(1).checked_next_multiple_of(disk.align()).unwrap_or(u64::MAX);
        first = first.max(next);
    }
    Err(PlanError::NoRoom { disk: disk.name.clone(), image_mib })
}

impl Disk {
    /// Its size, rounded down.
    fn mib(&self) -> u64 {
        self.blocks.saturating_mul(self.block_size) / MIB
    }

    /// Partitions start at multiples of 1 MiB, in blocks.
    fn align(&self) -> u64 {
        (MIB / self.block_size.max(1)).max(1)
    }

    /// The first block after all partitions: what the backup table leaves, rounded down to whole MiB.
    fn end(&self) -> u64 {
        let table = ENTRIES.div_ceil(self.block_size.max(1)) + 1;
        self.blocks.saturating_sub(table) / self.align() * self.align()
    }

    fn find(&self, label: &str) -> Option<&Partition> {
        self.partitions.iter().flatten().find(|p| p.label == label)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn disk(name: &str, mib: u64) -> Disk {
        Disk { name: name.into(), blocks: mib * 2048, block_size: 512, partitions: None }
    }

    fn part(id: u32, label: &str, first_mib: u64, mib: u64) -> Partition {
        Partition { id, label: label.into(), first: first_mib * 2048, last: (first_mib + mib) * 2048 - 1 }
    }

    #[test]
    fn takes_the_first_disk_that_is_large_enough() {
        let disks = [disk("vda", 500), disk("vdb", 4_000), disk("vdc", 9_000)];
        let plan = plan(&disks, 2_000, 1_000).unwrap();
        assert_eq!(plan.disk.name, "vdb");
        let Action::Rewrite { add } = &plan.action else { panic!() };
        assert_eq!((add[0].label, add[0].first, add[0].blocks), (IMAGE_LABEL, 2048, 1_000 * 2048));
        assert_eq!((add[1].label, add[1].first, add[1].blocks), (STATE_LABEL, 1_001 * 2048, 2_998 * 2048));
        assert!(plan.action.adds(STATE_LABEL));
    }

    #[test]
    fn says_what_there_is_when_nothing_fits() {
        let disks = [disk("vda", 500)];
        let error = plan(&disks, 2_000, 1_000).unwrap_err().to_string();
        assert!(error.contains("vda (500 MiB)"), "{error}");
        assert!(plan(&[], 2_000, 1_000).unwrap_err().to_string().contains("none"));
        // The script's minimum is not believed if it leaves nothing for state.
        assert!(plan(&[disk("vda", 1_010)], 1_001, 1_000).is_err());
    }

    #[test]
    fn leaves_right_things_alone_even_after_disks_changed_names() {
        let mut old = disk("vdb", 4_000);
        old.partitions = Some(vec![part(1, IMAGE_LABEL, 1, 1_000), part(2, STATE_LABEL, 1_001, 2_900)]);
        let disks = [disk("vda", 4_000), old];
        let kept = plan(&disks, 2_000, 1_000).unwrap();
        assert_eq!((kept.disk.name.as_str(), &kept.action), ("vdb", &Action::Keep));
        // Even if the script now wants larger disks, the state stays where it is.
        assert_eq!(plan(&disks, 8_000, 900).unwrap().action, Action::Keep);
    }

    #[test]
    fn never_gives_state_up_for_a_larger_image() {
        let mut small = disk("vda", 4_000);
        small.partitions = Some(vec![part(1, IMAGE_LABEL, 1, 500), part(2, STATE_LABEL, 501, 1_000)]);
        let disks = [small];
        let Action::Change { remove, add } = plan(&disks, 2_000, 1_000).unwrap().action else { panic!() };
        assert_eq!(remove, [1]);
        assert_eq!((add[0].first, add[0].blocks), (1_501 * 2048, 1_000 * 2048));
        assert!(matches!(plan(&disks, 2_000, 3_000), Err(PlanError::NoRoom { .. })));
    }

    #[test]
    fn replaces_a_lost_image_partition() {
        let mut disk = disk("vda", 4_000);
        disk.partitions = Some(vec![part(2, STATE_LABEL, 1_001, 2_900)]);
        let Action::Change { remove, add } = plan(&[disk], 2_000, 1_000).unwrap().action else { panic!() };
        assert!(remove.is_empty());
        assert_eq!(add[0].first, 2048);
    }

    prop_compose! {
        fn any_disk()(blocks in 0_u64..1 << 24, large in any::<bool>(), partitions in proptest::option::of(
            proptest::collection::vec((0_u64..1 << 24, 0_u64..1 << 22, 0..4_usize), 0..5))) -> Disk {
            let labels = [IMAGE_LABEL, STATE_LABEL, "other", ""];
            let partitions = partitions.map(|all| all.into_iter().zip(1..).map(|((first, length, label), id)|
                Partition { id, label: labels[label].into(), first, last: first + length }).collect());
            Disk { name: "vda".into(), blocks, block_size: if large { 4096 } else { 512 }, partitions }
        }
    }

    proptest! {
        /// Whatever the disks look like: new partitions are on the disk, aligned, behind the primary and before the backup
        /// table, and touch neither each other nor what stays; the state partition always stays.
        #[test]
        fn plans_are_sound(disks in proptest::collection::vec(any_disk(), 0..4), min_mib in 0_u64..20_000, image_mib in 1_u64..10_000) {
            let Ok(plan) = plan(&disks, min_mib, image_mib) else { return Ok(()) };
            let empty = vec![];
            let (remove, add) = match &plan.action {
                Action::Keep => (&[][..], &empty),
                Action::Rewrite { add } => {
                    prop_assert!(disks.iter().all(|d| d.find(STATE_LABEL).is_none()));
                    (&[][..], add)
                }
                Action::Change { remove, add } => (&remove[..], add),
            };
            let stay: Vec<_> = match plan.action {
                Action::Rewrite { .. } => vec![],
                _ => plan.disk.partitions.iter().flatten().filter(|p| !remove.contains(&p.id)).collect(),
            };
            if let Some(state) = plan.disk.find(STATE_LABEL) {
                prop_assert!(stay.contains(&state));
            }
            let mut ranges: Vec<_> = add.iter().map(|n| (n.first, n.first + n.blocks)).collect();
            for (first, end) in &ranges {
                prop_assert!(first < end && *end <= plan.disk.end());
                prop_assert!(first % plan.disk.align() == 0 && *first >= plan.disk.align());
                prop_assert!(stay.iter().all(|p| p.last < *first || p.first >= *end));
            }
            ranges.sort_unstable();
            prop_assert!(ranges.is_sorted_by(|a, b| a.1 <= b.0));
        }
    }
}
