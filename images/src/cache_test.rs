//! Tests of the cache: once, whole, and checked.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

fn recipe(text: &str) -> Recipe {
    Recipe::new("thing", 1).input("text", text)
}

fn cache() -> (tempfile::TempDir, Cache) {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(&directory.path().join("cache")).unwrap();
    (directory, cache)
}

fn write(build: &Build<'_>, text: &str) -> Result<()> {
    std::fs::write(build.scratch.join("rubbish"), "x").unwrap();
    std::fs::create_dir(build.out.join("deep")).unwrap();
    std::fs::write(build.out.join("deep/file"), text).unwrap();
    Ok(())
}

fn names(cache: &Cache) -> Vec<String> {
    cache.list().unwrap().into_iter().map(|(_, n)| n).filter(|n| n.contains("thing")).collect()
}

#[test]
fn keys_depend_on_every_input() {
    let a = recipe("a");
    assert_eq!(a.name(), recipe("a").name());
    let others = [
        recipe("b"),
        Recipe::new("thing", 2).input("text", "a"),
        Recipe::new("other", 1).input("text", "a"),
        recipe("a").input("more", ""),
        Recipe::new("thing", 1).input("tex", "ta"),
    ];
    for other in others {
        assert_ne!(a.name(), other.name());
    }
}

#[test]
fn builds_once_and_keeps() {
    let (_directory, cache) = cache();
    let entry = cache.get(&recipe("a"), |b| write(b, "one")).unwrap();
    assert_eq!(std::fs::read_to_string(entry.path("deep/file")).unwrap(), "one");
    assert_eq!(entry.size(), 3);
    let again = cache.get(&recipe("a"), |_| panic!("built twice")).unwrap();
    assert_eq!(again.path("deep/file"), entry.path("deep/file"));
    assert_eq!(names(&cache), [recipe("a").name()], "scratch and temporary directories are gone");
}

#[test]
fn concurrent_builders_build_once() {
    let (_directory, cache) = cache();
    let (built, barrier) = (AtomicUsize::new(0), Barrier::new(8));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                barrier.wait();
                let entry = cache.get(&recipe("a"), |b| {
                    built.fetch_add(1, Ordering::SeqCst);
                    write(b, "one")
                });
                assert_eq!(std::fs::read_to_string(entry.unwrap().path("deep/file")).unwrap(), "one");
            });
        }
    });
    assert_eq!(built.into_inner(), 1);
}

#[test]
fn failure_leaves_no_entry() {
    let (_directory, cache) = cache();
    let failed = cache.get(&recipe("a"), |b| {
        write(b, "half")?;
        Err(Error::unexpected("this", "did not work"))
    });
    assert!(failed.is_err());
    assert!(names(&cache).is_empty());
    assert_eq!(cache.get(&recipe("a"), |b| write(b, "whole")).unwrap().size(), 5);
}

#[test]
fn what_a_killed_builder_left_is_swept() {
    let (_directory, cache) = cache();
    // A process that is killed runs no destructors: its temporary directory stays, and its lock is free.
    let leave = |recipe: Recipe| {
        let left = cache.root().join(format!(".{}.Xy12", recipe.name()));
        std::fs::create_dir_all(left.join("out")).unwrap();
        std::fs::write(left.join("out/file"), "half").unwrap();
        let lock = File::create(cache.root().join("locks").join(recipe.name())).unwrap();
        (left, lock)
    };
    let (same_key, _) = leave(recipe("a"));
    let (other_key, _) = leave(recipe("b"));
    let (living, lock) = leave(recipe("c"));
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    cache.get(&recipe("a"), |b| write(b, "whole")).unwrap();
    assert!(!same_key.exists() && !other_key.exists());
    assert!(living.exists(), "another process still builds it");
}

#[test]
fn damage_is_seen_and_repaired() {
    let (_directory, cache) = cache();
    let damages: [fn(&Path); 4] = [
        |d| std::fs::write(d.join("deep/file"), "longer than before").unwrap(),
        |d| std::fs::write(d.join("deep/file"), "two").unwrap(),
        |d| std::fs::remove_file(d.join("deep/file")).unwrap(),
        |d| std::fs::write(d.join(MANIFEST), "{").unwrap(),
    ];
    for damage in damages {
        cache.get(&recipe("a"), |b| write(b, "one")).unwrap();
        damage(&cache.root().join(recipe("a").name()));
        let mut rebuilt = false;
        let entry = cache.get(&recipe("a"), |b| {
            rebuilt = true;
            write(b, "one")
        });
        assert!(rebuilt);
        assert_eq!(std::fs::read_to_string(entry.unwrap().path("deep/file")).unwrap(), "one");
    }
}

#[test]
fn a_copied_cache_stays_valid() {
    let (_directory, cache) = cache();
    let entry = cache.get(&recipe("a"), |b| write(b, "one")).unwrap();
    // A copy has other times but the same bytes.
    std::fs::write(entry.path("deep/file"), "one").unwrap();
    cache.get(&recipe("a"), |_| panic!("built twice")).unwrap();
}

#[test]
fn only_old_entries_are_pruned() {
    let (_directory, cache) = cache();
    let build = |n: u32| cache.get(&recipe(&n.to_string()), |b| write(b, "x")).unwrap();
    let entries: Vec<Entry> = (0..10).map(build).collect();
    for (entry, days) in entries.iter().zip(1..) {
        let unused = std::fs::FileTimes::new().set_accessed(SystemTime::now() - DAY * days);
        File::open(entry.path(MANIFEST)).and_then(|f| f.set_times(unused)).unwrap();
    }
    cache.prune("thing");
    let left = names(&cache);
    assert!(entries.iter().take(6).all(|e| left.contains(&e.name())), "{left:?}");
    assert_eq!(left.len(), 6);
}
