//! Mappings that need care.
//!
//! [`ReadOnlyMapping`] is a file mapped read-only and shared, padded with zeroes to a whole number of [`layout::PMEM_ALIGN`]: what the guest
//! sees as persistent memory. Machines that map the same file share the host's page cache. Invariant: address and length are aligned to
//! 4 KiB and 2 MiB; the whole length is mapped for as long as the value lives.
//!
//! [`populate`] gives a machine its own copy of pages that it is going to write.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::layout;
use crate::snapshot::pages::PAGE;
use crate::virtio::Memory;

/// The mapping.
pub struct ReadOnlyMapping {
    address: *mut c_void,
    len: usize,
}

// SAFETY: the mapping is never accessed through this value; it is only reserved, and unmapped once, on drop, from whichever thread.
unsafe impl Send for ReadOnlyMapping {}
// SAFETY: as above; shared references only tell address and length.
unsafe impl Sync for ReadOnlyMapping {}

impl ReadOnlyMapping {
    /// Maps all of `file`. An empty file is refused.
    pub fn new(file: &File) -> io::Result<Self> {
        let size = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        if size == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is empty"));
        }
        let align = layout::PMEM_ALIGN as usize;
        let len = size
            .checked_next_multiple_of(align)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the file is too large"))?;
        // Anonymous memory first, so that what lies behind the file's end reads as zero instead of raising SIGBUS.
        // SAFETY: no address is asked for, so no existing mapping is touched.
        let address = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        let mapping = Self { address, len };
        // SAFETY: replaces part of the mapping just made, which nothing refers to yet; `size` ≤ `len`.
        unsafe {
            rustix::mm::mmap(
                address,
                size,
                ProtFlags::READ,
                MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                file,
                0,
            )?;
        }
        Ok(mapping)
    }

    /// Where it is in this process.
    pub fn address(&self) -> *const c_void {
        self.address
    }

    /// Its length, bytes.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for ReadOnlyMapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range mapped in `new`; the owner no longer shows it to a guest.
        let _ = unsafe { rustix::mm::munmap(self.address, self.len) };
    }
}

/// Gives this process its own copy of `pages` (page numbers as in [`crate::snapshot::memory`]), as if each had been written. Tells how many
/// it did; the kernel may refuse (before Linux 5.14, or for want of memory), and then the pages are copied when they are written.
pub fn populate(memory: &Memory, pages: &[Range<u32>]) -> usize {
    let mut populated = 0;
    let mut first = 0;
    for region in memory.iter() {
        let Ok(address) = region.get_host_address(MemoryRegionAddress(0)) else { return populated };
        let end = first + region.len() as usize / PAGE;
        for range in pages {
            let (from, to) = ((range.start as usize).max(first), (range.end as usize).min(end));
            if from >= to {
                continue;
            }
            // SAFETY: `from..to` lies within the region, which is mapped at `address` for as long as `memory` lives. Populating changes
            // no contents.
            let result = unsafe {
                let start = address.add((from - first) * PAGE).cast::<c_void>();
                rustix::mm::madvise(start, (to - from) * PAGE, Advice::LinuxPopulateWrite)
            };
            match result {
                Ok(()) => populated += to - from,
                Err(_) => return populated,
            }
        }
        first = end;
    }
    populated
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn length_is_rounded_up_and_the_tail_reads_as_zero() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let mapping = ReadOnlyMapping::new(&file).unwrap();
        assert_eq!(mapping.len(), 2 << 20);
        let byte = |at: usize| {
            // SAFETY: `at` is less than the mapping's length and the file is not truncated.
            unsafe { mapping.address().cast::<u8>().add(at).read_volatile() }
        };
        assert_eq!((byte(0), byte(4999), byte(5000), byte(8192), byte((2 << 20) - 1)), (7, 7, 0, 0, 0));
    }

    #[test]
    fn an_empty_file_is_refused() {
        assert!(ReadOnlyMapping::new(&tempfile::tempfile().unwrap()).is_err());
    }
}
