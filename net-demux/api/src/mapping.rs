//! Memory shared with another process, seen only as 64-bit atomics. The only `unsafe` of this crate.
//!
//! Invariant: a [`Mapping`] covers exactly the words it lends, for as long as it lives. The descriptor must be sealed against shrinking
//! (or be made by us), else the other process could take pages away: touching them would raise SIGBUS.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

/// A shared, writable mapping of a descriptor's first bytes.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<AtomicU64>,
    /// Length, 8-byte words.
    count: usize,
}

impl Mapping {
    /// Maps the first `length` bytes of `fd`. Pages come when they are first used, so a sliver that says little takes little; to have them all
    /// at once would promise nothing, as the peer may punch holes into the memory.
    pub(crate) fn new(fd: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        let count = length / size_of::<AtomicU64>();
        // SAFETY: the kernel chooses the place (null hint, no MAP_FIXED), so no existing memory of ours is replaced.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                count * size_of::<AtomicU64>(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )?
        };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap gave address 0"))?;
        Ok(Self { start, count })
    }

    /// The memory.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: `start` is page-aligned and maps `count` words until drop, which no borrow of self outlives. Every bit
        // pattern is a u64, and every access, ours or (as far as we are concerned) the other process's, is an atomic one.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the one mmap gave, and no borrow of it outlives self.
        let _ =
            unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.count * size_of::<AtomicU64>()) };
    }
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only lent as atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above: shared access is atomic access.
unsafe impl Sync for Mapping {}
