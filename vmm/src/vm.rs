//! The only place that talks to KVM about the machine as a whole: memory slots, the in-kernel interrupt controllers, irqfds, ioeventfds,
//! and processors ready to run.
//!
//! Invariant: memory given to the guest stays mapped for as long as the KVM machine exists, because [`Vm`] owns both.

use std::io;
use std::path::Path;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_regs,
    kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use crate::mapping::ReadOnlyMapping;
use crate::virtio::Memory;

/// What KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No KVM at all.
    #[error(
        "cannot open /dev/kvm: {0}; load kvm-amd or kvm-intel, switch virtualisation on in the firmware, and run as a user who may open it"
    )]
    NoKvm(io::Error),
    /// A call failed.
    #[error("KVM refuses {what}: {source}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// KVM's answer.
        source: io::Error,
    },
    /// Too many processors.
    #[error("{wanted} virtual processors asked for, KVM here gives at most {most}")]
    TooManyVcpus {
        /// Asked for.
        wanted: u8,
        /// Permitted.
        most: usize,
    },
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |error| VmError::Refused { what, source: io::Error::from_raw_os_error(error.errno()) }
}

/// A KVM machine and the memory its guest sees.
pub struct Vm {
    // Dropped first: the guest must lose its view of the memory before the memory goes.
    fd: VmFd,
    kvm: Kvm,
    memory: Memory,
    read_only: Vec<ReadOnlyMapping>,
}

impl Vm {
    /// A machine with `memory` at its addresses, interrupt controllers and a timer, and no processor yet.
    pub fn new(memory: Memory) -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(|error| VmError::NoKvm(io::Error::from_raw_os_error(error.errno())))?;
        if !Path::new("/sys/module/kvm_amd").exists() && !Path::new("/sys/module/kvm_intel").exists() {
            eprintln!(
                "sliver-vmm: warning: /dev/kvm exists without kvm_amd or kvm_intel; such a KVM may not run Linux"
            );
        }
        let fd = kvm.create_vm().map_err(refused("to create a machine"))?;
        fd.set_tss_address(layout::KVM_TSS).map_err(refused("the task state segment's address"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(refused("the identity map's address"))?;
        fd.create_irq_chip().map_err(refused("interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(refused("a timer"))?;
        for (slot, region) in memory.iter().enumerate() {
            let at = region.get_host_address(MemoryRegionAddress(0)).map_err(|error| VmError::Refused {
                what: "guest memory",
                source: io::Error::other(error),
            })?;
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: at as u64,
            };
            // SAFETY: the range is a live mapping of that size, owned by `memory`, which `Vm` keeps until after `fd` is closed. The
            // guest may change it at any time; all access on this side is by vm-memory's volatile accessors.
            unsafe { fd.set_user_memory_region(slot) }.map_err(refused("guest memory"))?;
        }
        Ok(Self { fd, kvm, memory, read_only: Vec::new() })
    }

    /// Guest memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Shows `mapping` to the guest at `start`, read-only.
    pub fn add_read_only(&mut self, start: GuestAddress, mapping: ReadOnlyMapping) -> Result<(), VmError> {
        let slot = kvm_userspace_memory_region {
            slot: (self.memory.num_regions() + self.read_only.len()) as u32,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: start.0,
            memory_size: mapping.len() as u64,
            userspace_addr: mapping.address() as u64,
        };
        // SAFETY: the range is a live mapping of that size, kept in `read_only` until after `fd` is closed; the slot is read-only, so
        // the guest cannot write through it.
        unsafe { self.fd.set_user_memory_region(slot) }.map_err(refused("read-only memory"))?;
        self.read_only.push(mapping);
        Ok(())
    }

    /// From now on a write to `event` is a pulse on interrupt line `line`.
    pub fn connect_interrupt(&self, event: &EventFd, line: u32) -> Result<(), VmError> {
        self.fd.register_irqfd(event, line).map_err(refused("an irqfd"))
    }

    /// From now on a guest's 32-bit write of `value` at `address` is a write to `event`, without leaving the kernel.
    pub fn connect_write(&self, event: &EventFd, address: u64, value: u32) -> Result<(), VmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(refused("an ioeventfd"))
    }

    /// Processors `0..count`; the first begins at the PVH entry `entry`, the others wait for it to wake them.
    pub fn create_vcpus(&self, count: u8, entry: GuestAddress) -> Result<Vec<VcpuFd>, VmError> {
        let most = self.kvm.get_max_vcpus().min(usize::from(layout::MAX_VCPUS));
        if usize::from(count) > most {
            return Err(VmError::TooManyVcpus { wanted: count, most });
        }
        let supported =
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("to tell its CPUID"))?;
        let tsc_deadline = self.fd.check_extension(Cap::TscDeadlineTimer);
        (0..count)
            .map(|id| {
                let vcpu = self.fd.create_vcpu(u64::from(id)).map_err(refused("a processor"))?;
                let mut cpuid = supported.clone();
                adapt_cpuid(&mut cpuid, id, count, tsc_deadline);
                vcpu.set_cpuid2(&cpuid).map_err(refused("CPUID"))?;
                if id == 0 {
                    start_at(&vcpu, entry)?;
                }
                wire_local_interrupts(&vcpu)?;
                Ok(vcpu)
            })
            .collect()
    }
}

/// Makes the host's CPUID that of processor `id` of `count`.
///
/// "Hypervisor present" lets the guest find kvm-clock, and the TSC deadline timer lets it sleep without a tick: without these two
/// bits every idle guest wakes 250 times a second.
fn adapt_cpuid(cpuid: &mut CpuId, id: u8, count: u8, tsc_deadline: bool) {
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const HYPER_THREADING: u32 = 1 << 28;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                entry.ecx |= HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                entry.ebx = entry.ebx & 0x0000_ffff | u32::from(count) << 16 | u32::from(id) << 24;
                if count > 1 {
                    entry.edx |= HYPER_THREADING;
                } else {
                    entry.edx &= !HYPER_THREADING;
                }
            }
            // Extended topology: one thread a core, all cores in one package.
            0xb | 0x1f => {
                entry.edx = u32::from(id);
                match entry.index {
                    0 => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 1 << 8),
                    1 => (entry.eax, entry.ebx, entry.ecx) = (8, u32::from(count), 2 << 8 | 1),
                    index => (entry.eax, entry.ebx, entry.ecx) = (0, 0, index),
                }
            }
            _ => {}
        }
    }
}

/// The PVH entry state: 32-bit protected mode without paging, flat segments, EBX = start info.
fn start_at(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), VmError> {
    const PROTECTED_MODE: u64 = 1;
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x08,
        type_: 11, // execute, read, accessed
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x10, type_: 3, ..code }; // read, write, accessed
    let task = kvm_segment { limit: 0x67, selector: 0x18, type_: 11, present: 1, ..Default::default() };
    let mut sregs = vcpu.get_sregs().map_err(refused("to tell a processor's state"))?;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    sregs.cr0 = PROTECTED_MODE;
    (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0, 0);
    vcpu.set_sregs(&sregs).map_err(refused("a processor's state"))?;
    let regs = kvm_regs { rip: entry.0, rbx: layout::START_INFO.0, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(refused("a processor's registers"))
}

/// LINT0 takes the PIC's interrupts, LINT1 is NMI: what firmware leaves behind and the MP table says.
fn wire_local_interrupts(vcpu: &VcpuFd) -> Result<(), VmError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const DELIVERY_MODE_SHIFT: u8 = 8;
    const EXT_INT: u8 = 7;
    const NMI: u8 = 4;
    let mut lapic = vcpu.get_lapic().map_err(refused("to tell a local APIC's state"))?;
    for (register, mode) in [(LVT_LINT0, EXT_INT), (LVT_LINT1, NMI)] {
        // Delivery mode is bits 8 to 10: the low bits of the second byte.
        if let Some(byte) = lapic.regs.get_mut(register + usize::from(DELIVERY_MODE_SHIFT) / 8) {
            *byte = (*byte as u8 & !7 | mode) as _;
        }
    }
    vcpu.set_lapic(&lapic).map_err(refused("a local APIC's state"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    #[test]
    fn cpuid_says_hypervisor_and_tsc_deadline() {
        let leaf = kvm_cpuid_entry2 { function: 1, edx: 1 << 28, ebx: 0x1234_0800, ..Default::default() };
        let mut cpuid = CpuId::from_entries(&[leaf]).unwrap();
        adapt_cpuid(&mut cpuid, 0, 1, true);
        let leaf = cpuid.as_slice()[0];
        assert_eq!(leaf.ecx >> 31, 1);
        assert_eq!(leaf.ecx >> 24 & 1, 1);
        assert_eq!(leaf.edx >> 28 & 1, 0);
        assert_eq!(leaf.ebx, 0x0001_0800);
        adapt_cpuid(&mut cpuid, 3, 4, false);
        assert_eq!(cpuid.as_slice()[0].ebx, 0x0304_0800);
    }
}
