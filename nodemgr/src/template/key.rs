//! What a template is of: a shape, and the files its guest was made from as they are now.

use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use commonage_isolation_api::Rspec;
use sha2::{Digest as _, Sha256};

use crate::error::Error;
use crate::manager::Settings;
use crate::sliver::files;

/// What clones share with their template beyond files.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shape {
    /// Name of the base.
    pub base: String,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub vcpus: u8,
}

impl Shape {
    /// Of a sliver.
    pub fn of(base: &str, rspec: &Rspec) -> Self {
        Self { base: base.to_owned(), memory_mib: rspec.memory_mib, vcpus: rspec.vcpus }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "base {}, {} MiB, {} vCPU", self.base, self.memory_mib, self.vcpus)
    }
}

/// Hexadecimal digits of a key.
const DIGITS: usize = 24;

/// Names a template: 24 hexadecimal digits of a hash of the shape, and of kernel, initrd, base and machine program.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key(String);

impl Key {
    /// The key of a shape, from the files as they are now.
    ///
    /// # Errors
    /// One of them is not there.
    pub fn of(settings: &Settings, shape: &Shape) -> Result<Self, Error> {
        let Shape { base, memory_mib, vcpus } = shape;
        let mut hash = Sha256::new();
        hash.update(format!("{base} {memory_mib} {vcpus} {}\n", env!("CARGO_PKG_VERSION")));
        let base = files::base(settings, base);
        for path in [&files::kernel(settings), &files::initrd(settings), &base, &settings.vmm] {
            hash.update(identity(path)?);
        }
        let digits: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self(digits.chars().take(DIGITS).collect()))
    }

    /// A key from a directory's name.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        (digits && text.len() == DIGITS).then(|| Self(text.to_owned()))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What changes when a file is replaced or written. Reading it all (a base has hundreds of megabytes) would take longer than booting.
pub fn identity(path: &Path) -> Result<String, Error> {
    let meta = std::fs::metadata(path).map_err(Error::io("look at", path))?;
    let (dev, ino, size) = (meta.dev(), meta.ino(), meta.size());
    Ok(format!("{} {dev} {ino} {size} {}.{:09}\n", path.display(), meta.mtime(), meta.mtime_nsec()))
}
