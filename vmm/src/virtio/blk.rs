//! The block device (virtio 1.2, section 5.2): one raw image file, one queue, requests served in order as they come.
//!
//! Sectors have 512 bytes. Every request is parsed and checked against the image's size before the image is touched; what fails the
//! check is answered with IOERR or UNSUPP and harms nobody. Flush is `fdatasync`. Discard and write-zeroes punch holes, so that
//! what the guest deletes is given back to the host.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use rustix::fs::FallocateFlags;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::Bytes;

use super::segments::{Segments, split};
use super::{Active, Chain, DeviceError, Memory, VirtioDevice, read_config_from};

/// Size of a sector, bytes.
pub const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 128;
/// Data segments per request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// What a discard should be aligned to: a page of the host, less is not given back.
const PAGE: u32 = 4096;
/// Sectors per discard or write-zeroes request: 1 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
const HEADER: u64 = 16;
const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
const RANGE_BYTES: usize = 16;
const ID: &[u8; ID_BYTES] = b"commonage-disk\0\0\0\0\0\0";

/// A checked request: every range lies within the image.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Request {
    /// Read from `offset` (bytes) into the segments.
    Read { offset: u64, into: Segments },
    /// Write the segments at `offset` (bytes).
    Write { offset: u64, from: Segments },
    /// Make everything written durable.
    Flush,
    /// Tell the device's name.
    Id { into: Segments },
    /// Make a range (bytes) read as zero, or as anything.
    Erase { offset: u64, len: u64, unmap: bool },
}

/// What a request is answered with when it cannot be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    IoError,
    Unsupported,
}

impl Refusal {
    fn status(self) -> u8 {
        match self {
            Self::IoError => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// Checks a request against an image of `sectors` sectors. `output` is what the driver gave, header first; `input` is where the answer
/// goes, without the status byte.
fn parse(memory: &Memory, sectors: u64, output: Segments, input: Segments) -> Result<Request, Refusal> {
    let (header, data) = output.split_at(HEADER).ok_or(Refusal::IoError)?;
    let header = header.read_array::<16>(memory).ok_or(Refusal::IoError)?;
    let [t0, t1, t2, t3, _, _, _, _, s @ ..] = header;
    let sector = u64::from_le_bytes(s);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => {
            Ok(Request::Read { offset: byte_offset(sectors, sector, input.len())?, into: input })
        }
        VIRTIO_BLK_T_OUT => {
            Ok(Request::Write { offset: byte_offset(sectors, sector, data.len())?, from: data })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID if input.len() >= ID_BYTES as u64 => Ok(Request::Id { into: input }),
        VIRTIO_BLK_T_GET_ID => Err(Refusal::IoError),
        VIRTIO_BLK_T_DISCARD => parse_erase(memory, sectors, &data, true),
        VIRTIO_BLK_T_WRITE_ZEROES => parse_erase(memory, sectors, &data, false),
        _ => Err(Refusal::Unsupported),
    }
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

/// The image.
struct Disk {
    file: File,
    sectors: u64,
}

impl Disk {
    /// Serves one chain; returns the number of bytes written into it.
    fn serve(&mut self, memory: &Memory, chain: Chain<'_>) -> u32 {
        let Ok((output, input)) = split(chain) else { return 0 };
        // The status is the last writable byte. Without it there is no way to answer.
        let Some((input, status)) = input.len().checked_sub(1).and_then(|at| input.split_at(at)) else {
            return 0;
        };
        let outcome = parse(memory, self.sectors, output, input)
            .and_then(|request| self.execute(memory, &request).map_err(|_| Refusal::IoError));
        let (written, code) = match outcome {
            Ok(written) => (written, VIRTIO_BLK_S_OK as u8),
            Err(refusal) => (0, refusal.status()),
        };
        match status.write(memory, &[code]) {
            Some(1) => u32::try_from(written).unwrap_or(u32::MAX).saturating_add(1),
            _ => 0,
        }
    }

    /// Carries out a request; returns the number of bytes read from the image.
    fn execute(&mut self, memory: &Memory, request: &Request) -> io::Result<u64> {
        match request {
            Request::Read { offset, into } => {
                self.file.seek(SeekFrom::Start(*offset))?;
                for (start, len) in into.ranges() {
                    memory.read_exact_volatile_from(start, &mut self.file, len).map_err(io::Error::other)?;
                }
                Ok(into.len())
            }
            Request::Write { offset, from } => {
                self.file.seek(SeekFrom::Start(*offset))?;
                for (start, len) in from.ranges() {
                    memory.write_all_volatile_to(start, &mut self.file, len).map_err(io::Error::other)?;
                }
                Ok(0)
            }
            Request::Flush => self.file.sync_data().map(|()| 0),
            Request::Id { into } => into
                .write(memory, ID)
                .map(|written| written as u64)
                .ok_or_else(|| io::Error::other("id buffer outside guest memory")),
            Request::Erase { len: 0, .. } => Ok(0),
            Request::Erase { offset, len, unmap } => {
                self.erase(*offset, *len, *unmap)?;
                Ok(0)
            }
        }
    }

    /// A hole reads as zeroes, so it serves discard and write-zeroes alike. Without `unmap` the blocks stay allocated where the file system
    /// can do that.
    fn erase(&self, offset: u64, len: u64, unmap: bool) -> rustix::io::Result<()> {
        let how = |flags| rustix::fs::fallocate(&self.file, flags | FallocateFlags::KEEP_SIZE, offset, len);
        if !unmap && how(FallocateFlags::ZERO_RANGE).is_ok() {
            return Ok(());
        }
        how(FallocateFlags::PUNCH_HOLE)
    }
}

/// The block device.
pub struct Blk {
    disk: Disk,
    config: [u8; 60],
    active: Option<Active>,
}

impl Blk {
    /// A device for the image in `file`, open for reading and writing. A last incomplete sector is not shown to the guest.
    pub fn new(file: File) -> io::Result<Self> {
        let sectors = file.metadata()?.len() / SECTOR;
        Ok(Self { disk: Disk { file, sectors }, config: config(sectors), active: None })
    }
}

/// `struct virtio_blk_config`.
fn config(sectors: u64) -> [u8; 60] {
    let mut config = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in config.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    put(0, &sectors.to_le_bytes()); // capacity
    put(12, &SEG_MAX.to_le_bytes()); // seg_max
    put(20, &(SECTOR as u32).to_le_bytes()); // blk_size: logical, so that file systems with 1 KiB blocks mount
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes()); // max_discard_sectors
    put(40, &1u32.to_le_bytes()); // max_discard_seg
    put(44, &(PAGE / SECTOR as u32).to_le_bytes()); // discard_sector_alignment
    put(48, &MAX_DISCARD_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    put(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
    put(56, &[1]); // write_zeroes_may_unmap
    config
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_DISCARD
            | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_from(&self.config, offset, data);
    }

    fn activate(&mut self, active: Active) -> Result<(), DeviceError> {
        self.active = Some(active);
        Ok(())
    }

    fn active(&mut self) -> Option<&mut Active> {
        self.active.as_mut()
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        let Self { disk, active, .. } = self;
        match active {
            Some(active) => active.drain(queue, |memory, chain| disk.serve(memory, chain)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
#[path = "blk_test.rs"]
mod tests;
