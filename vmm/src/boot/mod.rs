//! Puts an operating system into guest memory, so that the first processor can start it: kernel (uncompressed ELF with a PVH entry),
//! initrd, command line, MP table and the PVH start information. Addresses are those of [`crate::layout`].
#![forbid(unsafe_code)]

pub mod mptable;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, start_info};
use start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::layout;
use crate::virtio::Memory;

const PVH_MAGIC: u32 = 0x336e_c578;
const PVH_VERSION: u32 = 1;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const PAGE: u64 = 4096;

/// Why an operating system could not be put into guest memory.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Not a kernel that can be started.
    #[error("kernel {path}: {message}; give an uncompressed ELF vmlinux built with CONFIG_PVH=y")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The initrd could not be read.
    #[error("initrd {path}: {source}")]
    Initrd {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Kernel and initrd need more memory.
    #[error(
        "{memory_mib} MiB of memory do not hold the kernel (to {kernel_end:#x}) and an initrd of {initrd} bytes"
    )]
    NoRoom {
        /// Memory of the machine.
        memory_mib: u32,
        /// First address after the kernel.
        kernel_end: u64,
        /// Size of the initrd, bytes.
        initrd: u64,
    },
    /// The command line does not fit.
    #[error("the kernel command line has {0} bytes; at most {max} fit", max = layout::COMMAND_LINE_MAX - 1)]
    CommandLine(usize),
    /// Boot structures could not be written: a mistake in the layout.
    #[error("cannot write {what} to guest memory: {message}")]
    Write {
        /// Which structure.
        what: &'static str,
        /// Why.
        message: String,
    },
}

/// A file together with its path, for error messages.
pub struct Image {
    /// Where it was opened.
    pub path: PathBuf,
    /// Open for reading.
    pub file: File,
}

impl Image {
    /// Opens `path` for reading.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: File::open(path)? })
    }
}

/// Loads everything into `memory`; returns the address of the kernel's PVH entry.
pub fn load(
    memory: &Memory,
    memory_mib: u32,
    vcpus: u8,
    kernel: &mut Image,
    initrd: Option<&mut Image>,
    command_line: &str,
) -> Result<GuestAddress, BootError> {
    let (entry, kernel_end) = load_kernel(memory, kernel)?;
    let modules = match initrd {
        Some(initrd) => vec![load_initrd(memory, memory_mib, kernel_end, initrd)?],
        None => Vec::new(),
    };
    write_command_line(memory, command_line)?;
    let table = mptable::table(vcpus);
    memory.write_slice(&table, layout::MP_TABLE).map_err(write_error("the MP table"))?;
    write_start_info(memory, memory_mib, &modules)?;
    Ok(entry)
}

fn write_error<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> BootError {
    move |error| BootError::Write { what, message: error.to_string() }
}

fn load_kernel(memory: &Memory, kernel: &mut Image) -> Result<(GuestAddress, u64), BootError> {
    let refuse = |message: String| BootError::Kernel { path: kernel.path.clone(), message };
    let loaded = Elf::load(memory, None, &mut kernel.file, Some(layout::HIGH_RAM))
        .map_err(|error| refuse(error.to_string()))?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Ok((entry, loaded.kernel_end)),
        _ => Err(refuse("no PVH entry".into())),
    }
}

/// Puts the initrd at the end of low RAM.
fn load_initrd(
    memory: &Memory,
    memory_mib: u32,
    kernel_end: u64,
    initrd: &mut Image,
) -> Result<hvm_modlist_entry, BootError> {
    let failed = |source| BootError::Initrd { path: initrd.path.clone(), source };
    let size = initrd.file.metadata().map_err(failed)?.len();
    let start = layout::low_ram_end(memory_mib)
        .checked_sub(size)
        .map(|start| start / PAGE * PAGE)
        .filter(|start| *start >= kernel_end)
        .ok_or(BootError::NoRoom { memory_mib, kernel_end, initrd: size })?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut initrd.file, size as usize)
        .map_err(|error| failed(io::Error::other(error)))?;
    Ok(hvm_modlist_entry { paddr: start, size, ..Default::default() })
}

fn write_command_line(memory: &Memory, command_line: &str) -> Result<(), BootError> {
    if command_line.len() >= layout::COMMAND_LINE_MAX || command_line.contains('\0') {
        return Err(BootError::CommandLine(command_line.len()));
    }
    let mut bytes = command_line.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, layout::COMMAND_LINE).map_err(write_error("the command line"))
}

/// RAM and what is reserved in it, as the guest is told.
fn memory_map(memory_mib: u32) -> Vec<hvm_memmap_table_entry> {
    let entry = |addr, size, type_| hvm_memmap_table_entry { addr, size, type_, reserved: 0 };
    let mut map = vec![
        entry(0, layout::MP_TABLE.0, E820_RAM),
        entry(layout::MP_TABLE.0, layout::MP_TABLE_MAX as u64, E820_RESERVED),
    ];
    for (start, size) in layout::ram_ranges(memory_mib) {
        let skip = layout::HIGH_RAM.0.saturating_sub(start.0);
        map.push(entry(start.0 + skip, size - skip, E820_RAM));
    }
    map
}

fn write_start_info(
    memory: &Memory,
    memory_mib: u32,
    modules: &[hvm_modlist_entry],
) -> Result<(), BootError> {
    let map = memory_map(memory_mib);
    let start_info = hvm_start_info {
        magic: PVH_MAGIC,
        version: PVH_VERSION,
        cmdline_paddr: layout::COMMAND_LINE.0,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { layout::MODULE_LIST.0 },
        memmap_paddr: layout::MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, layout::START_INFO);
    params.set_sections(&map, layout::MEMORY_MAP);
    if !modules.is_empty() {
        params.set_modules(modules, layout::MODULE_LIST);
    }
    debug_assert!(memory.address_in_range(layout::START_INFO));
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(write_error("the PVH start information"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn memory(mib: u32) -> Memory {
        let ranges: Vec<_> =
            layout::ram_ranges(mib).into_iter().map(|(start, size)| (start, size as usize)).collect();
        Memory::from_ranges(&ranges).unwrap()
    }

    fn image(bytes: &[u8]) -> Image {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        Image { path: "image".into(), file }
    }

    #[test]
    fn memory_map_leaves_out_the_mp_table_and_the_hole_below_1_mib() {
        let map = memory_map(64);
        assert_eq!((map[0].addr, map[0].size, map[0].type_), (0, 0x9fc00, E820_RAM));
        assert_eq!(map[1].type_, E820_RESERVED);
        assert_eq!((map[2].addr, map[2].size), (layout::MIB, 63 * layout::MIB));
        let map = memory_map(4096);
        assert_eq!((map[3].addr, map[3].size), (4 * layout::GIB, layout::GIB));
    }

    #[test]
    fn initrd_ends_where_ram_ends() {
        let memory = memory(32);
        let entry = load_initrd(&memory, 32, 8 * layout::MIB, &mut image(&[7; 5000])).unwrap();
        assert_eq!(entry.paddr, 32 * layout::MIB - 8192);
        assert_eq!(entry.size, 5000);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(entry.paddr + 4999)).unwrap(), 7);
    }

    #[test]
    fn initrd_never_overlaps_the_kernel() {
        let error =
            load_initrd(&memory(32), 32, 32 * layout::MIB - 4096, &mut image(&[7; 5000])).unwrap_err();
        assert!(matches!(error, BootError::NoRoom { .. }), "{error}");
    }

    #[test]
    fn a_file_that_is_no_kernel_is_refused_with_advice() {
        let error = load_kernel(&memory(32), &mut image(&[0; 4096])).unwrap_err();
        assert!(error.to_string().contains("CONFIG_PVH"), "{error}");
    }

    #[test]
    fn command_line_is_bounded() {
        let memory = memory(32);
        assert!(write_command_line(&memory, &"x".repeat(2047)).is_ok());
        assert!(write_command_line(&memory, &"x".repeat(2048)).is_err());
    }
}
