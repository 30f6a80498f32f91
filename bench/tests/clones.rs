//! A hundred clones of one template, on a node with real machines: they have nothing in common that a tenant could tell, or guess, another's by.

#[path = "../benches/place/mod.rs"]
mod place;

use std::path::Path;
use std::time::Duration;

use commonage_bench::identity::{Identity, alike};
use commonage_bench::options::On;
use place::{Place, Programs};

const CLONES: usize = 100;

#[test]
#[ignore = "needs QEMU and images: cargo xtask test"]
fn a_hundred_clones_differ_in_everything() {
    let programs =
        Programs { node: env!("CARGO_BIN_EXE_bench-node"), guest: env!("CARGO_BIN_EXE_bench-guest") };
    assert!(Path::new(programs.node).exists());
    let place = Place::prepare(On::Emulated, programs).unwrap_or_else(|e| panic!("{e:#}"));
    let arguments = ["clones", "--clones", &CLONES.to_string()].map(str::to_owned);
    let clones: Vec<Identity> =
        place.run(&arguments, 2048, Duration::from_secs(1800)).unwrap_or_else(|e| panic!("{e:#}"));
    assert_eq!(clones.len(), CLONES);
    assert_eq!(alike(&clones), Vec::<String>::new());
    let names: Vec<&String> = clones[0].keys().collect();
    assert!(names.len() >= 9, "each told {names:?}");
}
