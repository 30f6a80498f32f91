//! The only place that talks to KVM about the machine as a whole: memory slots, the in-kernel interrupt controllers, irqfds, ioeventfds,
//! and processors ready to run.
//!
//! Invariant: memory given to the guest stays mapped for as long as the KVM machine exists, because [`Vm`] owns both.

use std::io;
use std::path::Path;

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_cpuid_entry2, kvm_irqchip, kvm_pit_config,
    kvm_pit_state2, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::cpuid;
use crate::layout;
use crate::mapping::ReadOnlyMapping;
use crate::snapshot::codec::{Reader, Refusal, Writer};
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
    /// A model-specific register of a snapshot does not fit this host.
    #[error(
        "KVM refuses the value {value:#x} for the model-specific register {index:#x}; boot the machine afresh"
    )]
    Msr {
        /// Which register.
        index: u32,
        /// What the snapshot has.
        value: u64,
    },
    /// A snapshot is of another processor.
    #[error("this processor cannot go on with the snapshot: {message}; boot the machine afresh")]
    OtherCpu {
        /// Why not.
        message: String,
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

/// Turns what KVM answered to `what` into an error.
pub(crate) fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |error| VmError::Refused { what, source: io::Error::from_raw_os_error(error.errno()) }
}

/// Opens `/dev/kvm`, and warns if it may not be able to run Linux.
pub fn open_kvm() -> Result<Kvm, VmError> {
    let kvm = Kvm::new().map_err(|error| VmError::NoKvm(io::Error::from_raw_os_error(error.errno())))?;
    if !Path::new("/sys/module/kvm_amd").exists() && !Path::new("/sys/module/kvm_intel").exists() {
        eprintln!(
            "sliver-vmm: warning: /dev/kvm exists without kvm_amd or kvm_intel; such a KVM may not run Linux"
        );
    }
    Ok(kvm)
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
    pub fn new(kvm: Kvm, memory: Memory) -> Result<Self, VmError> {
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

    /// Processors `0..count` with nothing in them yet, and with the CPUID of this host or of a snapshot: see [`Vm::cpuid_for`].
    pub fn create_vcpus(&self, count: u8, cpuid: &CpuId) -> Result<Vec<VcpuFd>, VmError> {
        let most = self.kvm.get_max_vcpus().min(usize::from(layout::MAX_VCPUS));
        if usize::from(count) > most {
            return Err(VmError::TooManyVcpus { wanted: count, most });
        }
        let tsc_deadline = self.fd.check_extension(Cap::TscDeadlineTimer);
        let mut cpuid = cpuid.clone();
        (0..count)
            .map(|id| {
                let vcpu = self.fd.create_vcpu(u64::from(id)).map_err(refused("a processor"))?;
                cpuid::adapt(&mut cpuid, id, count, tsc_deadline);
                vcpu.set_cpuid2(&cpuid).map_err(refused("CPUID"))?;
                Ok(vcpu)
            })
            .collect()
    }

    /// The CPUID for a guest that boots.
    pub fn supported_cpuid(&self) -> Result<CpuId, VmError> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("to tell its CPUID"))
    }

    /// The CPUID for a guest of `count` processors that saw `seen` on the first of them, if this host has all of that.
    pub fn cpuid_for(&self, seen: &[kvm_cpuid_entry2], count: u8) -> Result<CpuId, VmError> {
        let mut host = self.supported_cpuid()?;
        cpuid::adapt(&mut host, 0, count, self.fd.check_extension(Cap::TscDeadlineTimer));
        if let Some(message) = cpuid::missing(seen, host.as_slice()) {
            return Err(VmError::OtherCpu { message });
        }
        CpuId::from_entries(seen)
            .map_err(|error| VmError::Refused { what: "a snapshot's CPUID", source: io::Error::other(error) })
    }

    /// Indices of the model-specific registers that a snapshot must hold.
    pub fn msrs_to_save(&self) -> Result<Vec<u32>, VmError> {
        let list = self.kvm.get_msr_index_list().map_err(refused("to list model-specific registers"))?;
        Ok(list.as_slice().to_vec())
    }

    /// The state of what all processors share. They must not be running.
    pub fn save(&self) -> Result<VmState, VmError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).map_err(refused("to tell an interrupt controller's state"))?;
            Ok(chip)
        };
        Ok(VmState {
            irqchips: [
                chip(KVM_IRQCHIP_PIC_MASTER)?,
                chip(KVM_IRQCHIP_PIC_SLAVE)?,
                chip(KVM_IRQCHIP_IOAPIC)?,
            ],
            pit: self.fd.get_pit2().map_err(refused("to tell the timer's state"))?,
            clock: self.fd.get_clock().map_err(refused("to tell the clock"))?,
        })
    }

    /// Takes back what [`Vm::save`] gave, after the processors' state.
    pub fn restore(&self, state: &VmState) -> Result<(), VmError> {
        for (chip_id, chip) in (KVM_IRQCHIP_PIC_MASTER..).zip(&state.irqchips) {
            let chip = kvm_irqchip { chip_id, ..*chip };
            self.fd.set_irqchip(&chip).map_err(refused("an interrupt controller's saved state"))?;
        }
        self.fd.set_pit2(&state.pit).map_err(refused("the timer's saved state"))?;
        // Not KVM_CLOCK_REALTIME: the guest's monotonic clock goes on where it stopped, so that the time it was saved for
        // ends none of its connections.
        let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
        self.fd.set_clock(&clock).map_err(refused("the saved clock"))
    }
}

/// What all processors share: interrupt controllers, timer, clock.
pub struct VmState {
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

impl VmState {
    /// Appends it to a state file.
    pub fn write(&self, to: &mut Writer) {
        self.irqchips.iter().for_each(|chip| to.plain(chip));
        to.plain(&self.pit);
        to.plain(&self.clock);
    }

    /// Reads what [`VmState::write`] wrote.
    pub fn read(from: &mut Reader<'_>) -> Result<Self, Refusal> {
        let irqchips = [from.plain()?, from.plain()?, from.plain()?];
        Ok(Self { irqchips, pit: from.plain()?, clock: from.plain()? })
    }
}

/// Lets the processor count time as a snapshot's did, at `khz`. A host that calibrated itself a little differently since is near enough.
pub fn set_tsc_khz(vcpu: &VcpuFd, khz: u32) -> Result<(), VmError> {
    const TOLERANCE_PPM: u64 = 250; // KVM's own
    let host = vcpu.get_tsc_khz().map_err(refused("to tell the TSC's frequency"))?;
    if u64::from(host.abs_diff(khz)) * 1_000_000 <= u64::from(host) * TOLERANCE_PPM {
        return Ok(());
    }
    vcpu.set_tsc_khz(khz).map_err(|_| VmError::OtherCpu {
        message: format!(
            "its time-stamp counter runs at {host} kHz, not at {khz} kHz, and it cannot scale it"
        ),
    })
}

/// Makes new processors what a guest that boots expects: the first begins at the PVH entry `entry`, the others wait for it to wake them.
pub fn prepare_boot(vcpus: &[VcpuFd], entry: GuestAddress) -> Result<(), VmError> {
    if let Some(first) = vcpus.first() {
        start_at(first, entry)?;
    }
    vcpus.iter().try_for_each(wire_local_interrupts)
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
