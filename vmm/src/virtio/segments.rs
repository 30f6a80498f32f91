//! The guest memory of one descriptor chain, as two lists of segments: what the device may read, then what it may write.
//!
//! The descriptors of a chain say nothing about the framing of a request (virtio 1.2, section 2.7.4): a header may lie in one descriptor
//! or in sixteen. So requests are parsed from [`Segments`] by byte count, never by descriptor.
#![forbid(unsafe_code)]

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::{Chain, Memory};

/// Most descriptors followed in one chain, direct or indirect. No queue is longer.
pub const MAX_SEGMENTS: usize = 256;

/// A list of guest memory ranges. They are *not* checked to be in guest memory: every access is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Segments {
    ranges: Vec<(GuestAddress, u32)>,
}

/// Why a chain is no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A readable descriptor after a writable one (2.7.4.2).
    #[error("readable descriptor after a writable one")]
    Order,
    /// More than [`MAX_SEGMENTS`] descriptors.
    #[error("more than {MAX_SEGMENTS} descriptors")]
    TooLong,
}

/// Splits a chain into its readable and its writable part.
pub fn split(chain: Chain<'_>) -> Result<(Segments, Segments), ChainError> {
    split_descriptors(chain)
}

fn split_descriptors(
    descriptors: impl Iterator<Item = Descriptor>,
) -> Result<(Segments, Segments), ChainError> {
    let (mut readable, mut writable) = (Segments::default(), Segments::default());
    for (count, descriptor) in descriptors.enumerate() {
        if count >= MAX_SEGMENTS {
            return Err(ChainError::TooLong);
        }
        let range = (descriptor.addr(), descriptor.len());
        if descriptor.is_write_only() {
            writable.ranges.push(range);
        } else if writable.ranges.is_empty() {
            readable.ranges.push(range);
        } else {
            return Err(ChainError::Order);
        }
    }
    Ok((readable, writable))
}

impl Segments {
    /// These ranges.
    #[cfg(test)]
    pub fn of(ranges: Vec<(GuestAddress, u32)>) -> Self {
        Self { ranges }
    }

    /// Bytes in all.
    #[expect(clippy::len_without_is_empty, reason = "no request asks")]
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|(_, len)| u64::from(*len)).sum()
    }

    /// The ranges in order, each with its length in bytes.
    pub fn ranges(&self) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        self.ranges.iter().map(|(start, len)| (*start, *len as usize))
    }

    /// Cuts after `count` bytes: what is before, and what is after. `None` if there are fewer.
    pub fn split_at(self, count: u64) -> Option<(Self, Self)> {
        let (mut before, mut after) = (Self::default(), Self::default());
        let mut missing = count;
        for (start, len) in self.ranges {
            let taken = missing.min(u64::from(len)) as u32;
            missing -= u64::from(taken);
            if taken > 0 {
                before.ranges.push((start, taken));
            }
            if taken < len {
                // An address that wraps is not in guest memory, and neither is the greatest address.
                let rest = start.0.saturating_add(u64::from(taken));
                after.ranges.push((GuestAddress(rest), len - taken));
            }
        }
        (missing == 0).then_some((before, after))
    }

    /// Copies from the guest until `buffer` or the segments end. Returns the bytes copied; `None` if a segment is not in guest memory.
    pub fn read(&self, memory: &Memory, buffer: &mut [u8]) -> Option<usize> {
        let mut at = 0;
        for (start, len) in self.ranges() {
            let rest = buffer.get_mut(at..)?;
            let take = len.min(rest.len());
            memory.read_slice(rest.get_mut(..take)?, start).ok()?;
            at += take;
        }
        Some(at)
    }

    /// Copies to the guest until `bytes` or the segments end. Returns the bytes copied; `None` if a segment is not in guest memory.
    pub fn write(&self, memory: &Memory, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        for (start, len) in self.ranges() {
            let rest = bytes.get(at..)?;
            let take = len.min(rest.len());
            memory.write_slice(rest.get(..take)?, start).ok()?;
            at += take;
        }
        Some(at)
    }

    /// Exactly `N` bytes from the front, or `None`.
    pub fn read_array<const N: usize>(&self, memory: &Memory) -> Option<[u8; N]> {
        let mut array = [0; N];
        (self.read(memory, &mut array)? == N).then_some(array)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segments(lens: &[u32]) -> Segments {
        let mut start = 0;
        let ranges = lens
            .iter()
            .map(|len| {
                let range = (GuestAddress(start), *len);
                start += u64::from(*len) + 3;
                range
            })
            .collect();
        Segments { ranges }
    }

    #[test]
    fn readable_after_writable_is_refused() {
        let write = Descriptor::new(0, 1, 2, 0);
        let read = Descriptor::new(0, 1, 0, 0);
        assert_eq!(split_descriptors([read, write].into_iter()).unwrap().1.len(), 1);
        assert_eq!(split_descriptors([write, read].into_iter()), Err(ChainError::Order));
        assert_eq!(split_descriptors(std::iter::repeat_n(read, 257)), Err(ChainError::TooLong));
    }

    #[test]
    fn segments_outside_memory_are_refused() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        for start in [0xfff, 0x1000, u64::MAX, u64::MAX - 1] {
            let segments = Segments { ranges: vec![(GuestAddress(start), 2)] };
            assert_eq!(segments.read(&memory, &mut [0; 2]), None);
            assert_eq!(segments.write(&memory, &[0; 2]), None);
            assert!(segments.split_at(1).is_some());
        }
    }

    proptest! {
        #[test]
        fn splitting_keeps_every_byte_in_order(
            lens in prop::collection::vec(0u32..20, 0..10),
            at in 0u64..250,
        ) {
            let whole = segments(&lens);
            let total = whole.len();
            let memory = Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
            let bytes: Vec<u8> = (0..total as u8).collect();
            prop_assert_eq!(whole.write(&memory, &bytes), Some(bytes.len()));
            match whole.split_at(at) {
                None => prop_assert!(at > total),
                Some((before, after)) => {
                    prop_assert_eq!(before.len(), at);
                    let mut back = vec![0; total as usize];
                    let cut = at as usize;
                    prop_assert_eq!(before.read(&memory, &mut back[..cut]), Some(cut));
                    prop_assert_eq!(after.read(&memory, &mut back[cut..]), Some(total as usize - cut));
                    prop_assert_eq!(back, bytes);
                }
            }
        }
    }
}
