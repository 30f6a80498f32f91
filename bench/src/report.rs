//! What a person and a program get to read: a table with what must and what should be reached, and one JSON object.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Value, json};

use crate::figures::{Blk, Density, Idle};
use crate::stats;

/// One line of a table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// What was measured.
    pub figure: &'static str,
    /// What came out; nothing if this run did not measure it.
    pub value: Option<f64>,
    /// Its unit.
    pub unit: &'static str,
    /// What must be reached, if anything.
    pub must: Option<Bound>,
    /// What should be.
    pub aim: Option<Bound>,
    /// The peer's.
    pub peer: Option<f64>,
}

/// What a value is held against.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// At most so much.
    AtMost(f64),
    /// At least so much.
    AtLeast(f64),
}

impl Bound {
    /// Whether a value keeps it.
    pub fn holds(self, value: f64) -> bool {
        match self {
            Self::AtMost(bound) => value <= bound,
            Self::AtLeast(bound) => value >= bound,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(bound) => format!("≤ {}", number(bound)),
            Self::AtLeast(bound) => format!("≥ {}", number(bound)),
        }
    }
}

impl Line {
    fn new(figure: &'static str, unit: &'static str, value: Option<f64>) -> Self {
        Self { figure, value, unit, must: None, aim: None, peer: None }
    }

    fn at_most(self, must: f64, aim: f64) -> Self {
        Self { must: Some(Bound::AtMost(must)), aim: Some(Bound::AtMost(aim)), ..self }
    }

    fn beside(self, peer: Option<f64>) -> Self {
        Self { peer, ..self }
    }

    /// `aim`, `must` or `MISSED`; nothing when there is no bound or no value.
    pub fn verdict(&self) -> &'static str {
        let holds = |bound: Option<Bound>| Some(bound?.holds(self.value?));
        match (holds(self.must), holds(self.aim)) {
            (_, Some(true)) => "aim",
            (Some(true), _) => "must",
            (Some(false), _) => "MISSED",
            _ => "",
        }
    }
}

/// The figures of a run as the lines of a table.
pub fn density(run: &Density) -> Vec<Line> {
    let slivers = f64::from(run.slivers.max(1));
    let ms = |us: Option<f64>| us.map(|us| us / 1000.0);
    let times = |us: &[u64]| us.iter().map(|us| *us as f64).collect::<Vec<f64>>();
    let created = times(&run.create_us);
    let peer = run.peer.as_ref();
    let ratio = |ours: &[u64], theirs: &[u64]| stats::ratio(&times(ours), &times(theirs));
    let idle = |get: fn(&Idle) -> f64| peer.map(|p| get(&p.idle));
    vec![
        Line::new("memory of the node per sliver, all in", "MiB", Some(all_in_mib(run)))
            .at_most(4.0, 2.0)
            .beside(peer.map(|p| p.fall_kib / 1024.0)),
        Line::new("  of that: pages of the guest's memory", "MiB", Some(run.sliver.guest_kib / 1024.0))
            .beside(peer.map(|p| p.taken.guest_kib / 1024.0)),
        Line::new("  of that: private memory of the VMM", "MiB", Some(run.sliver.vmm_kib / 1024.0))
            .at_most(1.0, 0.5)
            .beside(peer.map(|p| p.taken.vmm_kib / 1024.0)),
        Line::new("the template, once a node", "MiB", Some(run.template_kib as f64 / 1024.0)),
        Line::new("disk a new sliver takes", "MiB", Some(run.disk_bytes as f64 / f64::from(1 << 20)))
            .at_most(1.0, 0.125),
        Line::new("create to ready, p50", "ms", ms(stats::median(&created))),
        Line::new("create to ready, p99", "ms", ms(stats::percentile(&created, 99.0))),
        Line::new("clone ÷ cold boot, in turns", "", ratio(&run.turns.clone_us, &run.turns.cold_us))
            .at_most(0.15, 0.05),
        Line::new(
            "cold boot ÷ QEMU microvm's",
            "",
            peer.and_then(|p| ratio(&p.our_boot_us, &p.qemu_boot_us)),
        )
        .at_most(1.0, 0.6),
        Line::new("wake-ups of an idle sliver", "1/s", Some(run.idle.wakeups))
            .at_most(5.0, 1.0)
            .beside(idle(|i| i.wakeups)),
        Line::new("context switches of the node, a sliver", "1/s", Some(run.idle.switches))
            .beside(idle(|i| i.switches)),
        Line::new("processor an idle sliver uses", "‰", Some(run.idle.cpu_permille))
            .beside(idle(|i| i.cpu_permille)),
        Line::new("threads of a sliver's machine", "", Some(run.sliver.threads))
            .beside(peer.map(|p| p.taken.threads)),
        Line {
            must: Some(Bound::AtLeast(slivers)),
            ..Line::new("slivers that answer after idling", "", Some(f64::from(run.answering)))
        },
        Line {
            must: run.program.as_ref().map(|_| Bound::AtMost(1.2)),
            ..Line::new("copies of a 50 MiB program that all run", "", program_copies(run))
        },
    ]
}

/// Where the memory of a sliver is: fields of `/proc/meminfo`, MiB for each.
pub fn breakdown(run: &Density) -> Vec<(&'static str, f64)> {
    const FIELDS: [&str; 8] = [
        "AnonPages",
        "Shmem",
        "SUnreclaim",
        "SReclaimable",
        "KernelStack",
        "PageTables",
        "SecPageTables",
        "Percpu",
    ];
    let each = |kib: i64| kib as f64 / 1024.0 / f64::from(run.slivers.max(1));
    let known: Vec<_> = FIELDS.into_iter().map(|field| (field, each(-run.node.of(field)))).collect();
    // What is reclaimable counts as available.
    let sum: f64 = known.iter().filter(|(field, _)| *field != "SReclaimable").map(|(_, mib)| mib).sum();
    let rest = ("pages nobody accounts for (KVM, page cache in use)", all_in_mib(run) - sum);
    known.into_iter().chain([rest]).collect()
}

fn all_in_mib(run: &Density) -> f64 {
    run.node.of("MemAvailable") as f64 / 1024.0 / f64::from(run.slivers.max(1))
}

/// How many times the program's size the node holds of it: page cache and private pages that came with it.
fn program_copies(run: &Density) -> Option<f64> {
    let program = run.program.as_ref()?;
    let cached = -program.node.of("Cached");
    Some((cached as f64 + program.private_kib as f64) / program.size_kib.max(1) as f64)
}

/// The figures of a run as one object.
pub fn density_json(run: &Density, place: &str, emulated: bool) -> Value {
    let lines = density(run);
    let value =
        |figure: &str| lines.iter().find(|l| l.figure.trim() == figure).and_then(|l| l.value).map(round);
    let create = value("create to ready, p50").zip(value("create to ready, p99"));
    json!({
        "slivers": run.slivers,
        "answering": run.answering,
        "cloned": run.cloned,
        "memory_per_sliver_mib": round(all_in_mib(run)),
        "guest_private_mib": value("of that: pages of the guest's memory"),
        "vmm_private_mib": value("of that: private memory of the VMM"),
        "template_mib": value("the template, once a node"),
        "disk_per_sliver_mib": value("disk a new sliver takes"),
        "create_to_ready_ms": create.map(|(p50, p99)| json!({ "p50": p50, "p99": p99 })),
        "clone_over_cold_boot": value("clone ÷ cold boot, in turns"),
        "cold_boot_over_qemu": value("cold boot ÷ QEMU microvm's"),
        "wakeups_per_second": value("wake-ups of an idle sliver"),
        "idle_cpu_permille": value("processor an idle sliver uses"),
        "program_copies": value("copies of a 50 MiB program that all run"),
        "guest_memory_mib": run.guest_mib,
        "qemu": run.peer.as_ref().map(|p| json!({
            "version": p.version,
            "memory_per_machine_mib": round(p.fall_kib / 1024.0),
            "vmm_private_mib": round(p.taken.vmm_kib / 1024.0),
            "wakeups_per_second": round(p.idle.wakeups),
        })),
        "breakdown_mib": breakdown(run).into_iter().map(|(k, v)| (k.to_owned(), json!(round(v)))).collect::<serde_json::Map<_, _>>(),
        "curve": run.curve.iter().map(|p| json!({
            "slivers": p.slivers,
            "memory_per_sliver_mib": round(p.fall_kib as f64 / 1024.0 / f64::from(p.slivers.max(1))),
            "create_ms": round(p.create_us as f64 / 1000.0),
        })).collect::<Vec<_>>(),
        "missed": missed(&lines),
        "emulated": emulated,
        "where": place,
    })
}

/// What had to be reached and was not.
pub fn missed(lines: &[Line]) -> Vec<&'static str> {
    lines.iter().filter(|l| l.verdict() == "MISSED").map(|l| l.figure.trim()).collect()
}

/// Requests a second of ours over the better of QEMU's ways, by load: the middle of all rounds.
pub fn blk(run: &Blk) -> Vec<Line> {
    let loads: Vec<&String> = run.rounds.first().map(|r| r.loads.keys().collect()).unwrap_or_default();
    let rates = |load: &str, wanted: &dyn Fn(&str) -> bool| {
        let mut machines: Vec<(&str, Vec<f64>)> = Vec::new();
        for round in run.rounds.iter().filter(|r| wanted(&r.machine)) {
            let rate = round.loads.get(load).map(|r| r.per_second());
            match machines.iter_mut().find(|(name, _)| *name == round.machine) {
                Some((_, all)) => all.extend(rate),
                None => machines.push((&round.machine, rate.into_iter().collect())),
            }
        }
        machines.iter().filter_map(|(_, all)| stats::median(all)).max_by(f64::total_cmp)
    };
    let line = |load: &String| {
        let ours = rates(load, &|name| !name.starts_with("QEMU"));
        let theirs = rates(load, &|name| name.starts_with("QEMU"));
        let value = ours.zip(theirs).filter(|(_, theirs)| *theirs > 0.0).map(|(ours, theirs)| ours / theirs);
        let figure = LOADS.iter().find(|known| **known == load.as_str()).copied().unwrap_or("another load");
        Line {
            must: Some(Bound::AtLeast(1.0)),
            aim: Some(Bound::AtLeast(1.3)),
            ..Line::new(figure, "", value)
        }
    };
    loads.into_iter().map(line).collect()
}

/// The loads that `bench-guest` knows.
pub const LOADS: [&str; 6] = [
    "sequential read",
    "sequential write",
    "random read",
    "random write",
    "random read, 8 at once",
    "random write, 8 at once",
];

/// The figures of the disk as one object.
pub fn blk_json(run: &Blk, place: &str, emulated: bool) -> Value {
    let lines = blk(run);
    let over: serde_json::Map<_, _> = lines
        .iter()
        .map(|l| (l.figure.replace(", ", "_").replace(' ', "_"), json!(l.value.map(round))))
        .collect();
    json!({
        "blk_over_qemu": over,
        "missed": missed(&lines),
        "file_mib": run.file_mib,
        "rounds": run.rounds,
        "qemu": run.version,
        "emulated": emulated,
        "where": place,
    })
}

/// A table for a terminal.
pub fn table(lines: &[Line]) -> String {
    let mut rows = vec![["", "value", "must", "aim", "reached", "QEMU microvm"].map(str::to_owned)];
    for line in lines.iter().filter(|l| l.value.is_some()) {
        let text = |value: Option<f64>| value.map(number).unwrap_or_default();
        let unit = if line.unit.is_empty() { String::new() } else { format!(" {}", line.unit) };
        rows.push([
            line.figure.to_owned(),
            text(line.value) + &unit,
            line.must.map(Bound::text).unwrap_or_default(),
            line.aim.map(Bound::text).unwrap_or_default(),
            line.verdict().to_owned(),
            text(line.peer),
        ]);
    }
    let width = |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max();
    let widths: Vec<usize> = (0..6).map(|column| width(column).unwrap_or_default()).collect();
    let mut table = String::new();
    for row in &rows {
        for (cell, width) in row.iter().zip(&widths) {
            // To a String nothing fails.
            let _ = write!(table, "{cell:<width$}  ");
        }
        table.truncate(table.trim_end().len());
        table.push('\n');
    }
    table
}

/// Three digits that count.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 || v == v.trunc() => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
#[path = "report_test.rs"]
mod tests;
