//! A sliver's own disk: a sparse file with an empty ext4 file system, made once and kept until the sliver is deleted.
//!
//! One empty file system of each size is made by mke2fs; of it only the blocks that are not zero are kept, in memory, a hundred KiB at most for
//! common sizes. A new disk is a hole of the right size with those blocks written into it. Tables of inodes and the journal are left
//! holes and said to be zero, so the guest's kernel never goes through them in the background.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use tokio::process::Command;
use tokio::sync::Mutex;

use super::Paths;
use crate::error::Error;

const MKFS_WAIT: Duration = Duration::from_secs(300);
/// Sizes kept, and the most bytes of one that is kept: tenants choose sizes, so there may be any number.
const MAX_BLANKS: usize = 16;
const MAX_KEPT: usize = 1 << 20;
/// Granularity of what is looked at, bytes: the host's blocks.
const BLOCK: usize = 4096;
/// Of the ext4 features that mke2fs 1.47 knows, those a sliver's disk has; said in full, so that no configuration file matters. Backups of
/// the superblock: one, because each is a block of a new disk.
const FEATURES: &str = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,sparse_super2,large_file,huge_file,\
                        dir_nlink,extra_isize,metadata_csum";

/// Empty file systems.
#[derive(Debug)]
pub struct Blanks {
    scratch: PathBuf,
    mke2fs: PathBuf,
    /// The size in MiB, and what it holds; the last used first.
    kept: Mutex<VecDeque<(u32, Arc<Blank>)>>,
}

/// An empty file system, without what is zero.
#[derive(Debug, PartialEq, Eq)]
pub struct Blank {
    /// Its size, bytes.
    size: u64,
    /// Offset and contents of what is not zero.
    extents: Vec<(u64, Vec<u8>)>,
}

impl Blanks {
    /// None yet; they will be made in files in `scratch` by `mke2fs`.
    pub fn new(scratch: PathBuf, mke2fs: PathBuf) -> Self {
        Self { scratch, mke2fs, kept: Mutex::default() }
    }

    /// The one of `mib` MiB, made if it is not there. Concurrent needs wait for one maker.
    ///
    /// # Errors
    /// mke2fs failed.
    pub async fn get(&self, mib: u32) -> Result<Arc<Blank>, Error> {
        let mut kept = self.kept.lock().await;
        if let Some(at) = kept.iter().position(|(size, _)| *size == mib)
            && let Some(found) = kept.remove(at)
        {
            kept.push_front(found.clone());
            return Ok(found.1);
        }
        let blank = Arc::new(self.make(mib).await?);
        if blank.extents.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() <= MAX_KEPT {
            kept.truncate(MAX_BLANKS - 1);
            kept.push_front((mib, Arc::clone(&blank)));
        }
        Ok(blank)
    }

    async fn make(&self, mib: u32) -> Result<Blank, Error> {
        fs::create_dir_all(&self.scratch).map_err(Error::io("make", &self.scratch))?;
        let path = self.scratch.join("empty-disk");
        let size = u64::from(mib) << 20;
        let file = create(&path, size).map_err(Error::io("make", &path))?;
        let mut command = Command::new(&self.mke2fs);
        command.args(["-q", "-F", "-t", "ext4", "-I", "256"]).args(arguments(mib)).arg(&path);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let failed = |message| Error::Program { program: self.mke2fs.clone(), path: path.clone(), message };
        let output = tokio::time::timeout(MKFS_WAIT, command.output()).await;
        let output =
            output.map_err(|_| failed("it takes too long".to_owned()))?.map_err(|e| failed(e.to_string()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(failed(format!("{}: {said}", output.status)));
        }
        let extents = tokio::task::spawn_blocking(move || extents(&file)).await?;
        let extents = extents.map_err(Error::io("read", &path))?;
        fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        Ok(Blank { size, extents })
    }
}

/// How a file system of `mib` MiB is laid out. No root reserve: the guest's own root is all there is.
fn arguments(mib: u32) -> Vec<String> {
    // A small disk has small blocks, because a journal has 1,024 of them at the least.
    let (block, journal_mib) = if mib < 64 { (1024, 1) } else { (4096, (mib / 128).clamp(4, 64)) };
    let bytes_per_inode = if mib < 512 { 4096 } else { 16384 };
    let said = [
        ("-b", block.to_string()),
        ("-i", bytes_per_inode.to_string()),
        ("-m", "0".to_owned()),
        ("-J", format!("size={journal_mib}")),
        ("-O", FEATURES.to_owned()),
        ("-E", "assume_storage_prezeroed=1,num_backup_sb=1,root_owner=0:0".to_owned()),
    ];
    said.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
}

fn create(path: &Path, size: u64) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    file.set_len(size)?;
    Ok(file)
}

/// What of a sparse file is not zero.
fn extents(file: &File) -> io::Result<Vec<(u64, Vec<u8>)>> {
    let mut extents: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut block = [0; BLOCK];
    let mut hole = 0;
    while let Some(data) = seek(file, SeekFrom::Data(hole))? {
        hole = seek(file, SeekFrom::Hole(data))?.unwrap_or(data);
        for at in (data..hole).step_by(BLOCK) {
            let count = file.read_at(&mut block, at)?;
            let bytes = block.get(..count).unwrap_or_default();
            if bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            match extents.last_mut() {
                Some((start, before)) if *start + before.len() as u64 == at => {
                    before.extend_from_slice(bytes)
                }
                _ => extents.push((at, bytes.to_vec())),
            }
        }
    }
    Ok(extents)
}

fn seek(file: impl AsFd, to: SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, to) {
        Ok(at) => Ok(Some(at)),
        // Nothing but a hole up to the end.
        Err(Errno::NXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

impl Blank {
    /// Writes it to a new file.
    fn copy_to(&self, path: &Path) -> io::Result<File> {
        let file = create(path, self.size)?;
        for (at, bytes) in &self.extents {
            file.write_all_at(bytes, *at)?;
        }
        Ok(file)
    }
}

/// A sliver's disk on its way to its machine.
#[derive(Debug)]
pub enum Disk {
    /// It was there.
    Kept(PathBuf),
    /// It is new, and not safe yet from a node that fails.
    New {
        /// What is to be made durable.
        file: File,
        /// Where it is now.
        aside: PathBuf,
        /// Where it belongs.
        path: PathBuf,
    },
}

impl Disk {
    /// The disk, made from `blank` if it is not there. Blocks a little.
    pub fn prepare(paths: &Paths, blank: impl FnOnce() -> Option<Arc<Blank>>) -> Result<Self, Error> {
        let path = paths.disk();
        if path.exists() {
            return Ok(Self::Kept(path));
        }
        fs::create_dir_all(&paths.state).map_err(Error::io("make", &paths.state))?;
        let aside = paths.state.join("disk.new");
        let gone = || io::Error::new(io::ErrorKind::NotFound, "the disk went away meanwhile");
        let blank = blank().ok_or_else(gone).map_err(Error::io("make", &path))?;
        let file = blank.copy_to(&aside).map_err(Error::io("make", &aside))?;
        Ok(Self::New { file, aside, path })
    }

    /// Where a machine that starts now opens it.
    pub fn path(&self) -> &Path {
        match self {
            Self::Kept(path) | Self::New { aside: path, .. } => path,
        }
    }

    /// Makes it durable and gives it its name: to be called when its machine has opened it and before the tenant's first
    /// instruction. Blocks on the disk.
    pub fn settle(self) -> Result<(), Error> {
        let Self::New { file, aside, path } = self else { return Ok(()) };
        file.sync_all().map_err(Error::io("sync", &aside))?;
        fs::rename(&aside, &path).map_err(Error::io("rename", &aside))?;
        sync_parent(&path)
    }
}

/// Makes what happened to a name durable.
pub fn sync_parent(path: &Path) -> Result<(), Error> {
    let parent = path.parent().unwrap_or(path);
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", parent))
}

#[cfg(test)]
#[path = "disk_test.rs"]
mod tests;
