//! Loads the installed kernel, with the node's own configuration appended to its initramfs.

use std::{fs::File, io, os::fd::AsFd as _, path::Path};

use commonage_init::{cpio, kexec, say};
use rustix::fs::MemfdFlags;

use crate::{
    ME,
    error::{Error, Result},
};

/// Loads `kernel` with `initramfs`, both in `directory`, whose hashes were checked when they were installed.
pub fn load(
    directory: &Path,
    kernel: &str,
    initramfs: &str,
    cmdline: &str,
    node_config: &[u8],
) -> Result<()> {
    let open = |name: &str| {
        let path = directory.join(name);
        File::open(&path).map_err(|e| Error::io(format!("open {}", path.display()), e))
    };
    let kernel = open(kernel)?;
    let mut installed = open(initramfs)?;
    let mut whole = || -> io::Result<File> {
        let mut whole = File::from(rustix::fs::memfd_create("initramfs", MemfdFlags::CLOEXEC)?);
        let length = io::copy(&mut installed, &mut whole)?;
        append(&mut whole, length, node_config)?;
        Ok(whole)
    };
    let whole = whole()
        .map_err(|e| Error::io(format!("put {initramfs} and the node's configuration into memory"), e))?;
    kexec::load(kernel.as_fd(), whole.as_fd(), cmdline)?;
    say!(ME, "kernel loaded: {cmdline}");
    Ok(())
}

/// Appends an archive with `/etc/commonage/node.json` to an initramfs of `length` bytes. Only root may read the file: it
/// holds the node's private key.
fn append(to: &mut impl io::Write, length: u64, node_config: &[u8]) -> io::Result<()> {
    to.write_all(&[0; 3][..cpio::padding(length)])?;
    let mut archive = cpio::Writer::new(Vec::new());
    archive.directory("etc", 0o755)?;
    archive.directory("etc/commonage", 0o755)?;
    archive.file("etc/commonage/node.json", 0o600, node_config)?;
    to.write_all(&archive.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appends_at_a_word() {
        for length in 0..9 {
            let mut initramfs = vec![7; length];
            append(&mut initramfs, length as u64, b"{}").unwrap();
            let at = length.next_multiple_of(4);
            assert_eq!(&initramfs[at..at + 6], b"070701");
            assert!(initramfs[length..at].iter().all(|b| *b == 0));
        }
    }
}
