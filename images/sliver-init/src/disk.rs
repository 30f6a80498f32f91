//! The sliver's own disk. A clone is given its disk after its kernel has looked at its template's, so the size that the kernel believes
//! is waited for before anything is read: a file system is never mounted on a disk whose end is in doubt.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use commonage_init::error::{Context as _, Error, Result};
use commonage_init::poll;
use commonage_init::uevent::Uevents;

use crate::root::appear;

/// The device. Never open before the identity: what the kernel reads of it then, it would keep for a clone.
pub const DEVICE: &str = "/dev/vda";
/// Its size as the kernel believes it, in sectors.
const SIZE: &str = "/sys/class/block/vda/size";
/// What that file counts in, whatever the device's own blocks are.
const SECTOR: u64 = 512;
/// How long the kernel may take to notice that its device has changed.
const PATIENCE: Duration = Duration::from_secs(10);

/// The disk, not mounted yet.
pub struct Disk {
    size: File,
    changes: Uevents,
}

impl Disk {
    /// Looks for the disk and for announcements of its changes.
    ///
    /// # Errors
    /// There is none.
    pub fn find() -> Result<Self> {
        appear(DEVICE)?;
        let changes = Uevents::open()?;
        let size = File::open(SIZE).what(|| format!("open {SIZE}"))?;
        Ok(Self { size, changes })
    }

    /// Waits until the kernel believes that the disk has this many bytes.
    ///
    /// # Errors
    /// It does not come to believe it.
    pub fn wait_for(&self, bytes: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Before looking, so that no change is missed between; what was announced earlier is of no use.
            self.changes.read();
            let seen = self.bytes()?;
            if seen == bytes {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let why = "the machine was given another disk than the node manager means";
                return Err(Error::TimedOut(format!("{DEVICE} has {seen} bytes, not {bytes}: {why}")));
            }
            poll::wait(&[self.changes.as_fd()], Some(deadline))?;
        }
    }

    fn bytes(&self) -> Result<u64> {
        let mut text = [0; 24];
        let len = self.size.read_at(&mut text, 0).what(|| format!("read {SIZE}"))?;
        let malformed = || Error::Malformed { what: SIZE.into(), why: "it is no number of sectors".into() };
        text.get(..len).and_then(bytes).ok_or_else(malformed)
    }
}

/// Bytes of a number of sectors in decimal.
fn bytes(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.trim_end().parse::<u64>().ok()?.checked_mul(SECTOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_are_bytes() {
        assert_eq!(bytes(b"2097152\n"), Some(1 << 30));
        assert_eq!(bytes(b"0\n"), Some(0));
        for bad in [&b""[..], b"\n", b"-1\n", b"1 2\n", b"18446744073709551615\n", b"\xff"] {
            assert_eq!(bytes(bad), None, "{bad:?}");
        }
    }
}
