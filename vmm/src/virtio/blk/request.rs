//! What a chain of descriptors asks of a disk (virtio 1.2, section 5.2.6), checked against the size of the image: a [`Request`] that exists
//! stays within the image. Its segments are still to be checked against guest memory, by whoever uses them.
#![forbid(unsafe_code)]

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::{MAX_DISCARD_SECTORS, MAX_REQUEST, SECTOR};
use crate::virtio::Memory;
use crate::virtio::segments::Segments;

const HEADER: u64 = 16;
/// Length of a disk's name, bytes.
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
const RANGE_BYTES: usize = 16;

/// A checked request: every range lies within the image. Offsets and lengths are in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Read from `offset` into the segments.
    Read {
        /// Where in the image.
        offset: u64,
        /// Where to.
        into: Segments,
    },
    /// Write the segments at `offset`.
    Write {
        /// Where in the image.
        offset: u64,
        /// Where from.
        from: Segments,
    },
    /// Make durable everything whose writing was answered.
    Flush,
    /// Tell the disk's name.
    Id {
        /// Where to.
        into: Segments,
    },
    /// Make a range read as zeroes.
    Erase {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        len: u64,
        /// Give its blocks back to the host.
        unmap: bool,
    },
}

/// What a request is answered with when it cannot be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It makes no sense.
    IoError,
    /// Only some other device does that.
    Unsupported,
}

impl Refusal {
    /// The status byte that says so.
    pub fn status(self) -> u8 {
        match self {
            Self::IoError => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// Checks a request against an image of `sectors` sectors. `output` is what the driver gave, header first; `input` is where the answer
/// goes, without the status byte.
pub fn parse(memory: &Memory, sectors: u64, output: Segments, input: Segments) -> Result<Request, Refusal> {
    let (header, data) = output.split_at(HEADER).ok_or(Refusal::IoError)?;
    let header = header.read_array::<16>(memory).ok_or(Refusal::IoError)?;
    let [t0, t1, t2, t3, _, _, _, _, s @ ..] = header;
    let sector = u64::from_le_bytes(s);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => {
            Ok(Request::Read { offset: byte_offset(sectors, sector, transfer(&input)?)?, into: input })
        }
        VIRTIO_BLK_T_OUT => {
            Ok(Request::Write { offset: byte_offset(sectors, sector, transfer(&data)?)?, from: data })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID if input.len() >= ID_BYTES as u64 => Ok(Request::Id { into: input }),
        VIRTIO_BLK_T_GET_ID => Err(Refusal::IoError),
        VIRTIO_BLK_T_DISCARD => parse_erase(memory, sectors, &data, true),
        VIRTIO_BLK_T_WRITE_ZEROES => parse_erase(memory, sectors, &data, false),
        _ => Err(Refusal::Unsupported),
    }
}

/// The bytes that a read or write moves, if that is no more than `seg_max` segments of `size_max`.
fn transfer(data: &Segments) -> Result<u64, Refusal> {
    Some(data.len()).filter(|len| *len <= MAX_REQUEST).ok_or(Refusal::IoError)
}

/// The byte offset of `sector`, if `len` bytes from there are whole sectors within the image.
fn byte_offset(sectors: u64, sector: u64, len: u64) -> Result<u64, Refusal> {
    let end = sector.checked_add(len / SECTOR).filter(|end| *end <= sectors);
    match end {
        Some(_) if len.is_multiple_of(SECTOR) => sector.checked_mul(SECTOR).ok_or(Refusal::IoError),
        _ => Err(Refusal::IoError),
    }
}

/// Discard or write-zeroes: exactly one range, as `max_*_seg` = 1 announces.
fn parse_erase(memory: &Memory, sectors: u64, data: &Segments, discard: bool) -> Result<Request, Refusal> {
    if data.len() != RANGE_BYTES as u64 {
        return Err(Refusal::IoError);
    }
    let range = data.read_array::<RANGE_BYTES>(memory).ok_or(Refusal::IoError)?;
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f @ ..] = range;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let count = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes(f);
    // Flag 0 is unmap, which means nothing for discard; all others are reserved and must be refused (5.2.6.2).
    let permitted = if discard { 0 } else { 1 };
    if flags & !permitted != 0 {
        return Err(Refusal::Unsupported);
    }
    if count > MAX_DISCARD_SECTORS {
        return Err(Refusal::IoError);
    }
    let len = u64::from(count) * SECTOR;
    Ok(Request::Erase { offset: byte_offset(sectors, sector, len)?, len, unmap: discard || flags == 1 })
}
