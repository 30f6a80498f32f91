//! Guest memory as a file: RAM without the gap, page after page, then one page that names the state file it belongs to. Pages of zeroes are
//! holes, so the file takes what the guest uses.
//!
//! Any number of machines map one file privately; it must not change while they live.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::SeekFrom;
use vm_memory::{
    Bytes, FileOffset, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
    MmapRegion,
};

use super::Id;
use super::codec::CHECKSUM;
use super::pages::{BATCH, PAGE, Pagemap};
use crate::layout;
use crate::virtio::Memory;

const MAGIC: [u8; 8] = *b"CMNGRAM\n";
const ZEROES: [u8; PAGE] = [0; PAGE];
/// Pages written with one call, at most.
const RUN: usize = 64;

/// Why a file is not the memory that a state file belongs to.
#[derive(Debug, thiserror::Error)]
pub enum MemoryRefusal {
    /// Its length is wrong.
    #[error(
        "it has {found} bytes instead of {expected}: it was truncated, or belongs to a machine with other memory"
    )]
    Length {
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },
    /// It belongs to another state file, or is no memory at all.
    #[error("it does not belong to this state: both must be of one snapshot")]
    OtherSnapshot,
    /// Its contents changed.
    #[error("its checksum is wrong: it is damaged")]
    Damaged,
    /// It cannot be read or mapped.
    #[error("{0}")]
    Io(#[from] io::Error),
}

fn ram(memory_mib: u32) -> u64 {
    u64::from(memory_mib) * layout::MIB
}

/// Parts of a file that are not holes, in order.
struct Extents<'f> {
    file: &'f File,
    /// The last that was found.
    found: Range<u64>,
}

impl<'f> Extents<'f> {
    fn new(file: &'f File) -> Self {
        Self { file, found: 0..0 }
    }

    /// Whether there is data at `at`, which never decreases. Where the system cannot tell it says so.
    fn contains(&mut self, at: u64) -> bool {
        if at >= self.found.end {
            self.found = self.next(at).unwrap_or(u64::MAX..u64::MAX);
        }
        self.found.start <= at
    }

    fn next(&self, at: u64) -> Option<Range<u64>> {
        match rustix::fs::seek(self.file, SeekFrom::Data(at)) {
            Ok(start) => Some(start..rustix::fs::seek(self.file, SeekFrom::Hole(start)).unwrap_or(u64::MAX)),
            Err(rustix::io::Errno::NXIO) => None, // only a hole until the end
            Err(_) => Some(at..u64::MAX),
        }
    }
}

/// Collects pages in order, leaves out those of zeroes, and writes the others in runs.
struct Sparse<'f> {
    file: &'f File,
    run: Vec<u8>,
    /// Where the run begins, bytes.
    start: u64,
    digest: crc::Digest<'static, u64, crc::Table<16>>,
}

impl Sparse<'_> {
    fn page(&mut self, at: u64, page: &[u8; PAGE]) -> io::Result<()> {
        if *page == ZEROES {
            return Ok(());
        }
        self.digest.update(&at.to_le_bytes());
        self.digest.update(page);
        let adjacent = at == self.start + self.run.len() as u64;
        if !adjacent || self.run.len() >= RUN * PAGE {
            self.flush()?;
            self.start = at;
        }
        self.run.extend_from_slice(page);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.run, self.start)?;
        self.run.clear();
        Ok(())
    }
}

/// Writes `memory` to `file`, whatever was in it before, as belonging to the snapshot `id`; returns the checksum. Without `pagemap` every page is
/// looked at, which makes a clone's pages its own.
pub fn save(memory: &Memory, pagemap: Option<&Pagemap>, file: &File, id: Id) -> io::Result<u64> {
    let total: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    file.set_len(0)?;
    file.set_len(total + PAGE as u64)?;
    let mut out = Sparse { file, run: Vec::with_capacity(RUN * PAGE), start: 0, digest: CHECKSUM.digest() };
    let mut page = [0; PAGE];
    let mut base = 0;
    for region in memory.iter() {
        let address = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)? as usize;
        let pages = region.len() as usize / PAGE;
        let mut template = region.file_offset().map(|at| (Extents::new(at.file()), at.start()));
        for start in (0..pages).step_by(BATCH) {
            let count = (pages - start).min(BATCH);
            let private = match pagemap {
                Some(pagemap) => pagemap.private(address + start * PAGE, count)?,
                None => [true; BATCH],
            };
            for (at, private) in (start..start + count).zip(private) {
                let offset = (at * PAGE) as u64;
                if private {
                    region.read_slice(&mut page, MemoryRegionAddress(offset)).map_err(io::Error::other)?;
                } else {
                    let Some((extents, from)) = &mut template else { continue };
                    if !extents.contains(*from + offset) {
                        continue;
                    }
                    extents.file.read_exact_at(&mut page, *from + offset)?;
                }
                out.page(base + offset, &page)?;
            }
        }
        base += region.len();
    }
    out.flush()?;
    file.write_all_at(&[&MAGIC[..], &id].concat(), total)?;
    Ok(out.digest.finalize())
}

/// Checks that `file` is the memory of the snapshot `id`; also that it is undamaged, by `checksum`, unless it lies in a file system in
/// memory: what could damage it there could damage any memory, and a clone would pay for reading all of it.
pub fn check(file: &File, memory_mib: u32, id: Id, checksum: u64) -> Result<(), MemoryRefusal> {
    let (found, expected) = (file.metadata()?.len(), ram(memory_mib) + PAGE as u64);
    if found != expected {
        return Err(MemoryRefusal::Length { found, expected });
    }
    let mut trailer = [0; MAGIC.len() + size_of::<Id>()];
    file.read_exact_at(&mut trailer, ram(memory_mib))?;
    if trailer[..] != [&MAGIC[..], &id].concat() {
        return Err(MemoryRefusal::OtherSnapshot);
    }
    if !is_in_memory(file) && self::checksum(file, memory_mib)? != checksum {
        return Err(MemoryRefusal::Damaged);
    }
    Ok(())
}

fn is_in_memory(file: &File) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    rustix::fs::fstatfs(file).is_ok_and(|system| [TMPFS, RAMFS].contains(&system.f_type))
}

fn checksum(file: &File, memory_mib: u32) -> io::Result<u64> {
    let mut digest = CHECKSUM.digest();
    let mut extents = Extents::new(file);
    let mut page = [0; PAGE];
    for at in (0..ram(memory_mib)).step_by(PAGE) {
        if extents.contains(at) {
            file.read_exact_at(&mut page, at)?;
            if page != ZEROES {
                digest.update(&at.to_le_bytes());
                digest.update(&page);
            }
        }
    }
    Ok(digest.finalize())
}

/// Maps a file that was [`check`]ed as guest memory. What the guest writes is this machine's alone.
pub fn map(file: File, memory_mib: u32) -> io::Result<Memory> {
    let file = Arc::new(file);
    let mut offset = 0;
    let regions: io::Result<Vec<_>> = layout::ram_ranges(memory_mib)
        .into_iter()
        .map(|(start, size)| {
            let mapping = MmapRegion::build(
                Some(FileOffset::from_arc(Arc::clone(&file), offset)),
                usize::try_from(size).map_err(io::Error::other)?,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_NORESERVE,
            )
            .map_err(io::Error::other)?;
            offset += size;
            GuestRegionMmap::new(mapping, start).ok_or_else(|| io::Error::other("no such address"))
        })
        .collect();
    Memory::from_regions(regions?).map_err(io::Error::other)
}

#[cfg(test)]
#[path = "memory_test.rs"]
mod tests;
