//! Clones of one template, and what they have in common: nothing.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use commonage_bench::identity::{CLOCK, Identity, alike};

use crate::places::Places;
use crate::say;
use crate::slivers::{self, Shape};
use crate::world::World;

/// How far a clone's clock may be from the node's. The node may be emulated, and others want its processor.
const CLOCK_ERROR: Duration = Duration::from_secs(2);

/// How many.
#[derive(Debug, Args)]
pub struct Options {
    /// Clones.
    #[arg(long, default_value_t = 100)]
    clones: u32,
    #[command(flatten)]
    places: Places,
}

/// Makes clones, asks each who it is, and fails if two have anything in common.
pub async fn check(options: &Options) -> Result<Vec<Identity>> {
    let world = World::start(options.places.clone(), true).await?;
    let shape = Shape { base: "bench".to_owned(), memory_mib: 64, disk_mib: 64 };
    let mut clones = Vec::new();
    for n in 0..options.clones {
        let sliver = slivers::create(&world.manager, &format!("clones_c{n}"), &shape).await?;
        ensure!(world.is_clone(&sliver.slice)?, "{} was booted, not cloned", sliver.slice);
        let before = now()?;
        let said = slivers::command(&world.manager, &sliver.slice, &["/bin/bench-guest", "identity"]).await?;
        let after = now()?;
        let identity: Identity = serde_json::from_str(&said).with_context(|| format!("it said {said:?}"))?;
        let clock = identity.get(CLOCK).and_then(|ms| ms.parse().ok()).map(Duration::from_millis);
        let clock = clock.with_context(|| format!("{} has no clock", sliver.slice))?;
        let right = before.saturating_sub(CLOCK_ERROR)..after + CLOCK_ERROR;
        ensure!(right.contains(&clock), "the clock of {} says {clock:?}, not {right:?}", sliver.slice);
        clones.push(identity);
        if clones.len() % 20 == 0 {
            say!("{} clones", clones.len());
        }
    }
    let problems = alike(&clones);
    if !problems.is_empty() {
        bail!("clones are alike:\n{}", problems.join("\n"));
    }
    say!("{} clones differ in everything", clones.len());
    Ok(clones)
}

fn now() -> Result<Duration> {
    SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")
}
