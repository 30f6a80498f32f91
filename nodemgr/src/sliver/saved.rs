//! Slivers that were saved for a planned restart of the node: `STATE/slivers/SLICE/saved/{about.json,state,memory}`.
//!
//! A saved sliver goes on exactly once. Its disk goes on with it, so a second start from the same files would find a disk that is not the one
//! its memory knows, and destroy it. Therefore:
//! - the files get their name `saved` after the machine they were taken of has ended, and everything, disk included, is durable;
//! - to go on, they first lose that name, durably: whatever happens from then on, nobody starts from them again.
//!
//! ```text
//!   saved.new ──machine gone, all durable──► saved ──renamed, durable──► resuming ──machine has opened them──► (removed)
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use commonage_vmm_api::Start;
use serde::{Deserialize, Serialize};

use super::Paths;
use super::disk::sync_parent;
use super::files::{self, remove_tree};
use crate::error::Error;
use crate::manager::Settings;
use crate::template::Shape;

/// Free space that saving leaves, bytes.
const SPARE: u64 = 64 << 20;

/// What a saved machine was made of: it goes on only in a machine of the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// The sliver's user id, which no other sliver has had.
    uid: u32,
    memory_mib: u32,
    vcpus: u8,
    base: String,
    /// The base's image: number, size, seconds and nanoseconds of its last change. A device's number may be another after a restart.
    image: (u64, u64, i64, i64),
    disk_bytes: u64,
}

impl About {
    /// Of the sliver as it would be started now.
    pub fn new(settings: &Settings, paths: &Paths, shape: &Shape, uid: u32) -> Result<Self, Error> {
        let path = files::base(settings, &shape.base);
        let image = fs::metadata(&path).map_err(Error::io("look at", &path))?;
        let disk = paths.disk();
        let disk_bytes = fs::metadata(&disk).map_err(Error::io("look at", &disk))?.len();
        Ok(Self {
            uid,
            memory_mib: shape.memory_mib,
            vcpus: shape.vcpus,
            base: shape.base.clone(),
            image: (image.ino(), image.size(), image.mtime(), image.mtime_nsec()),
            disk_bytes,
        })
    }
}

fn at(paths: &Paths, name: &str) -> PathBuf {
    paths.state.join(name)
}

/// A saving that has begun.
#[derive(Debug)]
pub struct Saving {
    paths: Paths,
    /// Where the machine writes the state of its processors and devices.
    pub state: File,
    /// Where it writes its memory.
    pub memory: File,
}

impl Saving {
    /// Makes the files, if there is room for them.
    ///
    /// # Errors
    /// There is not, or a file cannot be made.
    pub fn begin(paths: &Paths, about: &About) -> Result<Self, Error> {
        let room =
            rustix::fs::statvfs(&paths.state).map_err(|e| Error::io("look at", &paths.state)(e.into()))?;
        let (free, wanted) =
            (room.f_bavail.saturating_mul(room.f_frsize), (u64::from(about.memory_mib) << 20) + SPARE);
        if free < wanted {
            let message = format!("{} MiB are free, {} MiB are needed", free >> 20, wanted >> 20);
            return Err(Error::io("save into", &paths.state)(std::io::Error::other(message)));
        }
        let dir = at(paths, "saved.new");
        remove_tree(&dir)?;
        fs::DirBuilder::new().mode(0o700).create(&dir).map_err(Error::io("make", &dir))?;
        let mut json = create(&dir.join("about.json"))?;
        let text = serde_json::to_vec_pretty(about).map_err(|e| Error::io("write", &dir)(e.into()))?;
        json.write_all(&text).and_then(|()| json.sync_all()).map_err(Error::io("write", &dir))?;
        let (state, memory) = (create(&dir.join("state"))?, create(&dir.join("memory"))?);
        Ok(Self { paths: paths.clone(), state, memory })
    }

    /// Makes what the machine wrote durable; the machine may still live, paused.
    pub fn sync(&self) -> Result<(), Error> {
        let dir = at(&self.paths, "saved.new");
        self.state.sync_all().and_then(|()| self.memory.sync_all()).map_err(Error::io("sync", &dir))?;
        let disk = self.paths.disk();
        File::open(&disk).and_then(|disk| disk.sync_all()).map_err(Error::io("sync", &disk))?;
        sync_parent(&dir.join("state"))
    }

    /// The machine has ended: from now on the sliver is saved.
    pub fn finish(self) -> Result<(), Error> {
        let (dir, saved) = (at(&self.paths, "saved.new"), at(&self.paths, "saved"));
        fs::rename(&dir, &saved).map_err(Error::io("rename", &dir))?;
        sync_parent(&saved)
    }
}

fn create(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600).open(path).map_err(Error::io("make", path))
}

/// What a sliver that was saved goes on from. Removed when dropped.
#[derive(Debug)]
pub struct Claim {
    dir: PathBuf,
}

impl Claim {
    /// Takes what was saved, if anything was, so that nobody ever takes it again; `about` is what it has to be of.
    ///
    /// # Errors
    /// It is of something else, or damaged. It is removed in any case.
    pub fn take(paths: &Paths, about: impl FnOnce() -> Result<About, Error>) -> Result<Option<Self>, Error> {
        discard(paths, &["saved.new", "resuming"])?;
        let (saved, dir) = (at(paths, "saved"), at(paths, "resuming"));
        if !saved.exists() {
            return Ok(None);
        }
        fs::rename(&saved, &dir).map_err(Error::io("rename", &saved))?;
        sync_parent(&saved)?;
        let claim = Self { dir };
        let path = claim.dir.join("about.json");
        let text = fs::read(&path).map_err(Error::io("read", &path))?;
        let is: About = serde_json::from_slice(&text).map_err(|e| Error::io("read", &path)(e.into()))?;
        let wanted = about()?;
        if is != wanted {
            let message = format!("it is of {is:?}, which is not the sliver as it is now: {wanted:?}");
            return Err(Error::io("go on from", &path)(std::io::Error::other(message)));
        }
        Ok(Some(claim))
    }

    /// How a machine goes on from it. When the machine answers it has opened the files, and they can be dropped.
    pub fn start(&self) -> Start {
        Start::Restore { state: self.dir.join("state"), memory: self.dir.join("memory"), prefault: None }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        remove_tree(&self.dir).unwrap_or_else(|e| tracing::error!("{e}"));
    }
}

/// Makes sure that nobody ever goes on from what was saved: the machine lives, or starts afresh.
pub fn forget(paths: &Paths) -> Result<(), Error> {
    discard(paths, &["saved", "saved.new", "resuming"])
}

fn discard(paths: &Paths, names: &[&str]) -> Result<(), Error> {
    for dir in names.iter().map(|name| at(paths, name)).filter(|dir| dir.exists()) {
        remove_tree(&dir)?;
        sync_parent(&dir)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "saved_test.rs"]
mod tests;
