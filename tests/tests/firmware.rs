//! From an empty disk to a web page served by a sliver, by UEFI (the other tests boot by BIOS), and over two nodes.

use commonage_testbed::demo::{Demo, run};
use commonage_testbed::node::Firmware;

#[test]
#[ignore = "needs QEMU and images: cargo xtask test"]
fn the_demonstration_runs_by_uefi() {
    let demo = Demo {
        nodes: 1,
        slivers: 1,
        firmware: Firmware::Uefi,
        base: "debian".into(),
        once: true,
        json: false,
    };
    run(&demo).unwrap();
}

#[test]
#[ignore = "needs QEMU and images: cargo xtask test"]
fn slivers_of_two_nodes_reach_each_other() {
    let demo =
        Demo { nodes: 2, slivers: 2, firmware: Firmware::Bios, base: "mini".into(), once: true, json: false };
    run(&demo).unwrap();
}
