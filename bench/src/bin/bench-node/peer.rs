//! The peer: QEMU's `microvm` with the same kernel, initrd and base as sliver-vmm, started the same way, in turns.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use commonage_bench::figures::Peer;

use crate::machine::{self, Kind, Machine, Parts};
use crate::meter::{self, Activity};
use crate::places::Places;
use crate::say;

/// What both guests' init says on the serial port when it is ready for an identity.
const WAITING: &str = "waiting for an identity";
/// QEMU's default way of doing input and output.
const QEMU: Kind = Kind::Qemu("threads");
const DISK_MIB: u64 = 64;

/// Boots both in turns, `boots` times, then looks at `machines` idle ones of QEMU for `idle`.
pub fn measure(places: &Places, base: &str, boots: u32, machines: u32, idle: Duration) -> Result<Peer> {
    let version = machine::version(&places.qemu)?;
    let parts = |n: u32| -> Result<Parts> {
        let base = Some(places.images.join(format!("base-{base}.erofs")));
        Ok(Parts { disk: disk(places, n)?, base, cmdline: String::new() })
    };
    let (first, mut qemu_boot_us, mut our_boot_us) = (parts(0)?, Vec::new(), Vec::new());
    let dir = |n: u32| places.run.join(format!("peers/{n}"));
    // The very first of each reads its program and the kernel from the disk, and counts for nothing.
    for round in 0..=boots {
        for (kind, times) in [(QEMU, &mut qemu_boot_us), (Kind::Ours, &mut our_boot_us)] {
            let mut machine = Machine::start(kind, places, &first, &dir(0))?;
            let (_, took) = machine.wait(WAITING).with_context(|| kind.name())?;
            if round > 0 {
                times.push(took.as_micros() as u64);
            }
            say!("boot {round} of {boots}: {} in {} ms", kind.name(), took.as_millis());
        }
    }
    let before = meter::available()?;
    let mut living = Vec::new();
    for n in 0..machines {
        let mut machine = Machine::start(QEMU, places, &parts(n)?, &dir(n))?;
        machine.wait(WAITING)?;
        living.push(machine);
    }
    let processes: Vec<Vec<u32>> = living.iter().map(|m| vec![m.pid()]).collect();
    let earlier = Activity::of(&processes)?;
    std::thread::sleep(idle);
    let idle = Activity::of(&processes)?.since(&earlier, processes.len());
    let taken = meter::taken(&processes)?;
    let fall_kib = (before as f64 - meter::available()? as f64) / f64::from(machines.max(1));
    say!("{machines} of QEMU idle: {:.1} MiB each", fall_kib / 1024.0);
    Ok(Peer { version, qemu_boot_us, our_boot_us, machines, fall_kib, taken, idle })
}

/// An empty file system on a file of its own.
fn disk(places: &Places, n: u32) -> Result<PathBuf> {
    let path = places.state.join(format!("peer-{n}.img"));
    let file = std::fs::File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    file.set_len(DISK_MIB << 20)?;
    let made = Command::new(&places.mke2fs).args(["-q", "-F", "-t", "ext4"]).arg(&path).status()?;
    ensure!(made.success(), "mke2fs {}: {made}", path.display());
    Ok(path)
}
