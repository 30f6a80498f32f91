//! What a node refuses to boot, what it says, and that it recovers by itself once the cause is gone.

mod common;

use commonage_testbed::node::Firmware;
use commonage_testbed::plc::Plc;
use commonage_testbed::progress::Steps;
use commonage_testbed::testbed::{BOOT_PHASES, Options, START, Testbed, publish, publish_signed};

#[test]
#[ignore = "needs QEMU and images: cargo xtask test"]
fn a_script_signed_by_another_key_is_refused_until_the_right_one_comes() {
    let options = Options { nodes: 1, firmware: Firmware::Bios, ..Options::default() };
    let mut bed = Testbed::prepare(&options, common::images().unwrap(), &mut Steps::new(false)).unwrap();
    let (other, release) = (bed.path().join("other.pem"), bed.path().join("other.json"));
    let (other, release) = (other.display().to_string(), release.display().to_string());
    bed.admin.run(&["offline-key", "create", "--out", &other]).unwrap();
    publish(&bed.admin, &bed.images, &other, &release, false).unwrap();
    let iso = bed.iso("node1").unwrap();
    let node = bed.switch_on(&options, &iso).unwrap();
    let said = node.wait_any(START, &["boot-cd: failed"]).unwrap();
    assert!(said.contains("not signed by the offline key"), "{said}");
    let mark = node.console.mark();
    let right = bed.path().join("release.json").display().to_string();
    publish_signed(&bed.admin, &bed.images, &right).unwrap();
    let node = bed.nodes.first().unwrap();
    // boot-cd tries again by itself; the failure it may still have in hand is not the last word.
    node.wait_any(mark, &[BOOT_PHASES[1].1]).unwrap();
    node.wait_any(mark, &[BOOT_PHASES[3].1]).unwrap();
}

#[test]
#[ignore = "needs QEMU and images: cargo xtask test"]
fn a_boot_server_with_another_ca_and_a_node_that_plc_does_not_know_are_refused() {
    let options = Options { nodes: 2, firmware: Firmware::Bios, ..Options::default() };
    let mut bed = Testbed::prepare(&options, common::images().unwrap(), &mut Steps::new(false)).unwrap();

    // A second PLC answers where the CD says that PLC is.
    let elsewhere = tempfile::tempdir().unwrap();
    let impostor = Plc::start(&bed.images.binary("plcd"), elsewhere.path(), 0).unwrap();
    let iso = bed.iso("node1").unwrap();
    let config = bed.path().join("node1.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace(&bed.plc.url_for_nodes(), &impostor.url_for_nodes())).unwrap();
    assert_eq!(bed.iso_of(&config).unwrap(), iso);
    let node = bed.switch_on(&options, &iso).unwrap();
    let said = node.wait_any(START, &["boot-cd: failed"]).unwrap();
    assert!(said.contains("CA"), "{said}");

    // PLC forgets a node whose CD is still around.
    let iso = bed.iso("node2").unwrap();
    let nodes = bed.pi.run(&["node", "list"]).unwrap();
    let unknown = nodes.as_array().unwrap().iter().find(|n| n["hostname"] == "node2").unwrap();
    bed.pi.run(&["node", "delete", unknown["node"].as_str().unwrap()]).unwrap();
    let node = bed.switch_on(&options, &iso).unwrap();
    let said = node.wait_any(START, &["boot-cd: failed"]).unwrap();
    assert!(said.contains("commonage node create"), "{said}");
}
