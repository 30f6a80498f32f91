//! Tests of the archive writer, by a reader that knows only the format's description.

use proptest::prelude::*;

use super::*;

#[derive(Debug, PartialEq, Eq)]
struct Read {
    name: String,
    mode: u32,
    device: (u32, u32),
    bytes: Vec<u8>,
}

fn archive(tree: &Tree) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.cpio");
    let length = tree.write(&path).unwrap();
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(bytes.len() as u64, length);
    bytes
}

fn read(archive: &[u8]) -> Vec<Read> {
    let (mut at, mut entries) = (0_usize, Vec::new());
    loop {
        let header = &archive[at..at + 110];
        assert_eq!(&header[..6], b"070701");
        let field = |n: usize| {
            let text = std::str::from_utf8(&header[6 + n * 8..14 + n * 8]).unwrap();
            u32::from_str_radix(text, 16).unwrap()
        };
        assert_eq!((field(2), field(3), field(5)), (0, 0, 0), "owner, group and time");
        let name_end = at + 110 + field(11) as usize;
        let name = String::from_utf8(archive[at + 110..name_end - 1].to_vec()).unwrap();
        assert_eq!(archive[name_end - 1], 0);
        let data = name_end.next_multiple_of(4);
        let end = data + field(6) as usize;
        if name == TRAILER {
            assert!(archive[end..].iter().all(|b| *b == 0));
            return entries;
        }
        entries.push(Read {
            name,
            mode: field(1),
            device: (field(9), field(10)),
            bytes: archive[data..end].to_vec(),
        });
        at = end.next_multiple_of(4);
    }
}

#[test]
fn every_kind_of_node() {
    let source = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(source.path(), "from a file").unwrap();
    let mut tree = Tree::new();
    tree.file("/init", 0o755, source.path())
        .bytes("/etc/commonage/node.json", 0o600, "{}")
        .symlink("/bin/sh", "busybox")
        .character_device("/dev/console", 0o600, 5, 1);
    let archive = archive(&tree);
    assert_eq!(archive.len() % 512, 0);
    let entry = |name: &str, mode, device, bytes: &str| Read {
        name: name.into(),
        mode,
        device,
        bytes: bytes.as_bytes().to_vec(),
    };
    let expected = [
        entry("bin", 0o040_755, (0, 0), ""),
        entry("bin/sh", 0o120_777, (0, 0), "busybox"),
        entry("dev", 0o040_755, (0, 0), ""),
        entry("dev/console", 0o020_600, (5, 1), ""),
        entry("etc", 0o040_755, (0, 0), ""),
        entry("etc/commonage", 0o040_755, (0, 0), ""),
        entry("etc/commonage/node.json", 0o100_600, (0, 0), "{}"),
        entry("init", 0o100_755, (0, 0), "from a file"),
    ];
    assert_eq!(read(&archive), expected);
}

#[test]
fn a_missing_source_is_named() {
    let mut tree = Tree::new();
    tree.file("/init", 0o755, Path::new("/no/such/file"));
    let directory = tempfile::tempdir().unwrap();
    let error = tree.write(&directory.path().join("a")).unwrap_err().to_string();
    assert!(error.contains("/no/such/file"), "{error}");
}

#[test]
fn directories_are_copied_whole() {
    let source = tempfile::tempdir().unwrap();
    std::fs::create_dir(source.path().join("a")).unwrap();
    std::fs::write(source.path().join("a/b"), "x").unwrap();
    std::os::unix::fs::symlink("b", source.path().join("a/c")).unwrap();
    let mut tree = Tree::new();
    tree.copy("/lib", source.path()).unwrap();
    let names: Vec<_> = read(&archive(&tree)).into_iter().map(|r| r.name).collect();
    assert_eq!(names, ["lib", "lib/a", "lib/a/b", "lib/a/c"]);
}

proptest! {
    #[test]
    fn what_is_written_is_read(files in proptest::collection::btree_map("[a-z]{1,9}", proptest::collection::vec(any::<u8>(), 0..50), 0..9)) {
        let mut tree = Tree::new();
        for (name, bytes) in &files {
            tree.bytes(name, 0o644, bytes.clone());
        }
        let bytes = archive(&tree);
        let back: BTreeMap<_, _> = read(&bytes).into_iter().map(|r| (r.name, r.bytes)).collect();
        prop_assert_eq!(back, files);
        prop_assert_eq!(bytes, archive(&tree));
    }
}
