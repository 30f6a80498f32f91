//! Reads and writes partition tables (GPT), and has the kernel read them again.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use gpt::{GptConfig, disk::LogicalBlockSize, mbr::ProtectiveMBR, partition_types};

use super::{
    plan::{Action, Disk, New, Partition},
    size,
};
use crate::error::{Error, Result};

/// Looks at a disk. A disk without a readable GPT has no partitions to keep.
pub fn describe(name: String) -> Result<Disk> {
    let block_size = std::fs::read_to_string(format!("/sys/block/{name}/queue/logical_block_size"));
    let block_size = block_size.ok().and_then(|s| s.trim().parse().ok()).unwrap_or(512);
    let Some(config) = config(block_size) else {
        return Err(failed(&name, format!("blocks of {block_size} bytes are not supported")));
    };
    let partitions = match config.open(device(&name)) {
        Ok(table) => {
            let used = table.partitions().iter().filter(|(_, p)| p.is_used());
            let partition = |(id, p): (&u32, &gpt::partition::Partition)| Partition {
                id: *id,
                label: p.name.clone(),
                first: p.first_lba,
                last: p.last_lba,
            };
            Some(used.map(partition).collect())
        }
        // A disk that can't be read is not an empty one: it may be the one with the state. (One too short for a table is.)
        Err(gpt::GptError::Io(e)) if e.kind() != std::io::ErrorKind::UnexpectedEof => {
            return Err(failed(&name, format!("its partition table cannot be read: {e}")));
        }
        Err(_) => None,
    };
    Ok(Disk { blocks: size(&name) / block_size, block_size, partitions, name })
}

/// Does what was planned. The kernel announces the new partitions afterwards.
pub fn apply(disk: &Disk, action: &Action) -> Result<()> {
    let told = |e: gpt::GptError| failed(&disk.name, e.to_string());
    let config = config(disk.block_size).map(|c| c.writable(true));
    let Some(config) = config else { return Ok(()) };
    let written = match action {
        Action::Keep => return Ok(()),
        Action::Rewrite { add } => {
            let mut device = open(&disk.name)?;
            let blocks = u32::try_from(disk.blocks.saturating_sub(1)).unwrap_or(u32::MAX);
            let mbr = ProtectiveMBR::with_lb_size(blocks);
            mbr.overwrite_lba0(&mut device).map_err(|e| failed(&disk.name, e.to_string()))?;
            let mut table = config.create_from_device(device, None).map_err(told)?;
            add_all(&mut table, add).map_err(told)?;
            table.write().map_err(told)?
        }
        Action::Change { remove, add } => {
            let mut table = config.open_from_device(open(&disk.name)?).map_err(told)?;
            for id in remove {
                table.remove_partition(*id);
            }
            add_all(&mut table, add).map_err(told)?;
            table.write().map_err(told)?
        }
    };
    written.sync_all().map_err(|e| failed(&disk.name, e.to_string()))?;
    reread(&written).map_err(|e| failed(&disk.name, format!("the kernel does not read it again: {e}")))
}

fn add_all(table: &mut gpt::GptDisk<File>, add: &[New]) -> Result<(), gpt::GptError> {
    for new in add {
        let id = table.find_next_partition_id().unwrap_or(1);
        table.add_partition_at(new.label, id, new.first, new.blocks.max(1), partition_types::LINUX_FS, 0)?;
    }
    Ok(())
}

fn config(block_size: u64) -> Option<GptConfig> {
    let size = LogicalBlockSize::try_from(block_size).ok()?;
    Some(GptConfig::new().logical_block_size(size))
}

fn device(name: &str) -> PathBuf {
    Path::new("/dev").join(name)
}

fn open(name: &str) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(device(name));
    file.map_err(|e| failed(name, e.to_string()))
}

fn reread(disk: &File) -> io::Result<()> {
    // SAFETY: BLKRRPART takes no argument and touches none of our memory.
    let done = unsafe { libc::ioctl(disk.as_raw_fd(), BLKRRPART) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `_IO(0x12, 95)`.
const BLKRRPART: libc::Ioctl = 0x125f;

fn failed(disk: &str, why: String) -> Error {
    Error::Table { disk: disk.into(), why }
}
