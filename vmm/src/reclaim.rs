//! Gives pages of guest memory back to the host.
//!
//! What the guest finds when it touches such a page again is zeroes, or, in a machine that was restored, what the snapshot's memory file holds
//! there: its own content of that time, which is nobody else's. Linux takes pages out of its balloon, and uses pages that it reported as free, as if
//! they held anything.

use rustix::mm::Advice;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::virtio::Memory;

const PAGE: u64 = 4096;

/// Gives back the whole pages within `len` bytes from `start`. Returns how many bytes that was; none if the range is not all guest memory.
pub fn give_back(memory: &Memory, start: GuestAddress, len: u64) -> u64 {
    let end = start.checked_add(len).map(|end| end.0 & !(PAGE - 1));
    let start = start.checked_align_up(PAGE).filter(|start| end.is_some_and(|end| start.0 < end));
    let (Some(start), Some(end)) = (start, end) else { return 0 };
    let Ok(len) = usize::try_from(end - start.0) else { return 0 };
    if !memory.check_range(start, len) {
        return 0;
    }
    let slices = memory.get_slices(start, len).flatten();
    slices.filter(discard).map(|slice| slice.len() as u64).sum()
}

fn discard(slice: &VolatileSlice<'_>) -> bool {
    let address = slice.ptr_guard_mut();
    // SAFETY: the range is mapped for as long as `slice` borrows it. This process reads and writes it by volatile accesses and system calls
    // only, as memory that the guest changes at any time: here it changes once more. An address that is not aligned is refused.
    unsafe { rustix::mm::madvise(address.as_ptr().cast(), slice.len(), Advice::LinuxDontNeed) }.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    const PAGES: u64 = 16;

    /// Two regions that touch, and a gap behind them.
    fn memory() -> Memory {
        let half = (PAGES / 2 * PAGE) as usize;
        let memory =
            Memory::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)]).unwrap();
        memory.write_slice(&vec![7; (PAGES * PAGE) as usize], GuestAddress(0)).unwrap();
        memory
    }

    #[test]
    fn whole_pages_become_zero_across_regions() {
        let memory = memory();
        assert_eq!(give_back(&memory, GuestAddress(6 * PAGE + 1), 4 * PAGE), 3 * PAGE);
        let page = |index: u64| {
            let mut bytes = [0; PAGE as usize];
            memory.read_slice(&mut bytes, GuestAddress(index * PAGE)).unwrap();
            (bytes[0], bytes[4095])
        };
        assert_eq!((page(6), page(7), page(9), page(10)), ((7, 7), (0, 0), (0, 0), (7, 7)));
    }

    #[test]
    fn what_is_not_all_memory_is_left_alone() {
        let memory = memory();
        for (start, len) in
            [(15 * PAGE, 2 * PAGE), (u64::MAX, 1), (u64::MAX - PAGE, PAGE), (0, u64::MAX), (1 << 60, PAGE)]
        {
            assert_eq!(give_back(&memory, GuestAddress(start), len), 0);
        }
        assert_eq!(memory.read_obj::<u8>(GuestAddress(15 * PAGE)).unwrap(), 7);
    }

    proptest! {
        #[test]
        fn only_pages_within_the_range_change(start in 0..PAGES * PAGE, len in 0..PAGES * PAGE) {
            let memory = memory();
            let given = give_back(&memory, GuestAddress(start), len);
            let mut bytes = vec![0; (PAGES * PAGE) as usize];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            let changed: Vec<u64> = (0..).zip(&bytes).filter(|(_, byte)| **byte == 0).map(|(at, _)| at).collect();
            prop_assert_eq!(changed.len() as u64, given);
            prop_assert!(changed.iter().all(|at| *at >= start && *at < start + len));
            prop_assert!(start + len > PAGES * PAGE || given + 2 * PAGE > len);
        }
    }
}
