//! SHA-256 of files and strings, as lower-case hexadecimal.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::error::{IoContext as _, Result};

/// Of a file's bytes.
///
/// # Errors
/// When the file cannot be read.
pub fn file(path: &Path) -> Result<String> {
    let mut file = File::open(path).doing("open", path)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 18]);
    loop {
        match file.read(&mut buffer).doing("read", path)? {
            0 => return Ok(hex::encode(hash.finalize())),
            n => hash.update(buffer.get(..n).unwrap_or_default()),
        }
    }
}

/// Of bytes.
pub fn bytes(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}
