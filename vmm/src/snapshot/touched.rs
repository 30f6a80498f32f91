//! The pages that a machine wrote soon after its start, for the next machine of the same snapshot to copy all at once. A hint: a list
//! that is damaged or of another snapshot is worth nothing and does no harm.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::codec::{self, Reader, Refusal, Writer};
use super::{ID_LEN, Id};

/// Told apart from a machine's state, which has the same envelope.
const KIND: [u8; 8] = *b"touched\n";
/// Most ranges in a list.
const MOST: usize = 1 << 20;

/// The list as a file's contents.
pub fn encode(id: Id, ranges: &[Range<u32>]) -> Vec<u8> {
    let mut body = Writer::default();
    body.raw(&KIND);
    body.raw(&id);
    body.u32(ranges.len() as u32);
    for range in ranges {
        body.u32(range.start);
        body.u32(range.end);
    }
    codec::seal(&body.into_bytes())
}

/// Reads a list for the snapshot `id` of a machine with `pages` pages: ranges that are not empty, in order, apart and within memory.
pub fn decode(file: &[u8], id: Id, pages: u32) -> Result<Vec<Range<u32>>, Refusal> {
    let mut body = Reader::new(codec::open(file)?);
    if body.array()? != KIND || body.array::<ID_LEN>()? != id {
        return Err(Refusal::Nonsense("names"));
    }
    let count = body.count(MOST)?;
    let mut ranges = Vec::new();
    let mut end = 0;
    for _ in 0..count {
        let range = body.u32()?..body.u32()?;
        if range.start < end || range.is_empty() || range.end > pages {
            return Err(Refusal::Nonsense("ranges"));
        }
        end = range.end;
        ranges.push(range);
    }
    body.end()?;
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_come_back_and_those_outside_memory_do_not() {
        let id = [7; ID_LEN];
        let ranges = [1..3, 5..6];
        let file = encode(id, &ranges);
        assert_eq!(decode(&file, id, 6).unwrap(), ranges);
        assert_eq!(decode(&file, id, 5), Err(Refusal::Nonsense("ranges")));
        assert_eq!(decode(&file, [8; ID_LEN], 6), Err(Refusal::Nonsense("names")));
        #[expect(
            clippy::reversed_empty_ranges,
            clippy::single_range_in_vec_init,
            reason = "that is the point"
        )]
        for bad in [vec![1..3, 2..4], vec![3..1], vec![2..2]] {
            assert_eq!(decode(&encode(id, &bad), id, 6), Err(Refusal::Nonsense("ranges")));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_make_sense(body in prop::collection::vec(any::<u8>(), 0..80), pages: u32) {
            let id = [0; ID_LEN];
            let body = [&KIND[..], &id, &body].concat();
            if let Ok(ranges) = decode(&codec::seal(&body), id, pages) {
                prop_assert!(ranges.iter().all(|range| range.end <= pages));
            }
        }
    }
}
