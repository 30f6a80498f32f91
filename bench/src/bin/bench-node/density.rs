//! How many slivers, at what price.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use commonage_bench::figures::{Density, Fall, Point, Program, Turns};
use commonage_bench::{program, stats};
use commonage_nodemgr_api::exec::Frame;
use tokio::task::JoinSet;

use crate::meter::{self, Activity};
use crate::places::Places;
use crate::slivers::{self, Shape, Sliver};
use crate::world::World;
use crate::{peer, say};

/// Points of the curve.
const POINTS: u32 = 25;
/// Commands under way at once when all slivers are asked.
const AT_ONCE: usize = 8;
/// The program in the base `bench`.
pub const PROGRAM: &str = "/bin/large";

/// How much to measure.
#[derive(Debug, Args)]
pub struct Options {
    /// Slivers that live together.
    #[arg(long)]
    slivers: u32,
    /// How long they idle, seconds.
    #[arg(long)]
    idle: u64,
    /// Clones and cold boots in turns.
    #[arg(long)]
    turns: u32,
    /// Boots of sliver-vmm and QEMU in turns; none leaves the peer out.
    #[arg(long)]
    boots: u32,
    /// Machines of QEMU that idle together.
    #[arg(long)]
    peers: u32,
    /// Also run a large program in all of them.
    #[arg(long)]
    program: bool,
    /// Clones copy each page when they write it, not at once what the first clone wrote.
    #[arg(long)]
    no_prefault: bool,
    /// Memory of each guest, MiB.
    #[arg(long, default_value_t = 64)]
    guest_mib: u32,
    /// Delete all slivers in the end; otherwise the machine ends with them.
    #[arg(long)]
    clean: bool,
    #[command(flatten)]
    places: Places,
}

/// Measures.
pub async fn measure(options: &Options) -> Result<Density> {
    let base = if options.program { "bench" } else { "mini" };
    let shape = Shape { base: base.to_owned(), memory_mib: options.guest_mib, disk_mib: 64 };
    let (places, idle) = (options.places.clone(), Duration::from_secs(options.idle));
    places.make()?;
    let mut peer = None;
    if options.boots > 0 {
        let (places, boots, peers) = (places.clone(), options.boots, options.peers);
        let measured = move || peer::measure(&places, base, boots, peers, idle / 3);
        peer = Some(tokio::task::spawn_blocking(measured).await??);
    }
    let world = World::start(places, !options.no_prefault).await?;
    let turns = turns(&world, &shape, options.turns).await?;
    let template_kib = world.templates_kib()?;

    let before = meter::memory()?;
    let (living, curve) = populate(&world, &shape, options.slivers).await?;
    let first = living.first().context("without a sliver there is nothing to measure")?;
    let cloned = world.is_clone(&first.slice)?;
    let processes = slivers::processes(&world, &living)?;
    let earlier = Activity::of(&processes)?;
    say!("idle for {} s", idle.as_secs());
    tokio::time::sleep(idle).await;
    let idle = Activity::of(&processes)?.since(&earlier, processes.len());
    let after = meter::memory()?;
    let sliver = meter::taken(&processes)?;
    let answering = ask_all(&world, &living).await?;
    say!("{answering} of {} answer", living.len());
    let mut disk = 0;
    for sliver in &living {
        disk += meter::disk(&world.manager.paths(&sliver.slice).state)?;
    }
    let program = match options.program {
        true => Some(run_program(&world, &living, &processes).await?),
        false => None,
    };
    let create_us = living.iter().map(|s| s.took.as_micros() as u64).collect();
    if options.clean {
        for sliver in &living {
            slivers::delete(&world.manager, &sliver.slice).await?;
        }
    }
    Ok(Density {
        slivers: options.slivers,
        answering,
        cloned,
        guest_mib: options.guest_mib,
        node: Fall { before, after },
        sliver,
        template_kib,
        disk_bytes: disk / u64::from(options.slivers.max(1)),
        create_us,
        turns,
        idle,
        curve,
        peer,
        program,
    })
}

/// Clone and cold boot in turns. The very first sliver makes the template, and counts for nothing.
async fn turns(world: &World, shape: &Shape, turns: u32) -> Result<Turns> {
    let first = slivers::create(&world.manager, "bench_first", shape).await?;
    say!("the first sliver, and its template, in {} ms", first.took.as_millis());
    slivers::delete(&world.manager, &first.slice).await?;
    let mut all = Turns::default();
    for turn in 0..turns {
        let ways = [("cold", &world.cold, &mut all.cold_us), ("clone", &world.manager, &mut all.clone_us)];
        for (how, manager, times) in ways {
            let made = slivers::create(manager, &format!("bench_{how}{turn}"), shape).await?;
            say!("turn {turn}: {how} in {} ms", made.took.as_millis());
            times.push(made.took.as_micros() as u64);
            slivers::delete(manager, &made.slice).await?;
        }
    }
    Ok(all)
}

/// Makes them, one after the other.
async fn populate(world: &World, shape: &Shape, slivers: u32) -> Result<(Vec<Sliver>, Vec<Point>)> {
    let before = meter::available()?.cast_signed();
    let (mut living, mut curve, mut since) = (Vec::new(), Vec::new(), Vec::new());
    for n in 1..=slivers {
        let sliver = slivers::create(&world.manager, &format!("bench_s{n}"), shape).await?;
        since.push(sliver.took.as_micros() as f64);
        living.push(sliver);
        if n * POINTS / slivers > (n - 1) * POINTS / slivers {
            let create_us = stats::median(&since).unwrap_or_default() as u64;
            let fall_kib = before - meter::available()?.cast_signed();
            let mib = fall_kib as f64 / 1024.0 / f64::from(n);
            say!("{n} slivers: {mib:.2} MiB each, create {} ms", create_us / 1000);
            curve.push(Point { slivers: n, fall_kib, create_us });
            since.clear();
        }
    }
    Ok((living, curve))
}

/// How many answer a command.
async fn ask_all(world: &World, living: &[Sliver]) -> Result<u32> {
    let (mut under_way, mut answering) = (JoinSet::new(), 0);
    let mut count = |done: Result<Result<String>, tokio::task::JoinError>| match done {
        Ok(Ok(said)) if said == "still\n" => answering += 1,
        Ok(Ok(said)) => say!("a sliver answered {said:?}"),
        Ok(Err(e)) => say!("a sliver does not answer: {e:#}"),
        Err(e) => say!("{e}"),
    };
    for sliver in living {
        if under_way.len() == AT_ONCE {
            under_way.join_next().await.into_iter().for_each(&mut count);
        }
        let (manager, slice) = (Arc::clone(&world.manager), sliver.slice.clone());
        under_way.spawn(async move { slivers::command(&manager, &slice, &["/bin/echo", "still"]).await });
    }
    while let Some(done) = under_way.join_next().await {
        count(done);
    }
    Ok(answering)
}

/// Runs the large program in all slivers at once: each reads all its pages, and then waits.
async fn run_program(world: &World, living: &[Sliver], processes: &[Vec<u32>]) -> Result<Program> {
    let before = meter::memory()?;
    let mut running = Vec::new();
    for sliver in living {
        let (writer, mut reader) = slivers::start(&world.manager, &sliver.slice, &[PROGRAM]).await?;
        let said = reader.next().await?;
        let wanted = Frame::Stdout(program::TOUCHED.into());
        ensure!(said.as_ref() == Some(&wanted), "{}: the program said {said:?}", sliver.slice);
        running.push((writer, reader));
        if running.len() % 100 == 0 {
            say!("the program runs in {} slivers", running.len());
        }
    }
    let after = meter::memory()?;
    let (mapped_kib, private_kib) = meter::file_pages(processes, "base-bench.erofs")?;
    let image = world.places.images.join("large");
    let size_kib = std::fs::metadata(&image).with_context(|| image.display().to_string())?.len() / 1024;
    let running = running.len() as u32;
    Ok(Program { size_kib, running, mapped_kib, private_kib, node: Fall { before, after } })
}
