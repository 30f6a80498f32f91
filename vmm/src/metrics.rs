//! What a machine has done and what it takes, gathered when a client asks: nothing is measured while nobody does.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;

use commonage_vmm_api::{Metrics, VcpuMetrics};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::devices::bus::Bus;
use crate::virtio::Memory;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::net::Net;
use crate::virtio::vsock::Vsock;

/// All that can be told of the machine on `bus`; `vcpus` is told by who runs them.
pub fn gather(bus: &Bus, memory: &Memory, private: &PrivateMemory, vcpus: Vec<VcpuMetrics>) -> Metrics {
    let ranges: Vec<(u64, u64)> = memory
        .iter()
        .filter_map(|region| {
            let start = region.get_host_address(MemoryRegionAddress(0)).ok()? as u64;
            Some((start, start.checked_add(region.len())?))
        })
        .collect();
    // A host that cannot tell is no reason to tell nothing else.
    let (private_kib, vmm_private_kib) = private.measure(&ranges).unwrap_or_default();
    let net = bus.with_device(|net: &mut Net| net.counters()).unwrap_or_default();
    let (balloon_mib, guest_free_kib, reported_kib) =
        bus.with_device(|balloon: &mut Balloon| balloon.metrics()).unwrap_or_default();
    Metrics {
        private_kib,
        vmm_private_kib,
        vcpus,
        net_frames: net.frames,
        net_bytes: net.bytes,
        vsock_connections: bus.with_device(|vsock: &mut Vsock| vsock.connections() as u64).unwrap_or(0),
        disk: bus.with_device(|blk: &mut Blk| blk.metrics()).unwrap_or_default(),
        balloon_mib,
        guest_free_kib,
        reported_kib,
    }
}

/// This process's own account of its memory, opened before it is locked in: afterwards it has no `/proc`.
pub struct PrivateMemory(File);

impl PrivateMemory {
    /// Opens the account.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/smaps").map(Self)
    }

    /// KiB of memory that no other process has and that is in no file either: all, and what lies outside `guest` (addresses in this process, ends exclusive).
    fn measure(&self, guest: &[(u64, u64)]) -> io::Result<(u64, u64)> {
        let from_start = ReadAt { file: &self.0, at: 0 };
        sum(BufReader::with_capacity(4096, from_start), guest)
    }
}

/// Reads a file from its start whatever was read of it before.
struct ReadAt<'a> {
    file: &'a File,
    at: u64,
}

impl Read for ReadAt<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// Adds up the anonymous memory in an smaps file, copies of a file's pages among it. The file's own pages (the program, a snapshot's memory) are the
/// page cache's, also while only one process uses them; `Private_Clean` and, of files in memory, `Private_Dirty` would count them.
fn sum(smaps: impl BufRead, guest: &[(u64, u64)]) -> io::Result<(u64, u64)> {
    let (mut all, mut own) = (0, 0);
    let mut is_guest = false;
    for line in smaps.lines() {
        let line = line?;
        let Some((first, rest)) = line.split_once(' ') else { continue };
        if let Some(start) = mapping_start(first) {
            is_guest = guest.iter().any(|(from, to)| (*from..*to).contains(&start));
        } else if first == "Anonymous:" {
            let kib: u64 = rest.trim().trim_end_matches(" kB").parse().map_err(io::Error::other)?;
            all += kib;
            own += if is_guest { 0 } else { kib };
        }
    }
    Ok((all, own))
}

/// The start of a mapping's `start-end`, both hexadecimal.
fn mapping_start(range: &str) -> Option<u64> {
    let (start, end) = range.split_once('-')?;
    u64::from_str_radix(end, 16).ok()?;
    u64::from_str_radix(start, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_process_own() {
        let smaps = "\
55d0-55e0 r-xp 00000000 fe:01 1 /bin/sliver-vmm
Size:                 64 kB
Private_Clean:        12 kB
Private_Dirty:         8 kB
Anonymous:             4 kB
VmFlags: rd ex mr
7f0000000000-7f0004000000 rw-p 00000000 00:00 0
Private_Dirty:      3000 kB
Anonymous:          1000 kB
";
        let guest = [(0x7f00_0000_0000, 0x7f00_0400_0000)];
        assert_eq!(sum(smaps.as_bytes(), &guest).unwrap(), (1004, 4));
        assert_eq!(sum(smaps.as_bytes(), &[]).unwrap(), (1004, 1004));
        assert!(sum("Anonymous: many kB\n".as_bytes(), &[]).is_err());
    }

    #[test]
    fn this_process_has_memory_of_its_own_as_often_as_asked() {
        let private = PrivateMemory::open().unwrap();
        for _ in 0..2 {
            let (all, own) = private.measure(&[]).unwrap();
            assert!(all > 0 && all == own);
        }
    }
}
