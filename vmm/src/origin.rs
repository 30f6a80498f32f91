//! How a guest begins: at its kernel's entry, or where a snapshot left it. [`OriginFiles`] are opened outside of the jail, and become an
//! [`Origin`], which is read, inside: a saved sliver's files were written by a process that its tenant may have taken over.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;

use commonage_vmm_api::{MachineConfig, Start};
use kvm_ioctls::VcpuFd;

use crate::boot::{self, Image};
use crate::devices::bus::Bus;
use crate::layout;
use crate::machine::{MachineError, file_error, host_error};
use crate::mapping;
use crate::snapshot::{self, Id, Shape, SnapshotError, State, codec::Refusal, memory, pages::PAGE, touched};
use crate::virtio::Memory;
use crate::virtio::mmio::TransportState;
use crate::vm::{self, Vm};

/// What the kernel needs to hear whatever the guest is. `reboot=k`: a reboot pulses the keyboard controller's reset line, so that it can be told
/// from a crash; of the two kinds of reset that Linux asks the firmware for, a panic asks for the warm one (`crate::vcpu` looks).
const COMMAND_LINE: &str = "console=ttyS0 8250.nr_uarts=1 reboot=k,cold,panic_warm panic=-1 quiet";

/// Opened, but not looked into.
pub enum OriginFiles {
    /// A kernel.
    Boot(Kernel),
    /// A snapshot.
    Restore {
        /// All but memory.
        state: Image,
        /// Memory.
        memory: Image,
        /// The list of pages to copy at once.
        prefault: Option<File>,
    },
}

/// An operating system to boot.
pub struct Kernel {
    /// It.
    kernel: Image,
    /// Its initial RAM file system.
    initrd: Option<Image>,
    /// What the configuration adds to the command line.
    cmdline: String,
}

/// What the guest begins with.
pub enum Origin {
    /// A kernel.
    Boot(Kernel),
    /// A snapshot that fits the machine.
    Restore {
        /// All but memory.
        state: Box<State>,
        /// Memory.
        memory: Image,
        /// The list of pages to copy at once.
        prefault: Option<File>,
    },
}

fn open(what: &'static str, path: &Path) -> Result<Image, MachineError> {
    Image::open(path).map_err(file_error(what, path))
}

impl OriginFiles {
    /// Opens what `start` names.
    pub fn open(start: &Start) -> Result<Self, MachineError> {
        Ok(match start {
            Start::Boot { kernel, initrd, cmdline } => Self::Boot(Kernel {
                kernel: open("open the kernel", kernel)?,
                initrd: match initrd {
                    Some(path) => Some(open("open the initrd", path)?),
                    None => None,
                },
                cmdline: cmdline.clone(),
            }),
            Start::Restore { state, memory, prefault } => Self::Restore {
                state: open("open the snapshot's state", state)?,
                memory: open("open the snapshot's memory", memory)?,
                // A hint: if it cannot be opened, pages are copied one by one.
                prefault: prefault.as_ref().and_then(|path| File::open(path).ok()),
            },
        })
    }

    /// Reads them: they must begin a machine of `shape`.
    pub fn read(self, shape: &Shape) -> Result<Origin, MachineError> {
        match self {
            Self::Boot(kernel) => Ok(Origin::Boot(kernel)),
            Self::Restore { state: Image { path, file }, memory, prefault } => {
                let contents =
                    snapshot::read_bounded(&file).map_err(file_error("read the snapshot's state", &path))?;
                let state = State::decode(&contents)
                    .map_err(|refusal| SnapshotError::State { path, refusal })
                    .map(Box::new)?;
                state.shape.must_be(shape)?;
                memory::check(&memory.file, shape.memory_mib, state.id, state.memory_checksum)
                    .map_err(|refusal| SnapshotError::Memory { path: memory.path.clone(), refusal })?;
                Ok(Origin::Restore { state, memory, prefault })
            }
        }
    }
}

impl Origin {
    /// Which snapshot it is, if it is one.
    pub fn snapshot(&self) -> Option<Id> {
        match self {
            Self::Boot(_) => None,
            Self::Restore { state, .. } => Some(state.id),
        }
    }

    /// Guest memory: empty, or the snapshot's.
    pub fn memory(&self, memory_mib: u32) -> Result<Memory, MachineError> {
        match self {
            Self::Boot(_) => empty_memory(memory_mib),
            Self::Restore { memory: Image { file, path }, .. } => file
                .try_clone()
                .and_then(|file| memory::map(file, memory_mib))
                .map_err(file_error("map the snapshot's memory", path)),
        }
    }

    /// Makes the processors, in `vm` with its memory, ready to run. `parameters` tell a booting kernel of the devices. Also tells what
    /// the devices of a snapshot were.
    pub fn begin(
        self,
        config: &MachineConfig,
        vm: &Vm,
        parameters: &str,
        bus: &Bus,
    ) -> Result<(Vec<VcpuFd>, Vec<TransportState>), MachineError> {
        match self {
            Self::Boot(Kernel { mut kernel, mut initrd, cmdline }) => {
                let command_line = [COMMAND_LINE, parameters, &cmdline].map(str::trim).join(" ");
                let entry = boot::load(
                    vm.memory(),
                    config.memory_mib,
                    config.vcpus,
                    &mut kernel,
                    initrd.as_mut(),
                    command_line.trim(),
                )?;
                let vcpus = vm.create_vcpus(config.vcpus, &vm.supported_cpuid()?)?;
                vm::prepare_boot(&vcpus, entry)?;
                Ok((vcpus, Vec::new()))
            }
            Self::Restore { state, prefault, .. } => {
                let devices = (0..).take_while(|index| bus.virtio(*index).is_some()).count();
                if devices != state.devices.len() {
                    let count = |count: usize| format!("{count} virtio devices");
                    return Err(SnapshotError::OtherShape {
                        was: count(state.devices.len()),
                        is: count(devices),
                    }
                    .into());
                }
                if let Some(file) = prefault {
                    prefault_pages(&file, config.memory_mib, &state, vm.memory());
                }
                let vcpus = vm.create_vcpus(config.vcpus, &vm.cpuid_for(&state.cpuid, config.vcpus)?)?;
                for (vcpu, saved) in vcpus.iter().zip(&state.vcpus) {
                    vm::set_tsc_khz(vcpu, state.tsc_khz)?;
                    saved.apply(vcpu)?;
                }
                vm.restore(&state.vm)?;
                bus.restore_serial(&state.serial).map_err(host_error("restore the serial port"))?;
                Ok((vcpus, state.devices))
            }
        }
    }
}

/// Copies the pages in the list `file`, if it is a list for this snapshot.
fn prefault_pages(file: &File, memory_mib: u32, state: &State, memory: &Memory) {
    let pages = u64::from(memory_mib) * layout::MIB / PAGE as u64;
    let list = snapshot::read_bounded(file).map_err(|_| Refusal::NotAState);
    let list =
        list.and_then(|list| touched::decode(&list, state.id, u32::try_from(pages).unwrap_or(u32::MAX)));
    if let Ok(list) = list {
        mapping::populate(memory, &list);
    }
}

fn empty_memory(memory_mib: u32) -> Result<Memory, MachineError> {
    let ranges: Result<Vec<_>, _> = layout::ram_ranges(memory_mib)
        .into_iter()
        .map(|(start, size)| usize::try_from(size).map(|size| (start, size)))
        .collect();
    let ranges = ranges.map_err(|error| MachineError::Config(error.to_string()))?;
    Memory::from_ranges(&ranges)
        .map_err(|error| MachineError::Host { what: "map guest memory", source: io::Error::other(error) })
}
