//! The content-addressed cache that every artifact lives in.
//!
//! An artifact is described by a [`Recipe`]: a kind, the recipe's version and all its inputs by name (its configuration, package versions,
//! hashes of files). The hash of those is the key, and `KIND-KEY/` the directory of what was built. What always holds:
//! - an entry is made in a directory beside it and renamed into place when complete, so a partial entry is never seen;
//! - whoever uses an entry first checks it against its manifest; a damaged one is thrown away and built again;
//! - a file lock for each key lets one process build while the others wait, so nothing is built twice. A lock ends with its process;
//! - an entry in use is never pruned: pruning takes only what nobody has used for a week, or, of kinds with many entries, a day.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::error::{IoContext as _, Result};
use crate::progress::{Task, megabytes};
use crate::run::Log;
use crate::{Error, hash};

const MANIFEST: &str = "manifest.json";
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Of a kind with more entries than this, those unused for a day go.
const MANY: usize = 6;

/// What an artifact is made of. Equal recipes give equal artifacts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recipe {
    kind: String,
    version: u32,
    inputs: BTreeMap<String, String>,
}

impl Recipe {
    /// A recipe without inputs. `version` changes when the code that builds changes what it makes.
    pub fn new(kind: &str, version: u32) -> Self {
        Self { kind: kind.to_owned(), version, inputs: BTreeMap::new() }
    }

    /// Adds an input by value.
    pub fn input(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.inputs.insert(name.into(), value.into());
        self
    }

    /// Adds a file as an input: its hash.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn file(self, name: impl Into<String>, path: &Path) -> Result<Self> {
        let digest = hash::file(path)?;
        Ok(self.input(name, digest))
    }

    /// `KIND-KEY`, the name of its directory. 20 hexadecimal digits are enough among what one machine ever builds.
    pub fn name(&self) -> String {
        let mut text = format!("{}\0{}\0", self.kind, self.version);
        for (name, value) in &self.inputs {
            // Lengths keep ("a", "bc") and ("ab", "c") apart.
            text.push_str(&format!("{}:{name}{}:{value}", name.len(), value.len()));
        }
        let key: String = hash::bytes(text.as_bytes()).chars().take(20).collect();
        format!("{}-{key}", self.kind)
    }
}

/// A file of an entry as it was when built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    sha256: String,
    size: u64,
    mtime: (i64, i64),
}

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    recipe: Recipe,
    files: BTreeMap<String, Stamp>,
}

/// A complete, checked artifact.
#[derive(Debug)]
pub struct Entry {
    directory: PathBuf,
    manifest: Manifest,
}

impl Entry {
    /// Where a file of it is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// `KIND-KEY`: usable as an input of other recipes in place of the content.
    pub fn name(&self) -> String {
        self.manifest.recipe.name()
    }

    /// Its files, relative, with sizes in bytes.
    pub fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.manifest.files.iter().map(|(name, stamp)| (name.as_str(), stamp.size))
    }

    /// Bytes in all.
    pub fn size(&self) -> u64 {
        self.files().map(|(_, size)| size).sum()
    }
}

/// A build under way.
#[derive(Debug)]
pub struct Build<'a> {
    /// Where to put what is to be kept.
    pub out: &'a Path,
    /// For everything else; removed afterwards.
    pub scratch: &'a Path,
    /// For child processes' output.
    pub log: &'a Log,
}

/// A cache directory. Cheap to clone; any number of processes may share one.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the cache at `root`, making it if need be.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(root: &Path) -> Result<Self> {
        std::fs::create_dir_all(root.join("locks")).doing("create", root)?;
        let root = root.canonicalize().doing("find", root)?;
        Ok(Self { root })
    }

    /// Its directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The artifact of a recipe, from the cache or built now.
    ///
    /// # Errors
    /// What `build` says, or when the cache cannot be written.
    pub fn get(&self, recipe: &Recipe, build: impl FnOnce(&Build<'_>) -> Result<()>) -> Result<Entry> {
        let name = recipe.name();
        let _lock = self.lock(&name)?;
        let directory = self.root.join(&name);
        match check(&directory) {
            Ok(Some(manifest)) => {
                touch(&directory);
                return Ok(Entry { directory, manifest });
            }
            Ok(None) => {}
            Err(why) => eprintln!("{name} in the cache is damaged ({why}); building it again"),
        }
        self.sweep(&name)?;

        let log = Log::create(&self.root.join(format!("logs/{name}.log")))?;
        let task = Task::start(&recipe.kind, Some(log.path()));
        let temporary = tempfile::Builder::new()
            .prefix(&format!(".{name}."))
            .tempdir_in(&self.root)
            .doing("create a directory in", &self.root)?;
        let (out, scratch) = (temporary.path().join("out"), temporary.path().join("scratch"));
        for made in [&out, &scratch] {
            std::fs::create_dir(made).doing("create", made)?;
        }
        build(&Build { out: &out, scratch: &scratch, log: &log })?;
        let manifest = seal(&out, recipe)?;
        std::fs::rename(&out, &directory).doing("rename into place", &directory)?;
        sync(&self.root)?;
        let entry = Entry { directory, manifest };
        task.done(&format!("built, {}", megabytes(entry.size())));
        self.prune(&recipe.kind);
        Ok(entry)
    }

    /// Takes the key's lock; ends with the returned file.
    fn lock(&self, name: &str) -> Result<File> {
        let path = self.root.join("locks").join(name);
        let file =
            File::options().create(true).truncate(false).write(true).open(&path).doing("open", &path)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let task = Task::start(&format!("{name}: another process builds it"), None);
            flock(&file, FlockOperation::LockExclusive).doing("lock", &path)?;
            drop(task);
        }
        Ok(file)
    }

    /// Removes a damaged entry of this key, whose lock the caller holds, and what builders of any key left when they were killed:
    /// those whose lock is free.
    fn sweep(&self, name: &str) -> Result<()> {
        for (path, file_name) in self.list()? {
            let temporary = file_name.strip_prefix('.').and_then(|n| n.rsplit_once('.')).map(|(key, _)| key);
            let ours = file_name == name || temporary == Some(name);
            if ours || temporary.is_some_and(|key| self.try_lock(key).is_some()) {
                std::fs::remove_dir_all(&path).doing("remove", &path)?;
            }
        }
        Ok(())
    }

    /// The key's lock, if nobody has it.
    fn try_lock(&self, name: &str) -> Option<File> {
        let file = File::open(self.root.join("locks").join(name)).ok()?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
        Some(file)
    }

    /// Forgets old entries of a kind. Failing to is no failure.
    fn prune(&self, kind: &str) {
        let Ok(entries) = self.list() else { return };
        let prefix = format!("{kind}-");
        let unused = |path: &Path| {
            let used = std::fs::metadata(path.join(MANIFEST)).and_then(|m| m.accessed()).ok()?;
            SystemTime::now().duration_since(used).ok()
        };
        let mut old: Vec<_> = entries
            .into_iter()
            .filter(|(_, name)| name.strip_prefix(&prefix).is_some_and(|key| !key.contains('-')))
            .filter_map(|(path, name)| Some((unused(&path)?, path, name)))
            .collect();
        old.sort();
        for (index, (age, path, name)) in old.into_iter().enumerate() {
            if age < DAY || (age < 7 * DAY && index < MANY) {
                continue;
            }
            if let Some(_lock) = self.try_lock(&name) {
                let _ = std::fs::remove_dir_all(path);
            }
        }
    }

    fn list(&self) -> Result<Vec<(PathBuf, String)>> {
        let entries = std::fs::read_dir(&self.root).doing("list", &self.root)?;
        Ok(entries.flatten().map(|e| (e.path(), e.file_name().to_string_lossy().into_owned())).collect())
    }
}

/// Whether an entry is what was built: `None` when there is none, an error's text when it is damaged.
/// A file whose size and time are as they were is believed; one whose time differs is hashed.
fn check(directory: &Path) -> Result<Option<Manifest>, String> {
    if !directory.exists() {
        return Ok(None);
    }
    let manifest = std::fs::read(directory.join(MANIFEST)).map_err(|e| format!("no manifest: {e}"))?;
    let manifest: Manifest = serde_json::from_slice(&manifest).map_err(|e| format!("its manifest: {e}"))?;
    for (name, stamp) in &manifest.files {
        let path = directory.join(name);
        let (size, mtime) = stat(&path).map_err(|e| e.to_string())?;
        if size != stamp.size {
            return Err(format!("{name} has {size} bytes instead of {}", stamp.size));
        }
        if mtime != stamp.mtime && hash::file(&path).map_err(|e| e.to_string())? != stamp.sha256 {
            return Err(format!("{name} was changed"));
        }
    }
    Ok(Some(manifest))
}

/// Writes the manifest and brings everything to the disk, so that after a power failure an entry is whole or absent.
fn seal(out: &Path, recipe: &Recipe) -> Result<Manifest> {
    let mut files = BTreeMap::new();
    let mut directories = vec![out.to_owned()];
    while let Some(directory) = directories.pop() {
        for item in std::fs::read_dir(&directory).doing("list", &directory)? {
            let path = item.doing("list", &directory)?.path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            sync(&path)?;
            let name = path.strip_prefix(out).map_err(|_| Error::unexpected("seal", "a file outside"))?;
            let (size, mtime) = stat(&path)?;
            files.insert(
                name.to_string_lossy().into_owned(),
                Stamp { sha256: hash::file(&path)?, size, mtime },
            );
        }
        sync(&directory)?;
    }
    let manifest = Manifest { recipe: recipe.clone(), files };
    let (path, json) = (out.join(MANIFEST), serde_json::to_vec_pretty(&manifest));
    let json = json.map_err(|e| Error::unexpected("write the manifest", e.to_string()))?;
    std::fs::write(&path, json).doing("write", &path)?;
    sync(&path)?;
    Ok(manifest)
}

fn stat(path: &Path) -> Result<(u64, (i64, i64))> {
    let m = std::fs::metadata(path).doing("look at", path)?;
    Ok((m.len(), (m.mtime(), m.mtime_nsec())))
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).doing("sync", path)
}

/// Notes the use of an entry, for [`Cache::prune`]. Access times may be off, so it is done by hand.
fn touch(directory: &Path) {
    let now = std::fs::FileTimes::new().set_accessed(SystemTime::now());
    let _ = File::open(directory.join(MANIFEST)).and_then(|f| f.set_times(now));
}

#[cfg(test)]
#[path = "cache_test.rs"]
mod tests;
