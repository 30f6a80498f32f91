//! Copies of file systems that are mostly holes.

use std::os::unix::fs::MetadataExt as _;

use proptest::prelude::*;

use super::*;

fn paths(dir: &tempfile::TempDir) -> Paths {
    Paths { dir: dir.path().join("run"), state: dir.path().join("state") }
}

proptest! {
    #[test]
    fn a_copy_reads_like_its_original(
        writes in prop::collection::vec((0u64..300, 0usize..9000, 0u8..3), 0..12), size in 0u64..1_000_000,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let original = dir.path().join("original");
        let file = create(&original, size).unwrap();
        for (block, length, byte) in writes {
            let room = size.saturating_sub(block * BLOCK as u64).min(length as u64) as usize;
            file.write_all_at(&vec![byte; room], block * BLOCK as u64).unwrap();
        }
        let blank = Blank { size, extents: extents(&file).unwrap() };
        let copy = dir.path().join("copy");
        blank.copy_to(&copy).unwrap();
        prop_assert!(fs::read(&original).unwrap() == fs::read(&copy).unwrap());
        prop_assert!(blank.extents.iter().all(|(_, bytes)| bytes.chunks(BLOCK).all(|b| b.iter().any(|b| *b != 0))));
    }
}

#[test]
fn a_new_disk_is_a_hole_until_it_is_settled_and_then_kept() {
    let dir = tempfile::tempdir().unwrap();
    let paths = paths(&dir);
    let blank = Arc::new(Blank { size: 64 << 20, extents: vec![(1 << 20, vec![7; BLOCK])] });
    let disk = Disk::prepare(&paths, || Some(Arc::clone(&blank))).unwrap();
    let meta = fs::metadata(disk.path()).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o777), (64 << 20, 0o600));
    assert!(meta.blocks() * 512 <= 64 * 1024, "{} blocks", meta.blocks());
    assert!(!paths.disk().exists());
    // The node failed here: made anew.
    let disk = Disk::prepare(&paths, || Some(blank)).unwrap();
    disk.settle().unwrap();
    let kept = Disk::prepare(&paths, || panic!("it is there")).unwrap();
    assert_eq!(kept.path(), paths.disk());
    kept.settle().unwrap();
}

#[tokio::test]
#[ignore = "needs mke2fs and e2fsck"]
async fn empty_file_systems_are_sound_and_small() {
    let dir = tempfile::tempdir().unwrap();
    let blanks = Blanks::new(dir.path().join("scratch"), "/sbin/mke2fs".into());
    for mib in [16, 63, 64, 512, 1024, 65536] {
        let blank = blanks.get(mib).await.unwrap();
        let path = dir.path().join("disk");
        blank.copy_to(&path).unwrap();
        let kib = fs::metadata(&path).unwrap().blocks() / 2;
        println!("{mib} MiB: {kib} KiB");
        let bound = if mib <= 1024 { 64 } else { 256 };
        assert!(kib <= bound, "a new disk of {mib} MiB takes {kib} KiB");
        let check =
            std::process::Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&path).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        assert_eq!(blanks.get(mib).await.unwrap(), blank);
    }
}
