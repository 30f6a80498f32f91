//! The memory balloon (virtio 1.2, section 5.5): takes memory from the guest when told to, gets statistics, and hears of free pages, which go
//! back to the host.
//!
//! ```text
//!  queue 0 inflate    page numbers that the guest gave away        ─► given back to the host
//!        1 deflate    page numbers that it takes back              ─► nothing to do: a touched page appears
//!        2 statistics one buffer, kept until fresh numbers are wanted
//!        3 reporting  ranges of pages that lie free                ─► given back to the host
//! ```
//!
//! A queue whose feature was not negotiated does not exist, and those behind it move up: drivers count so.
//!
//! Whatever page a driver names is at most its own loss: only pages of guest memory are given back, and what reads there afterwards is zeroes or the
//! guest's own content of earlier ([`crate::reclaim`]). VIRTIO_BALLOON_F_PAGE_POISON is not offered, so a kernel that counts on what it
//! left in a free page does not report any.
//!
//! The device never wakes an idle guest: the guest is interrupted when the target changes and when somebody asks for metrics.
#![forbid(unsafe_code)]

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::QueueT;
use vm_memory::GuestAddress;

use super::segments::{Segments, split};
use super::{Active, Chain, DeviceError, Memory, VirtioDevice, pop, read_config_from};
use crate::reclaim;

/// Feature bit: a queue for statistics.
const STATS_VQ: u32 = 1;
/// Feature bit: a guest short of memory takes pages back by itself.
const DEFLATE_ON_OOM: u32 = 2;
/// Feature bit: a queue for free pages.
const PAGE_REPORTING: u32 = 5;

/// Linux reports up to 32 ranges in one chain and needs room for them.
const QUEUE_SIZES: [u16; 4] = [16, 16, 16, 32];
/// Pages as the standard counts them, bytes.
const PAGE: u64 = 4096;
const PAGES_PER_MIB: u32 = 256;
/// Most page numbers heeded in one chain; Linux sends 256.
const MOST_PAGES: usize = 1024;
/// A page number, bytes.
const NUMBER: usize = 4;
/// Most statistics heeded; the standard knows 16.
const MOST_STATISTICS: usize = 32;
/// Most statistics buffers heeded at a time.
const MOST_BUFFERS: usize = 32;
/// A statistic: a tag of 16 bits, a value of 64.
const STATISTIC: usize = 10;
/// Tag: memory that is not used at all, bytes.
const MEMORY_FREE: u16 = 4;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// What queue number `queue` is for, if `has` tells which features were negotiated.
fn role(queue: usize, has: impl Fn(u32) -> bool) -> Option<Role> {
    let optional = [(STATS_VQ, Role::Statistics), (PAGE_REPORTING, Role::Reporting)];
    let optional = optional.into_iter().filter(|(feature, _)| has(*feature)).map(|(_, role)| role);
    [Role::Inflate, Role::Deflate].into_iter().chain(optional).nth(queue)
}

/// The balloon.
pub struct Balloon {
    memory_mib: u32,
    /// Pages that the guest is asked to give away.
    target: u32,
    /// Pages that it says it gave away.
    actual: u32,
    /// The statistics buffer, while it is kept.
    kept: Option<u16>,
    free_kib: Option<u64>,
    reported_bytes: u64,
    active: Option<Active>,
}

impl Balloon {
    /// An empty balloon in a machine of `memory_mib` MiB.
    pub fn new(memory_mib: u32) -> Self {
        Self { memory_mib, target: 0, actual: 0, kept: None, free_kib: None, reported_bytes: 0, active: None }
    }

    /// Asks the guest to leave itself this much memory, MiB: all of it if there is no more.
    pub fn leave(&mut self, guest_memory_mib: u32) {
        let target = self.memory_mib.saturating_sub(guest_memory_mib).saturating_mul(PAGES_PER_MIB);
        if target != self.target {
            self.target = target;
            if let Some(active) = &self.active {
                active.interrupt.signal_config_change();
            }
        }
    }

    /// Memory in the balloon (MiB), memory that the guest last said was free (KiB), free pages taken back since the start (KiB). Asks the guest
    /// for fresh numbers, for the next time.
    pub fn metrics(&mut self) -> (u32, Option<u64>, u64) {
        if let (Some(head), Some(active)) = (self.kept.take(), &mut self.active) {
            let statistics = (0..QUEUE_SIZES.len())
                .find(|queue| role(*queue, |bit| active.has_feature(bit)) == Some(Role::Statistics));
            if let Some(queue) = statistics {
                // A broken ring shows itself to the next call that can say so.
                let _ = active.add_used(queue, head, 0).and_then(|()| active.signal_used(queue));
            }
        }
        (self.actual / PAGES_PER_MIB, self.free_kib, self.reported_bytes / 1024)
    }

    fn config(&self) -> [u8; 8] {
        let mut config = [0; 8];
        let (target, actual) = config.split_at_mut(4);
        target.copy_from_slice(&self.target.to_le_bytes());
        actual.copy_from_slice(&self.actual.to_le_bytes());
        config
    }

    /// Takes what the statistics queue has: numbers, to be kept until fresh ones are wanted.
    fn take_statistics(&mut self, queue: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        // A driver has one buffer. One that has more gets them back, but not for ever.
        for _ in 0..MOST_BUFFERS {
            let Some(chain) = pop(&mut active.queues, &active.memory, queue)? else {
                let broken = |source| DeviceError::Queue { queue, source };
                let ring = active.queues.get_mut(queue).filter(|ring| ring.ready());
                match ring.map(|ring| ring.enable_notification(&active.memory)).transpose().map_err(broken)? {
                    // The driver was quicker.
                    Some(true) => continue,
                    _ => break,
                }
            };
            let head = chain.head_index();
            if let Some(free) = free_memory(&active.memory, chain) {
                self.free_kib = Some(free / 1024);
            }
            if let Some(earlier) = self.kept.replace(head) {
                active.add_used(queue, earlier, 0)?;
            }
        }
        Ok(())
    }
}

/// Gives the pages whose numbers a chain holds back to the host.
fn inflate(memory: &Memory, chain: Chain<'_>) -> u32 {
    let Ok((numbers, _)) = split(chain) else { return 0 };
    for (start, pages) in runs(page_numbers(memory, &numbers)) {
        reclaim::give_back(memory, GuestAddress(u64::from(start) * PAGE), u64::from(pages) * PAGE);
    }
    0
}

fn page_numbers(memory: &Memory, numbers: &Segments) -> Vec<u32> {
    let most = numbers.len().min((MOST_PAGES * NUMBER) as u64) as usize;
    let mut bytes = vec![0; most];
    let read = numbers.read(memory, &mut bytes).unwrap_or(0);
    let words = bytes.get(..read).unwrap_or(&[]).as_chunks::<NUMBER>().0;
    words.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

/// Page numbers as runs: (first page, pages). Each page is in one run.
fn runs(mut pages: Vec<u32>) -> Vec<(u32, u32)> {
    pages.sort_unstable();
    pages.dedup();
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some((start, count)) if start.checked_add(*count) == Some(page) => *count += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

/// Gives the ranges of a chain, which the driver says are free, back to the host. Returns how many bytes that were.
fn take_reported(memory: &Memory, chain: Chain<'_>) -> u64 {
    let Ok((_, ranges)) = split(chain) else { return 0 };
    ranges.ranges().map(|(start, len)| reclaim::give_back(memory, start, len as u64)).sum()
}

/// Free memory among the statistics in a chain, bytes.
fn free_memory(memory: &Memory, chain: Chain<'_>) -> Option<u64> {
    let (statistics, _) = split(chain).ok()?;
    let mut bytes = [0; MOST_STATISTICS * STATISTIC];
    let read = statistics.read(memory, &mut bytes)?;
    let entries = bytes.get(..read)?.as_chunks::<STATISTIC>().0;
    entries.iter().find_map(|[t0, t1, value @ ..]| {
        (u16::from_le_bytes([*t0, *t1]) == MEMORY_FREE).then(|| u64::from_le_bytes(*value))
    })
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << STATS_VQ | 1 << DEFLATE_ON_OOM | 1 << PAGE_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_from(&self.config(), offset, data);
    }

    /// The driver tells how many pages are in the balloon; nothing else can be written.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(word)) = (offset, data.try_into()) {
            self.actual = u32::from_le_bytes(word);
        }
    }

    fn activate(&mut self, active: Active) -> Result<(), DeviceError> {
        self.active = Some(active);
        Ok(())
    }

    fn active(&mut self) -> Option<&mut Active> {
        self.active.as_mut()
    }

    /// Target, actual, and the statistics buffer that is kept: (1, head) or (0, 0).
    fn save(&self) -> Vec<u8> {
        let kept = self.kept.map_or([0, 0], |head| [1, head]);
        [&self.config()[..], &kept[0].to_le_bytes(), &kept[1].to_le_bytes()].concat()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        if let Ok([t0, t1, t2, t3, a0, a1, a2, a3, kept, _, h0, h1]) = <[u8; 12]>::try_from(state) {
            self.target = u32::from_le_bytes([t0, t1, t2, t3]);
            self.actual = u32::from_le_bytes([a0, a1, a2, a3]);
            self.kept = (kept == 1).then(|| u16::from_le_bytes([h0, h1]));
        }
        Ok(())
    }

    fn reset(&mut self) {
        // The target is the host's and stays. A driver that starts begins with an empty balloon.
        self.actual = 0;
        self.kept = None;
        self.active = None;
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        let Self { active: Some(active), reported_bytes, .. } = self else { return Ok(()) };
        match role(queue, |bit| active.has_feature(bit)) {
            Some(Role::Inflate) => active.drain(queue, inflate),
            Some(Role::Deflate) => active.drain(queue, |_, _| 0),
            Some(Role::Statistics) => self.take_statistics(queue),
            Some(Role::Reporting) => active.drain(queue, |memory, chain| {
                *reported_bytes = reported_bytes.saturating_add(take_reported(memory, chain));
                0
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
#[path = "balloon_test.rs"]
mod tests;
