//! Loads the installed kernel, with the node's own configuration appended to its initramfs.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::AsFd as _,
    path::Path,
};

use commonage_init::{cpio, kexec, say};
use commonage_plc_api::boot::ImageFile;
use rustix::fs::MemfdFlags;
use sha2::{Digest as _, Sha256};

use crate::{
    ME,
    error::{Error, Result},
};

/// Loads `kernel` with `initramfs`, both in `directory`. Each is copied into memory, and what is there is what is hashed and
/// what runs: a disk that gives back something else than it did a moment ago cannot slip it in.
pub fn load(
    directory: &Path,
    (kernel, kernel_file): (&str, &ImageFile),
    (initramfs, initramfs_file): (&str, &ImageFile),
    cmdline: &str,
    node_config: &[u8],
) -> Result<()> {
    let kernel = in_memory(directory, kernel, kernel_file)?;
    let mut whole = in_memory(directory, initramfs, initramfs_file)?;
    append(&mut whole, initramfs_file.size, node_config)
        .map_err(|e| Error::io("append the node's configuration to the initramfs", e))?;
    kexec::load(kernel.as_fd(), whole.as_fd(), cmdline)?;
    say!(ME, "kernel loaded: {cmdline}");
    Ok(())
}

/// A copy of a file whose bytes have the hash that was signed; its position is at its end.
fn in_memory(directory: &Path, name: &str, wanted: &ImageFile) -> Result<File> {
    let path = directory.join(name);
    let copy = || -> io::Result<(File, String)> {
        let mut from = File::open(&path)?.take(wanted.size.saturating_add(1));
        let mut copy = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?);
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let length = from.read(&mut buffer)?;
            match buffer.get(..length) {
                Some([]) | None => return Ok((copy, hex::encode(hash.finalize()))),
                Some(bytes) => {
                    hash.update(bytes);
                    copy.write_all(bytes)?;
                }
            }
        }
    };
    let (copy, hash) = copy().map_err(|e| Error::io(format!("read {} into memory", path.display()), e))?;
    if hash == wanted.sha256 { Ok(copy) } else { Err(Error::ReadBack { file: name.into() }) }
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
    fn takes_only_what_was_signed() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("kernel"), "genuine").unwrap();
        let wanted = ImageFile { sha256: hex::encode(Sha256::digest("genuine")), size: 7 };
        let mut copy = in_memory(directory.path(), "kernel", &wanted).unwrap();
        io::Seek::rewind(&mut copy).unwrap();
        assert_eq!(io::read_to_string(copy).unwrap(), "genuine");
        for other in ["genuina", "genuine and more", ""] {
            std::fs::write(directory.path().join("kernel"), other).unwrap();
            let refused = in_memory(directory.path(), "kernel", &wanted);
            assert!(matches!(refused, Err(Error::ReadBack { .. })), "{other}");
        }
    }

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
