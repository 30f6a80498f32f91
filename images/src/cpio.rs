//! Archives for the kernel to unpack at boot: a [`Tree`] of files, written in the "newc" format (see the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Equal trees give equal bytes: entries are sorted, owners and times are zero, inode numbers count up. A written archive's
//! length is a multiple of 512, so one may follow another (the kernel wants them at multiples of 4).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext as _, Result};

const ALIGNMENT: u64 = 512;
const TRAILER: &str = "TRAILER!!!";

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Directory,
    Bytes { mode: u32, bytes: Vec<u8> },
    File { mode: u32, source: PathBuf },
    Symlink { target: String },
    CharacterDevice { mode: u32, major: u32, minor: u32 },
}

/// Files to be archived. Paths are given as the booted system sees them (`/sbin/mke2fs`); parents come by themselves, with mode 0755.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// A directory.
    pub fn directory(&mut self, path: &str) -> &mut Self {
        self.insert(path, Node::Directory)
    }

    /// A file with these bytes.
    pub fn bytes(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) -> &mut Self {
        self.insert(path, Node::Bytes { mode, bytes: bytes.into() })
    }

    /// A file with the bytes that another has when the archive is written.
    pub fn file(&mut self, path: &str, mode: u32, source: &Path) -> &mut Self {
        self.insert(path, Node::File { mode, source: source.to_owned() })
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.insert(path, Node::Symlink { target: target.to_owned() })
    }

    /// A character device.
    pub fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> &mut Self {
        self.insert(path, Node::CharacterDevice { mode, major, minor })
    }

    /// Everything in a directory of this machine: directories, files (all 0644) and links.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub fn copy(&mut self, path: &str, source: &Path) -> Result<&mut Self> {
        for item in std::fs::read_dir(source).doing("list", source)? {
            let item = item.doing("list", source)?;
            let (from, kind) = (item.path(), item.file_type().doing("look at", source)?);
            let to = format!("{path}/{}", item.file_name().to_string_lossy());
            if kind.is_dir() {
                self.directory(&to).copy(&to, &from)?;
            } else if kind.is_symlink() {
                let target = std::fs::read_link(&from).doing("read", &from)?;
                self.symlink(&to, &target.to_string_lossy());
            } else {
                self.file(&to, 0o644, &from);
            }
        }
        Ok(self)
    }

    /// Writes the archive and returns its length in bytes.
    ///
    /// # Errors
    /// When a source cannot be read or the output not written.
    pub fn write(&self, path: &Path) -> Result<u64> {
        let file = File::create(path).doing("create", path)?;
        let mut writer = Writer { out: io::BufWriter::new(file), length: 0, path };
        for (inode, (name, node)) in (1..).zip(&self.nodes) {
            writer.node(inode, name, node)?;
        }
        writer.header(0, 0, 0, 0, (0, 0), TRAILER)?;
        writer.pad(ALIGNMENT)?;
        writer.out.flush().doing("write", path)?;
        Ok(writer.length)
    }

    fn insert(&mut self, path: &str, node: Node) -> &mut Self {
        let path = path.trim_matches('/');
        for (slash, _) in path.match_indices('/') {
            let parent = path.get(..slash).unwrap_or_default();
            self.nodes.entry(parent.to_owned()).or_insert(Node::Directory);
        }
        self.nodes.insert(path.to_owned(), node);
        self
    }
}

struct Writer<'a, W: Write> {
    out: W,
    length: u64,
    path: &'a Path,
}

impl<W: Write> Writer<'_, W> {
    fn node(&mut self, inode: u32, name: &str, node: &Node) -> Result<()> {
        match node {
            Node::Directory => self.header(inode, 0o040_755, 2, 0, (0, 0), name),
            Node::Symlink { target } => self.content(inode, 0o120_777, name, target.as_bytes()),
            Node::Bytes { mode, bytes } => self.content(inode, 0o100_000 | mode, name, bytes),
            Node::CharacterDevice { mode, major, minor } => {
                self.header(inode, 0o020_000 | mode, 1, 0, (*major, *minor), name)
            }
            // The largest file is a kernel, so it fits in memory; and what was read is what the header counts.
            Node::File { mode, source } => {
                let bytes = std::fs::read(source).doing("read", source)?;
                self.content(inode, 0o100_000 | mode, name, &bytes)
            }
        }
    }

    fn content(&mut self, inode: u32, mode: u32, name: &str, bytes: &[u8]) -> Result<()> {
        let size = u32::try_from(bytes.len()).map_err(|_| {
            Error::unexpected(
                format!("archive {name}"),
                "files of 4 GiB and more do not fit in a cpio archive",
            )
        })?;
        self.header(inode, mode, 1, size, (0, 0), name)?;
        self.put(bytes)?;
        self.pad(4)
    }

    fn header(
        &mut self,
        inode: u32,
        mode: u32,
        links: u32,
        size: u32,
        device: (u32, u32),
        name: &str,
    ) -> Result<()> {
        let (major, minor) = device;
        let name_size = name.len() + 1;
        // Magic, then: ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check.
        let fields = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{links:08x}{0:08x}{size:08x}{0:08x}{0:08x}{major:08x}{minor:08x}{name_size:08x}{0:08x}",
            0
        );
        self.put(fields.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad(4)
    }

    fn pad(&mut self, alignment: u64) -> Result<()> {
        while !self.length.is_multiple_of(alignment) {
            self.put(&[0])?;
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.length += bytes.len() as u64;
        self.out.write_all(bytes).doing("write", self.path)
    }
}

#[cfg(test)]
#[path = "cpio_test.rs"]
mod tests;
