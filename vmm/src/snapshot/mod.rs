//! A paused machine as two files, and machines that go on where it stopped.
//!
//! ```text
//!  state    shape, CPUID, processors, interrupt controllers, clock, serial port, virtio devices      [`State`], in [`codec`]'s envelope
//!  memory   guest memory, sparse, mapped privately by every clone                                    [`memory`]
//!  prefault pages that clones write at once (a hint)                                                 [`touched`]
//! ```
//!
//! Invariants:
//! * State and memory carry the same random name: those of two snapshots do not go together.
//! * Files are only ever written through descriptors that a client attached, and read through those opened at the start.
//! * A state file is checked as a whole (length, checksum) and part by part: whatever it says, reading it ends with a [`State`] or a
//!   refusal that says what is wrong. What a lying file could still say is guest state, which no device believes.
#![forbid(unsafe_code)]

pub mod codec;
pub mod memory;
pub mod pages;
pub mod touched;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use commonage_vmm_api::MachineConfig;
use kvm_bindings::kvm_cpuid_entry2;

use self::codec::{CHECKSUM, Reader, Refusal, Writer};
use self::memory::MemoryRefusal;
use crate::layout;
use crate::vcpu_state::VcpuState;
use crate::virtio::mmio::TransportState;
use crate::vm::VmState;

/// Length of a snapshot's name.
pub const ID_LEN: usize = 16;
/// A snapshot's name: random, the same in all its files.
pub type Id = [u8; ID_LEN];

/// Longest state file, bytes. Eight processors and all devices take 100 KiB.
const MAX_STATE: u64 = 16 << 20;
/// Longest state of a serial port, bytes.
const MAX_SERIAL: usize = 32 << 10;
/// What of a base image's beginning tells it from others: the superblock with its UUID.
const BASE_HEAD: usize = 4096;

/// Why a machine cannot start from a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The state file is not good.
    #[error("cannot restore from {path}: {refusal}")]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        refusal: Refusal,
    },
    /// The memory file is not good.
    #[error("cannot restore from {path}: {refusal}")]
    Memory {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        refusal: MemoryRefusal,
    },
    /// Another kind of machine was saved.
    #[error(
        "cannot restore: the snapshot is of a machine with {was}, this one has {is}; configure what was saved"
    )]
    OtherShape {
        /// What was saved.
        was: String,
        /// What is configured.
        is: String,
    },
    /// A device does not take its state.
    #[error("cannot restore virtio device {index}: {message}; boot the machine afresh")]
    Device {
        /// Which, in the order of their pages.
        index: usize,
        /// Why not.
        message: String,
    },
}

/// What must be the same in the machine that was saved and the one that goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Processors.
    pub vcpus: u8,
    /// Length of the base image, bytes, and a checksum of its beginning.
    pub base: Option<(u64, u64)>,
}

impl Shape {
    /// Of a machine with `config` whose base image is `base`.
    pub fn of(config: &MachineConfig, base: Option<&File>) -> io::Result<Self> {
        let base = match base {
            None => None,
            Some(file) => {
                let mut head = [0; BASE_HEAD];
                let count = file.read_at(&mut head, 0)?;
                Some((file.metadata()?.len(), CHECKSUM.checksum(head.get(..count).unwrap_or_default())))
            }
        };
        Ok(Self { memory_mib: config.memory_mib, vcpus: config.vcpus, base })
    }

    fn write(&self, to: &mut Writer) {
        to.u32(self.memory_mib);
        to.u8(self.vcpus);
        to.u8(u8::from(self.base.is_some()));
        if let Some((length, checksum)) = self.base {
            to.u64(length);
            to.u64(checksum);
        }
    }

    fn read(from: &mut Reader<'_>) -> Result<Self, Refusal> {
        let (memory_mib, vcpus) = (from.u32()?, from.u8()?);
        let base = if from.bool()? { Some((from.u64()?, from.u64()?)) } else { None };
        if vcpus == 0 || vcpus > layout::MAX_VCPUS || memory_mib > layout::MAX_MEMORY_MIB {
            return Err(Refusal::Nonsense("processors and memory"));
        }
        Ok(Self { memory_mib, vcpus, base })
    }

    /// Refuses a machine that is not of this shape.
    pub fn must_be(&self, other: &Self) -> Result<(), SnapshotError> {
        let differ = |was: String, is: String| Err(SnapshotError::OtherShape { was, is });
        if self.memory_mib != other.memory_mib {
            let mib = |shape: &Self| format!("{} MiB of memory", shape.memory_mib);
            return differ(mib(self), mib(other));
        }
        if self.vcpus != other.vcpus {
            let count = |shape: &Self| format!("{} virtual processors", shape.vcpus);
            return differ(count(self), count(other));
        }
        if self.base != other.base {
            let base = |shape: &Self| match shape.base {
                Some((length, checksum)) => {
                    format!("a base image of {length} bytes (checksum {checksum:016x})")
                }
                None => "no base image".to_owned(),
            };
            return differ(base(self), base(other));
        }
        Ok(())
    }
}

/// A whole machine but for its memory.
pub struct State {
    /// The snapshot's name.
    pub id: Id,
    /// What the machine was.
    pub shape: Shape,
    /// Of the memory file.
    pub memory_checksum: u64,
    /// What the first processor's guest was told it runs on.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of the processors' time-stamp counters, kHz.
    pub tsc_khz: u32,
    /// One for each processor.
    pub vcpus: Vec<VcpuState>,
    /// What they share.
    pub vm: VmState,
    /// The serial port's.
    pub serial: Vec<u8>,
    /// One for each virtio device, in the order of their pages.
    pub devices: Vec<TransportState>,
}

impl State {
    /// As the contents of a state file.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Writer::default();
        body.raw(&self.id);
        self.shape.write(&mut body);
        body.u64(self.memory_checksum);
        body.plains(&self.cpuid);
        body.u32(self.tsc_khz);
        self.vcpus.iter().for_each(|vcpu| vcpu.write(&mut body));
        self.vm.write(&mut body);
        body.blob(&self.serial);
        body.u32(self.devices.len() as u32);
        self.devices.iter().for_each(|device| device.write(&mut body));
        codec::seal(&body.into_bytes())
    }

    /// Reads a state file's contents.
    pub fn decode(file: &[u8]) -> Result<Self, Refusal> {
        let mut body = Reader::new(codec::open(file)?);
        let id = body.array()?;
        let shape = Shape::read(&mut body)?;
        let memory_checksum = body.u64()?;
        let cpuid = body.plains()?;
        let tsc_khz = body.u32()?;
        let vcpus = (0..shape.vcpus).map(|_| VcpuState::read(&mut body)).collect::<Result<_, _>>()?;
        let vm = VmState::read(&mut body)?;
        let serial = body.blob()?;
        if serial.len() > MAX_SERIAL {
            return Err(Refusal::Nonsense("serial port"));
        }
        let serial = serial.to_vec();
        let count = body.count(layout::VIRTIO_DEVICES_MAX)?;
        let devices = (0..count).map(|_| TransportState::read(&mut body)).collect::<Result<_, _>>()?;
        body.end()?;
        Ok(Self { id, shape, memory_checksum, cpuid, tsc_khz, vcpus, vm, serial, devices })
    }
}

/// The contents of a state file or a list of pages, if it is not far too long to be one.
pub fn read_bounded(file: &File) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    if length > MAX_STATE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has {length} bytes")));
    }
    let mut contents = Vec::with_capacity(length as usize);
    file.take(MAX_STATE).read_to_end(&mut contents)?;
    Ok(contents)
}

/// Writes all of `contents` to `file`, whatever was in it before.
pub fn write_whole(file: &File, contents: &[u8]) -> io::Result<()> {
    file.set_len(0)?;
    file.write_all_at(contents, 0)
}

#[cfg(test)]
#[path = "snapshot_test.rs"]
mod tests;
