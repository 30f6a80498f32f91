//! `cargo bench -p bench --bench density`: how many slivers a node carries, and what each costs.
//!
//! Ends with status 1 when a sliver does not answer; figures that miss what they must reach are marked, and left to the reader.
#![forbid(unsafe_code)]

mod place;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use commonage_bench::figures::Density;
use commonage_bench::options::Common;
use commonage_bench::{report, svg};

use place::{Place, Programs};

/// Starts slivers on a node, lets them idle, and says what they cost
#[derive(Debug, Parser)]
#[command(name = "density", version)]
struct Options {
    /// How many slivers live together [default: 200; with --quick 40]
    #[arg(long)]
    slivers: Option<u32>,
    /// How long they idle, seconds [default: 60; with --quick 20]
    #[arg(long)]
    idle: Option<u64>,
    /// Memory of an emulated node, MiB [default: 1,024 and 5 for each sliver]
    #[arg(long)]
    memory: Option<u32>,
    /// Memory of each guest, MiB
    #[arg(long, default_value_t = 64)]
    guest_memory: u32,
    /// Also run one program of 50 MiB in all of them
    #[arg(long)]
    program: bool,
    /// Clones copy each page when they write it, not at once what the first clone wrote
    #[arg(long)]
    no_prefault: bool,
    /// Leave QEMU out
    #[arg(long)]
    no_peer: bool,
    /// Directory for density.json and density.svg [default: target/bench]
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

impl Options {
    /// What `bench-node` is told.
    fn arguments(&self, figures: &[&[(&str, u64)]]) -> Vec<String> {
        let mut figures: Vec<_> = figures.concat();
        figures.push(("--guest-mib", self.guest_memory.into()));
        let figures = figures.iter().flat_map(|(flag, value)| [(*flag).to_owned(), value.to_string()]);
        let flags = [("--program", self.program), ("--no-prefault", self.no_prefault)];
        let flags = flags.iter().filter(|(_, given)| *given).map(|(flag, _)| (*flag).to_owned());
        ["density".to_owned()].into_iter().chain(figures).chain(flags).collect()
    }
}

/// Times by instructions counted, which do not depend on what else the machine does.
///
/// QEMU's SVM (7.2; `helper_vmrun` leaves `exception_index` set) delivers an injected interrupt a second time when it must stop just then, which
/// happens when it counts: once in some ten thousand interrupts a guest waits for ever for what its interrupted self has locked, and the clock,
/// counted by a loop that hardly counts, stands still. Then another node tries.
fn timed(place: &mut Place, arguments: &[String]) -> Result<Density> {
    place.count_instructions(true);
    let mut patience = Duration::from_secs(90);
    let mut run = place.run(arguments, 1536, patience);
    for _ in 0..2 {
        let Err(error) = &run else { break };
        eprintln!("the node that counts instructions stood still, or failed; another one tries: {error:#}");
        patience *= 2;
        run = place.run(arguments, 1536, patience);
    }
    place.count_instructions(false);
    run
}

fn main() -> Result<()> {
    let options = Options::parse();
    let quick = options.common.quick;
    let pick = |full: u64, short: u64| if quick { short } else { full };
    let slivers = options.slivers.unwrap_or(pick(200, 40) as u32);
    ensure!((1..=2500).contains(&slivers), "--slivers is {slivers}; a node has ports for 1 to 2,500");
    let memory = options.memory.unwrap_or(1024 + 5 * slivers);
    let programs =
        Programs { node: env!("CARGO_BIN_EXE_bench-node"), guest: env!("CARGO_BIN_EXE_bench-guest") };
    let mut place = Place::prepare(options.common.on, programs)?;
    eprintln!("{slivers} slivers {}", place.describe());

    let boots = if options.no_peer { 0 } else { pick(8, 3) };
    let times = [("--boots", boots), ("--peers", pick(6, 3)), ("--turns", pick(8, 4))];
    let crowd = [("--slivers", u64::from(slivers)), ("--idle", options.idle.unwrap_or(pick(60, 20)))];
    // An emulated node takes a second or two for a sliver when others want its processor.
    let patience = Duration::from_secs(900 + 6 * u64::from(slivers));
    let mut whence = place.describe();
    let run: Density = if quick && place.is_emulated() {
        whence.push_str("; boots and turns are told in instructions counted");
        let timed = timed(&mut place, &options.arguments(&[&times, &[("--slivers", 1), ("--idle", 6)]]))?;
        let run = options.arguments(&[&crowd, &[("--boots", 0), ("--peers", 0), ("--turns", 0)]]);
        let run: Density = place.run(&run, memory, patience)?;
        Density { turns: timed.turns, peer: timed.peer, ..run }
    } else {
        place.run(&options.arguments(&[&times, &crowd]), memory, patience)?
    };

    let lines = report::density(&run);
    let json = serde_json::to_string(&report::density_json(&run, &whence, place.is_emulated()))?;
    let target = || PathBuf::from(env!("CARGO_TARGET_TMPDIR")).parent().map(|target| target.join("bench"));
    let out = options.out.or_else(target).context("say --out")?;
    std::fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    std::fs::write(out.join("density.json"), format!("{json}\n")).context("cannot write density.json")?;
    std::fs::write(out.join("density.svg"), svg::density(&run, &whence))
        .context("cannot write density.svg")?;
    let shown = format!(
        "{}\nwhere a sliver's memory is, MiB:\n{}plot: {}\n",
        report::table(&lines),
        report::breakdown(&run)
            .iter()
            .map(|(what, mib)| format!("  {mib:7.3}  {what}\n"))
            .collect::<String>(),
        out.join("density.svg").display()
    );
    if options.common.json {
        eprint!("{shown}");
        println!("{json}");
    } else {
        print!("{shown}");
    }
    ensure!(run.answering == run.slivers, "only {} of {} slivers answer", run.answering, run.slivers);
    Ok(())
}
