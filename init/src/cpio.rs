//! Writes cpio archives of the "newc" form, which the kernel unpacks as an initramfs.
//!
//! An archive is a whole number of 4-byte words, and must start at a multiple of 4 when it is appended to another
//! ([`padding`]); the kernel skips the zero bytes between.

use std::io::{self, Write};

/// The mode of a directory, without permission bits.
pub const DIRECTORY: u32 = 0o040_000;
/// The mode of a regular file, without permission bits.
pub const FILE: u32 = 0o100_000;

/// How many zero bytes make `length` a multiple of four.
pub fn padding(length: u64) -> usize {
    (length.wrapping_neg() % 4) as usize
}

/// Writes one archive. Parents come before children; [`Writer::finish`] writes the trailer.
pub struct Writer<W> {
    to: W,
    inode: u32,
}

impl<W: Write> Writer<W> {
    /// Starts an archive.
    pub fn new(to: W) -> Self {
        Self { to, inode: 0 }
    }

    /// A directory. `path` is relative, without a slash at either end.
    ///
    /// # Errors
    /// Those of writing.
    pub fn directory(&mut self, path: &str, permissions: u32) -> io::Result<()> {
        self.entry(path, DIRECTORY | permissions, &[])
    }

    /// A file.
    ///
    /// # Errors
    /// Those of writing; a file of 4 GiB or more does not fit the format.
    pub fn file(&mut self, path: &str, permissions: u32, contents: &[u8]) -> io::Result<()> {
        self.entry(path, FILE | permissions, contents)
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// Those of writing.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.to)
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        let size = u32::try_from(contents.len()).map_err(|_| io::Error::other("file too large for cpio"))?;
        let name_size = path.len() + 1;
        self.inode += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size as u32, 0];
        let mut header = b"070701".to_vec();
        for field in fields {
            write!(header, "{field:08X}")?;
        }
        header.extend(path.as_bytes());
        header.push(0);
        header.resize(header.len() + padding(header.len() as u64), 0);
        self.to.write_all(&header)?;
        self.to.write_all(contents)?;
        self.to.write_all(&[0; 3][..padding(contents.len() as u64)])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What `cpio -t` does: reads an archive back, checking every alignment.
    fn read(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(archive.len() % 4, 0);
            assert_eq!(&archive[..6], b"070701");
            let field = |i: usize| {
                let digits = std::str::from_utf8(&archive[6 + 8 * i..14 + 8 * i]).unwrap();
                u32::from_str_radix(digits, 16).unwrap() as usize
            };
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = std::str::from_utf8(&archive[110..110 + name_size - 1]).unwrap().to_owned();
            assert_eq!(archive[110 + name_size - 1], 0);
            let data = (110 + name_size).next_multiple_of(4);
            let contents = archive[data..data + size].to_vec();
            archive = &archive[(data + size).next_multiple_of(4)..];
            if name == "TRAILER!!!" {
                assert!(archive.is_empty());
                return entries;
            }
            entries.push((name, mode as u32, contents));
        }
    }

    proptest! {
        #[test]
        fn reads_back(files in proptest::collection::vec(("[a-z/.]{1,40}", proptest::collection::vec(any::<u8>(), 0..99)), 0..9)) {
            let mut writer = Writer::new(Vec::new());
            writer.directory("etc", 0o755).unwrap();
            for (name, contents) in &files {
                writer.file(name, 0o600, contents).unwrap();
            }
            let entries = read(&writer.finish().unwrap());
            prop_assert_eq!(&entries[0], &("etc".to_owned(), 0o040_755, vec![]));
            for ((name, contents), entry) in files.iter().zip(&entries[1..]) {
                prop_assert_eq!(&(name.clone(), 0o100_600, contents.clone()), entry);
            }
        }

        #[test]
        fn pads_to_words(length in any::<u32>()) {
            prop_assert_eq!((u64::from(length) + padding(length.into()) as u64) % 4, 0);
            prop_assert!(padding(length.into()) < 4);
        }
    }
}
