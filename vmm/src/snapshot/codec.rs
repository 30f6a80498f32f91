//! How values stand in a state file: little-endian, one after another, lengths before what varies; and around all of them one envelope.
//!
//! ```text
//!   0  magic      8 bytes  "CMNGSNAP"
//!   8  version    u32
//!  12  reserved   u32      0
//!  16  length     u64      of the body, bytes
//!  24  checksum   u64      CRC-64/XZ of the 24 bytes before and of the body
//!  32  body
//! ```
//!
//! Invariant: whatever the bytes, reading ends with a value or a [`Refusal`], and allocates no more than the file's length.
#![forbid(unsafe_code)]

use crc::{CRC_64_XZ, Crc, Table};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What a state file begins with.
const MAGIC: [u8; 8] = *b"CMNGSNAP";
/// Changes whenever the meaning of the body does. A snapshot lives no longer than the release that took it: there are no conversions.
pub const VERSION: u32 = 1;
const HEADER: usize = 32;
const CHECKED: usize = 24;

/// The checksum of state and memory files.
pub static CHECKSUM: Crc<u64, Table<16>> = Crc::<u64, Table<16>>::new(&CRC_64_XZ);

/// Why bytes are not the state of a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Something else.
    #[error("it is not a machine's state")]
    NotAState,
    /// Written by another release.
    #[error("it has format {found}, this program reads format {VERSION}; boot the machine afresh")]
    Version {
        /// Its format.
        found: u32,
    },
    /// Too short or too long.
    #[error("it has {found} bytes where its header says {expected}: it was truncated or written to")]
    Length {
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },
    /// Changed since it was written.
    #[error("its checksum is wrong: it is damaged")]
    Damaged,
    /// The checksum is right and yet no machine could have written it.
    #[error("its {0} make no sense: it was not written by this program")]
    Nonsense(&'static str),
}

/// Puts `body` into its envelope.
pub fn seal(body: &[u8]) -> Vec<u8> {
    let mut file = Vec::with_capacity(HEADER + body.len());
    file.extend_from_slice(&MAGIC);
    file.extend_from_slice(&VERSION.to_le_bytes());
    file.extend_from_slice(&0u32.to_le_bytes());
    file.extend_from_slice(&(body.len() as u64).to_le_bytes());
    let checksum = checksum(&file, body);
    file.extend_from_slice(&checksum.to_le_bytes());
    file.extend_from_slice(body);
    file
}

fn checksum(header: &[u8], body: &[u8]) -> u64 {
    let mut digest = CHECKSUM.digest();
    digest.update(header);
    digest.update(body);
    digest.finalize()
}

/// Takes a body out of its envelope.
pub fn open(file: &[u8]) -> Result<&[u8], Refusal> {
    let mut reader = Reader::new(file);
    if reader.bytes(MAGIC.len()) != Ok(&MAGIC) {
        return Err(Refusal::NotAState);
    }
    let version = reader.u32().map_err(|_| Refusal::NotAState)?;
    if version != VERSION {
        return Err(Refusal::Version { found: version });
    }
    let truncated = |_| Refusal::Length { found: file.len() as u64, expected: HEADER as u64 };
    let reserved = reader.u32().map_err(truncated)?;
    let length = reader.u64().map_err(truncated)?;
    let expected_checksum = reader.u64().map_err(truncated)?;
    let body = reader.rest();
    if length != body.len() as u64 {
        let expected = length.saturating_add(HEADER as u64);
        return Err(Refusal::Length { found: file.len() as u64, expected });
    }
    let header = file.get(..CHECKED).unwrap_or_default();
    if reserved != 0 || checksum(header, body) != expected_checksum {
        return Err(Refusal::Damaged);
    }
    Ok(body)
}

/// Writes values.
#[derive(Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// What was written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// As many bytes as `bytes` has; the reader must know how many.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// A length, and that many bytes.
    pub fn blob(&mut self, bytes: &[u8]) {
        self.u32(bytes.len() as u32);
        self.raw(bytes);
    }

    /// A structure of the kernel's, as it lies in memory.
    pub fn plain(&mut self, value: &(impl IntoBytes + Immutable)) {
        self.raw(value.as_bytes());
    }

    /// A count, and that many structures.
    pub fn plains<T: IntoBytes + Immutable>(&mut self, values: &[T]) {
        self.u32(values.len() as u32);
        values.iter().for_each(|value| self.plain(value));
    }
}

/// Reads values.
pub struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `bytes` from the beginning.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// `count` bytes.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], Refusal> {
        let (head, tail) = self.bytes.split_at_checked(count).ok_or(Refusal::Nonsense("lengths"))?;
        self.bytes = tail;
        Ok(head)
    }

    /// Everything that was not read yet.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    /// As many bytes as an array has.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, Refusal> {
        self.array().map(u8::from_le_bytes)
    }

    /// Two bytes.
    pub fn u16(&mut self) -> Result<u16, Refusal> {
        self.array().map(u16::from_le_bytes)
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, Refusal> {
        self.array().map(u32::from_le_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, Refusal> {
        self.array().map(u64::from_le_bytes)
    }

    /// One byte that is 0 or 1.
    pub fn bool(&mut self) -> Result<bool, Refusal> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Refusal::Nonsense("flags")),
        }
    }

    /// A length, and that many bytes.
    pub fn blob(&mut self) -> Result<&'a [u8], Refusal> {
        let count = self.u32()? as usize;
        self.bytes(count)
    }

    /// A structure of the kernel's.
    pub fn plain<T: FromBytes>(&mut self) -> Result<T, Refusal> {
        let bytes = self.bytes(size_of::<T>())?;
        T::read_from_bytes(bytes).map_err(|_| Refusal::Nonsense("lengths"))
    }

    /// A count, and that many structures.
    pub fn plains<T: FromBytes>(&mut self) -> Result<Vec<T>, Refusal> {
        let count = self.u32()? as usize;
        let len = count.checked_mul(size_of::<T>()).ok_or(Refusal::Nonsense("lengths"))?;
        let mut values = Reader::new(self.bytes(len)?);
        (0..count).map(|_| values.plain()).collect()
    }

    /// A count of at most `most`.
    pub fn count(&mut self, most: usize) -> Result<usize, Refusal> {
        let count = self.u32()? as usize;
        if count > most { Err(Refusal::Nonsense("counts")) } else { Ok(count) }
    }

    /// Refuses what is left over.
    pub fn end(self) -> Result<(), Refusal> {
        if self.bytes.is_empty() { Ok(()) } else { Err(Refusal::Nonsense("lengths")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refusals_tell_what_is_wrong() {
        let good = seal(b"body");
        assert_eq!(open(&good), Ok(&b"body"[..]));
        assert_eq!(open(b"#!/bin/sh"), Err(Refusal::NotAState));
        assert_eq!(open(b""), Err(Refusal::NotAState));
        let mut other = good.clone();
        other[8] = 9;
        assert_eq!(open(&other), Err(Refusal::Version { found: 9 }));
        assert_eq!(open(&good[..35]), Err(Refusal::Length { found: 35, expected: 36 }));
        let longer = [&good[..], b"x"].concat();
        assert_eq!(open(&longer), Err(Refusal::Length { found: 37, expected: 36 }));
        let mut damaged = good;
        damaged[33] ^= 4;
        assert_eq!(open(&damaged), Err(Refusal::Damaged));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_and_any_truncation_is_refused(
            body in prop::collection::vec(any::<u8>(), 0..300),
            at in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let sealed = seal(&body);
            prop_assert_eq!(open(&sealed), Ok(&body[..]));
            let at = at.index(sealed.len());
            prop_assert!(open(&sealed[..at]).is_err());
            let mut flipped = sealed.clone();
            flipped[at] ^= 1 << bit;
            prop_assert!(open(&flipped).is_err());
        }

        #[test]
        fn values_come_back_as_they_were_written(
            byte: u8, short: u16, word: u32, long: u64, blob in prop::collection::vec(any::<u8>(), 0..50),
        ) {
            let mut writer = Writer::default();
            writer.u8(byte);
            writer.u16(short);
            writer.u32(word);
            writer.blob(&blob);
            writer.plains(&[long, word.into()]);
            let bytes = writer.into_bytes();
            let mut reader = Reader::new(&bytes);
            prop_assert_eq!(reader.u8(), Ok(byte));
            prop_assert_eq!(reader.u16(), Ok(short));
            prop_assert_eq!(reader.u32(), Ok(word));
            prop_assert_eq!(reader.blob(), Ok(&blob[..]));
            prop_assert_eq!(reader.plains::<u64>(), Ok(vec![long, u64::from(word)]));
            prop_assert_eq!(reader.end(), Ok(()));
        }

        #[test]
        fn counts_that_lie_are_refused_before_anything_is_allocated(count in 1u32.., rest in 0usize..7) {
            let bytes = [&count.to_le_bytes()[..], &vec![0; rest]].concat();
            prop_assert!(Reader::new(&bytes).plains::<u64>().is_err());
            let blob = Reader::new(&bytes).blob().map(<[u8]>::len);
            prop_assert_eq!(blob.is_ok(), count as usize <= rest);
        }
    }
}
