//! Which pages of guest memory this process has to itself: the kernel tells in `/proc/self/pagemap`, eight bytes a page.
//!
//! A page that was never written is nobody's (a machine that booted) or the template's (a clone): it takes no memory, and must not be
//! touched just to be looked at.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::jail::open_without_capabilities;
use crate::virtio::Memory;

/// Size of a page, bytes.
pub const PAGE: usize = 4096;
/// Pages asked for at a time.
pub const BATCH: usize = 512;
const ENTRY: usize = 8;
/// Of an entry: the page is in memory, or in swap.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
/// Of an entry: it is a file's, and shared.
const FILE: u64 = 1 << 61;

/// The kernel's answer, open for reading. Opened before the jail; it stays readable there.
pub struct Pagemap(File);

impl Pagemap {
    /// Of this process. It does not tell where pages are in the host's memory.
    pub fn open() -> io::Result<Self> {
        open_without_capabilities("/proc/self/pagemap").map(Self)
    }

    /// For each of up to [`BATCH`] pages from `address` on, whether this process alone has it.
    pub fn private(&self, address: usize, pages: usize) -> io::Result<[bool; BATCH]> {
        let mut entries = [0; BATCH * ENTRY];
        let wanted = pages.min(BATCH) * ENTRY;
        let entries = entries.get_mut(..wanted).unwrap_or_default();
        self.0.read_exact_at(entries, (address / PAGE * ENTRY) as u64)?;
        let mut private = [false; BATCH];
        for (page, entry) in private.iter_mut().zip(entries.as_chunks().0) {
            let entry = u64::from_le_bytes(*entry);
            *page = entry & PRESENT_OR_SWAPPED != 0 && entry & FILE == 0;
        }
        Ok(private)
    }

    /// The private pages of guest memory, as ranges of page numbers in its file: RAM without the gap.
    pub fn private_ranges(&self, memory: &Memory) -> io::Result<Vec<Range<u32>>> {
        let mut ranges: Vec<Range<u32>> = Vec::new();
        let mut first = 0;
        for region in memory.iter() {
            let address = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)? as usize;
            let pages = region.len() as usize / PAGE;
            for start in (0..pages).step_by(BATCH) {
                let private = self.private(address + start * PAGE, pages - start)?;
                for page in (0..BATCH).filter(|at| private.get(*at) == Some(&true)) {
                    let page = (first + start + page) as u32;
                    match ranges.last_mut() {
                        Some(last) if last.end == page => last.end += 1,
                        _ => ranges.push(page..page + 1),
                    }
                }
            }
            first += pages;
        }
        Ok(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn written_pages_are_private_and_others_are_not() {
        let size = 600 * PAGE;
        let memory = Memory::from_ranges(&[(GuestAddress(0), size), (GuestAddress(1 << 32), size)]).unwrap();
        for page in [3u64, 4, 511, 512] {
            memory.write_obj(1u8, GuestAddress(page * PAGE as u64)).unwrap();
        }
        memory.write_obj(1u8, GuestAddress(1 << 32)).unwrap();
        let ranges = Pagemap::open().unwrap().private_ranges(&memory).unwrap();
        assert_eq!(ranges, [3..5, 511..513, 600..601]);
    }
}
