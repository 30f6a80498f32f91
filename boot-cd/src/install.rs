//! Makes the image partition hold exactly the files that the script names.
//!
//! A file with the right hash stays. Any other is fetched beside its name (`.NAME.part`), synced, read back from the disk
//! and hashed, and only then renamed: a crash at any point leaves no file under its name with the wrong contents,
//! and every start checks all hashes again anyway. What is not named is removed first, to make room.
//!
//! A file is hashed once, as the disk gives it back: that finds what went wrong at PLC, on the way and on the disk alike.
//! Whose fault it was is found out when something did.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read as _},
    path::Path,
    time::{Duration, Instant},
};

use commonage_init::{error as files, say};
use commonage_plc_api::boot::ImageFile;
use commonage_plc_client::Client;
use rustix::fs::Advice;
use sha2::{Digest as _, Sha256};
use tokio::io::BufWriter;

use crate::{
    ME,
    error::{Error, Result},
};

/// Left free for the file system's own needs.
const SLACK: u64 = 4 << 20;
/// Bytes that may wait in memory before they are written to the disk: it writes while the rest still comes.
const UNWRITTEN: u64 = 4 << 20;
/// Bytes for each write to a file.
const PIECE: usize = 1 << 20;
/// Between two lines about the same file.
const PROGRESS: Duration = Duration::from_secs(2);

/// What to do with the directory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Plan<'a> {
    /// Names to remove.
    remove: BTreeSet<String>,
    /// Files to fetch.
    fetch: BTreeMap<&'a str, &'a ImageFile>,
}

/// Compares what is there (by name, the hash if the size is right) with what should be.
fn plan<'a>(there: &BTreeMap<String, Option<String>>, wanted: &'a BTreeMap<String, ImageFile>) -> Plan<'a> {
    let right = |name: &str, file: &ImageFile| {
        there.get(name).is_some_and(|hash| hash.as_deref() == Some(file.sha256.as_str()))
    };
    let wrong = |name: &&String| !wanted.get(*name).is_some_and(|file| right(name, file));
    Plan {
        // A file with a wrong hash is as useless as one that is not named: no boot would start it.
        remove: there.keys().filter(|n| *n != "lost+found").filter(wrong).cloned().collect(),
        fetch: wanted.iter().filter(|(n, f)| !right(n, f)).map(|(n, f)| (n.as_str(), f)).collect(),
    }
}

/// Installs the files into `directory`.
pub async fn install(directory: &Path, wanted: &BTreeMap<String, ImageFile>, client: &Client) -> Result<()> {
    let there = survey(directory, wanted)?;
    let plan = plan(&there, wanted);
    say!(
        ME,
        "{} files are right, {} to fetch, {} to remove",
        wanted.len() - plan.fetch.len(),
        plan.fetch.len(),
        plan.remove.len()
    );
    for name in &plan.remove {
        let path = directory.join(name);
        let removed = match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => fs::remove_dir_all(&path),
            _ => fs::remove_file(&path),
        };
        removed.map_err(|e| Error::io(format!("remove {}", path.display()), e))?;
    }
    files::write("/proc/sys/vm/dirty_background_bytes", UNWRITTEN.to_string())
        .unwrap_or_else(|e| say!(ME, "warning: {e}"));
    for (name, file) in plan.fetch {
        fetch(directory, name, file, client).await?;
    }
    Ok(())
}

fn survey(
    directory: &Path,
    wanted: &BTreeMap<String, ImageFile>,
) -> Result<BTreeMap<String, Option<String>>> {
    let list = |e| Error::io(format!("list {}", directory.display()), e);
    let mut there = BTreeMap::new();
    for entry in fs::read_dir(directory).map_err(list)? {
        let entry = entry.map_err(list)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let size = entry.metadata().ok().filter(fs::Metadata::is_file).map(|m| m.len());
        let worth_it = wanted.get(&name).is_some_and(|file| size == Some(file.size));
        // A file that cannot be read is one to replace.
        let hash = if worth_it { sha256(&entry.path()).ok() } else { None };
        there.insert(name, hash);
    }
    Ok(there)
}

async fn fetch(directory: &Path, name: &str, file: &ImageFile, client: &Client) -> Result<()> {
    let stat = rustix::fs::statvfs(directory).map_err(|e| Error::io("see how much is free", e.into()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let full =
        || Error::Full { file: name.into(), needed_mib: file.size.div_ceil(1 << 20), free_mib: free >> 20 };
    if file.size.saturating_add(SLACK) > free {
        return Err(full());
    }
    let aside = directory.join(format!(".{name}.part"));
    let writing = |e| Error::io(format!("write {}", aside.display()), e);
    let to = tokio::fs::File::create(&aside).await.map_err(writing)?;
    let mut to = BufWriter::with_capacity(PIECE, to);
    let mut progress = Progress::new(Instant::now());
    let told = |done: u64| {
        if progress.is_due(Instant::now()) {
            say!(ME, "{name}: {} of {} MiB", done >> 20, file.size >> 20);
        }
    };
    let fetched = client.download_unhashed_boot_file(&file.sha256, file.size, &mut to, told).await;
    let to = to.into_inner();
    if let Err(e) = fetched {
        drop(to);
        fs::remove_file(&aside).ok();
        return Err(match e {
            commonage_plc_client::Error::Local { source, .. }
                if source.kind() == io::ErrorKind::StorageFull =>
            {
                full()
            }
            e => e.into(),
        });
    }
    to.sync_all().await.map_err(writing)?;
    // From the disk, not from what was just put into memory.
    rustix::fs::fadvise(&to, 0, None, Advice::DontNeed).map_err(|e| writing(e.into()))?;
    drop(to);
    if sha256(&aside).map_err(|e| Error::io(format!("read {}", aside.display()), e))? != file.sha256 {
        fs::remove_file(&aside).ok();
        // If PLC's file is damaged this says so.
        client.download_boot_file(&file.sha256, file.size, &mut tokio::io::sink(), |_| {}).await?;
        return Err(Error::ReadBack { file: name.into() });
    }
    fs::rename(&aside, directory.join(name)).map_err(writing)?;
    File::open(directory).and_then(|d| d.sync_all()).map_err(writing)?;
    say!(ME, "{name}: installed, {} MiB", file.size.div_ceil(1 << 20));
    Ok(())
}

/// When to say how far a transfer is: not at all of one that is quick, and a console is slow.
struct Progress {
    last: Instant,
}

impl Progress {
    fn new(start: Instant) -> Self {
        Self { last: start }
    }

    fn is_due(&mut self, now: Instant) -> bool {
        let due = now.saturating_duration_since(self.last) >= PROGRESS;
        if due {
            self.last = now;
        }
        due
    }
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        let read = file.read(&mut buffer)?;
        match buffer.get(..read) {
            Some([]) | None => return Ok(hex::encode(hash.finalize())),
            Some(bytes) => hash.update(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn image(contents: &str) -> ImageFile {
        ImageFile { sha256: hex::encode(Sha256::digest(contents)), size: contents.len() as u64 }
    }

    #[test]
    fn sees_what_is_right_and_what_is_not() {
        let directory = tempfile::tempdir().unwrap();
        for (name, contents) in
            [("right", "abc"), ("changed", "xyz"), ("short", "a"), (".new.part", "half"), ("old", "")]
        {
            fs::write(directory.path().join(name), contents).unwrap();
        }
        fs::create_dir(directory.path().join("lost+found")).unwrap();
        fs::create_dir(directory.path().join("directory")).unwrap();
        let wanted: BTreeMap<_, _> =
            ["right", "changed", "short", "new", "directory"].map(|n| (n.to_owned(), image("abc"))).into();
        let there = survey(directory.path(), &wanted).unwrap();
        let plan = plan(&there, &wanted);
        assert_eq!(plan.fetch.keys().copied().collect::<Vec<_>>(), ["changed", "directory", "new", "short"]);
        let remove: Vec<_> = plan.remove.iter().map(String::as_str).collect();
        assert_eq!(remove, [".new.part", "changed", "directory", "old", "short"]);
    }

    #[test]
    fn tells_progress_every_two_seconds() {
        let start = Instant::now();
        let mut progress = Progress::new(start);
        let due: Vec<u64> =
            (0..70).filter(|tenth| progress.is_due(start + Duration::from_millis(tenth * 100))).collect();
        assert_eq!(due, [20, 40, 60]);
        // Quick ones say nothing, and one that stood still is told of once.
        assert!(progress.is_due(start + Duration::from_secs(60)));
        assert!(!progress.is_due(start + Duration::from_secs(61)));
    }

    proptest! {
        /// Whatever is there: afterwards exactly what is wanted is there.
        #[test]
        fn ends_with_what_is_wanted(
            there in proptest::collection::btree_map("[a-d]", proptest::option::of("[xy]"), 0..5),
            wanted in proptest::collection::btree_map("[a-d]", "[xy]", 0..5),
        ) {
            let wanted: BTreeMap<_, _> =
                wanted.into_iter().map(|(n, sha256)| (n, ImageFile { sha256, size: 1 })).collect();
            let plan = plan(&there, &wanted);
            let mut after = there.clone();
            after.retain(|n, _| !plan.remove.contains(n));
            after.extend(plan.fetch.iter().map(|(n, f)| ((*n).to_owned(), Some(f.sha256.clone()))));
            let expected: BTreeMap<_, _> = wanted.iter().map(|(n, f)| (n.clone(), Some(f.sha256.clone()))).collect();
            prop_assert_eq!(after, expected);
            for (name, file) in &wanted {
                if there.get(name) == Some(&Some(file.sha256.clone())) {
                    prop_assert!(!plan.fetch.contains_key(name.as_str()));
                }
            }
        }
    }
}
