//! A saved sliver goes on once or not at all, wherever the node fails.

use std::io::Read as _;

use super::*;

struct Sliver {
    _dir: tempfile::TempDir,
    settings: Settings,
    paths: Paths,
    shape: Shape,
}

impl Sliver {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings::for_tests(dir.path());
        let paths = Paths { dir: dir.path().join("run"), state: dir.path().join("state") };
        fs::create_dir(&paths.state).unwrap();
        fs::write(paths.disk(), "the disk").unwrap();
        fs::write(files::base(&settings, "mini"), "the base").unwrap();
        let shape = Shape { base: "mini".into(), memory_mib: 1, vcpus: 1 };
        Self { _dir: dir, settings, paths, shape }
    }

    fn about(&self) -> Result<About, Error> {
        About::new(&self.settings, &self.paths, &self.shape, 100_001)
    }

    fn begin(&self) -> Saving {
        let mut saving = Saving::begin(&self.paths, &self.about().unwrap()).unwrap();
        saving.state.write_all(b"state").unwrap();
        saving.memory.write_all(b"memory").unwrap();
        saving.sync().unwrap();
        saving
    }

    fn take(&self) -> Result<Option<Claim>, Error> {
        Claim::take(&self.paths, || self.about())
    }

    fn left(&self) -> Vec<String> {
        let names = fs::read_dir(&self.paths.state).unwrap();
        names.map(|e| e.unwrap().file_name().into_string().unwrap()).filter(|n| n != "disk.img").collect()
    }
}

#[test]
fn what_was_saved_is_taken_once() {
    let sliver = Sliver::new();
    assert!(sliver.take().unwrap().is_none());
    sliver.begin().finish().unwrap();
    let claim = sliver.take().unwrap().unwrap();
    let Start::Restore { state, memory, .. } = claim.start() else { panic!() };
    let mut opened = File::open(&memory).unwrap();
    assert_eq!(fs::read(state).unwrap(), b"state");
    // A node manager that starts while the first has not dropped it finds nothing to go on from.
    assert!(sliver.take().unwrap().is_none());
    drop(claim);
    assert_eq!(sliver.left(), [""; 0]);
    let mut text = String::new();
    opened.read_to_string(&mut text).unwrap();
    assert_eq!(text, "memory", "the machine that opened it keeps it");
}

#[test]
fn an_unfinished_or_forgotten_saving_is_nothing() {
    let sliver = Sliver::new();
    drop(sliver.begin());
    assert!(sliver.take().unwrap().is_none());
    sliver.begin().finish().unwrap();
    forget(&sliver.paths).unwrap();
    assert!(sliver.take().unwrap().is_none());
    assert_eq!(sliver.left(), [""; 0]);
}

#[test]
fn what_does_not_fit_the_sliver_is_refused_and_removed() {
    type Change = fn(&mut Sliver);
    let changes: [(&str, Change); 5] = [
        ("memory", |s| s.shape.memory_mib = 2),
        ("processors", |s| s.shape.vcpus = 2),
        ("base", |s| fs::write(files::base(&s.settings, "mini"), "another base").unwrap()),
        ("disk", |s| fs::write(s.paths.disk(), "another disk").unwrap()),
        ("damage", |s| fs::write(s.paths.state.join("saved/about.json"), "{}").unwrap()),
    ];
    for (what, change) in changes {
        let mut sliver = Sliver::new();
        sliver.begin().finish().unwrap();
        change(&mut sliver);
        assert!(sliver.take().is_err(), "{what}");
        assert!(sliver.take().unwrap().is_none(), "{what}");
        assert_eq!(sliver.left(), [""; 0], "{what}");
    }
}

#[test]
fn what_does_not_fit_the_disk_is_not_begun() {
    let sliver = Sliver::new();
    let about = About { memory_mib: u32::MAX, ..sliver.about().unwrap() };
    let error = Saving::begin(&sliver.paths, &about).unwrap_err().to_string();
    assert!(error.contains("are needed"), "{error}");
    assert_eq!(sliver.left(), [""; 0]);
}
