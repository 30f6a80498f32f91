use std::collections::BTreeMap;

use super::*;
use crate::figures::{BlkRound, Fall, Peer, Point, Program, Rate, Taken, Turns};

fn fall(mib: u64) -> Fall {
    let fields = |kib| BTreeMap::from([("MemAvailable".to_owned(), kib), ("Slab".to_owned(), 5)]);
    Fall { before: fields(1 << 20), after: fields((1 << 20) - mib * 1024) }
}

fn run() -> Density {
    let idle = Idle { window_us: 1_000_000, wakeups: 2.0, switches: 3.0, cpu_permille: 0.5 };
    Density {
        slivers: 10,
        answering: 10,
        cloned: true,
        guest_mib: 64,
        node: fall(30),
        sliver: Taken { guest_kib: 1024.0, vmm_kib: 256.0, threads: 2.0 },
        template_kib: 20 * 1024,
        disk_bytes: 64 * 1024,
        create_us: vec![1000, 2000, 3000],
        turns: Turns { clone_us: vec![10], cold_us: vec![100] },
        idle,
        curve: vec![Point { slivers: 10, fall_kib: 30 * 1024, create_us: 2000 }],
        peer: Some(Peer {
            version: "QEMU".into(),
            qemu_boot_us: vec![100],
            our_boot_us: vec![50],
            machines: 2,
            fall_kib: 40_960.0,
            taken: Taken { guest_kib: 10_240.0, vmm_kib: 20_480.0, threads: 3.0 },
            idle,
        }),
        program: None,
    }
}

#[test]
fn a_run_becomes_the_object_that_was_promised() {
    let json = density_json(&run(), "somewhere", true);
    for (name, value) in [
        ("memory_per_sliver_mib", 3.0),
        ("vmm_private_mib", 0.25),
        ("disk_per_sliver_mib", 0.0625),
        ("clone_over_cold_boot", 0.1),
        ("cold_boot_over_qemu", 0.5),
        ("slivers", 10.0),
        ("wakeups_per_second", 2.0),
    ] {
        assert_eq!(json[name].as_f64(), Some(value), "{name}: {json}");
    }
    assert_eq!(json["missed"], json!([]));
    assert!(!serde_json::to_string(&json).unwrap().contains('\n'));
}

#[test]
fn what_is_missed_is_named() {
    let mut run = run();
    run.answering = 9;
    run.node = fall(41);
    let lines = density(&run);
    assert_eq!(missed(&lines), ["memory of the node per sliver, all in", "slivers that answer after idling"]);
    assert!(table(&lines).contains("MISSED"));
}

#[test]
fn without_a_peer_there_is_no_ratio_to_it() {
    let mut run = run();
    run.peer = None;
    assert_eq!(density_json(&run, "", false)["cold_boot_over_qemu"], Value::Null);
    assert!(!table(&density(&run)).contains("cold boot ÷ QEMU"));
}

#[test]
fn a_program_that_each_sliver_holds_is_seen() {
    let mut run = run();
    let cached = |kib| BTreeMap::from([("Cached".to_owned(), kib)]);
    let node = Fall { before: cached(1000), after: cached(1000 + 51_200) };
    run.program = Some(Program { size_kib: 51_200, running: 10, mapped_kib: 512_000, private_kib: 0, node });
    assert_eq!(density_json(&run, "", true)["program_copies"], json!(1.0));
    run.program.as_mut().unwrap().private_kib = 9 * 51_200;
    assert_eq!(missed(&density(&run)), ["copies of a 50 MiB program that all run"]);
}

#[test]
fn disks_are_held_against_the_better_way_of_the_peer() {
    let round = |machine: &str, requests| BlkRound {
        machine: machine.to_owned(),
        loads: BTreeMap::from([(LOADS[0].to_owned(), Rate { requests, bytes: 0, elapsed_us: 1_000_000 })]),
    };
    let rounds = vec![
        round("sliver-vmm", 120),
        round("QEMU, aio=threads", 100),
        round("QEMU, aio=io_uring", 60),
        round("sliver-vmm", 150),
        round("sliver-vmm", 900),
    ];
    let run = Blk { rounds, ..Blk::default() };
    assert_eq!(blk(&run)[0].value, Some(1.5));
    assert_eq!(blk_json(&run, "", true)["blk_over_qemu"]["sequential_read"], json!(1.5));
}

#[test]
fn tables_are_aligned() {
    let table = table(&density(&run()));
    let column = |line: &str| line.chars().take_while(|c| *c != '≤').count();
    let columns: Vec<usize> = table.lines().filter(|l| l.contains("≤ ")).map(column).collect();
    assert!(columns.windows(2).all(|pair| pair[0] == pair[1]), "{table}");
}
