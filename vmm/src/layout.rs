//! The guest's physical address space and interrupt lines: who lives where. All addresses and sizes in bytes.
//!
//! ```text
//!           0 ┌────────────────────────┐
//!             │ RAM: boot structures   │  start_info, memory map, command line, page 0
//!      0x9fc00│ MP table (1 KiB)       │  not RAM for the guest
//!     0x100000│ RAM: kernel … initrd   │  the initrd ends where low RAM ends
//!       3 GiB ├────────────────────────┤
//!             │ nothing                │
//!  0xd000_0000│ virtio-mmio pages      │  4 KiB each
//!  0xfec0_0000│ I/O APIC, local APIC   │  in KVM
//!  0xfffb_c000│ KVM's own pages        │
//!       4 GiB ├────────────────────────┤
//!             │ RAM beyond 3 GiB       │
//!             ├────────────────────────┤  next multiple of 1 GiB
//!             │ pmem: the base image   │  read-only
//!             └────────────────────────┘
//! ```
#![forbid(unsafe_code)]

use vm_memory::GuestAddress;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// Least guest memory: less does not boot a sliver kernel.
pub const MIN_MEMORY_MIB: u32 = 32;
/// Most guest memory: one process's worth on any machine lent to the testbed.
pub const MAX_MEMORY_MIB: u32 = 256 * 1024;
/// Most virtual processors: what is tested. The MP table's 1 KiB would hold more.
pub const MAX_VCPUS: u8 = 8;

/// PVH `hvm_start_info`.
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
/// PVH module list.
pub const MODULE_LIST: GuestAddress = GuestAddress(0x6100);
/// PVH memory map.
pub const MEMORY_MAP: GuestAddress = GuestAddress(0x6200);
/// Kernel command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line, with its terminating zero: COMMAND_LINE_SIZE of x86 Linux.
pub const COMMAND_LINE_MAX: usize = 2048;
/// The MP table, at the last kibibyte of base memory, where an operating system looks for it.
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// Size of the area reserved for the MP table.
pub const MP_TABLE_MAX: usize = 1024;
/// Where the kernel may begin.
pub const HIGH_RAM: GuestAddress = GuestAddress(MIB);

/// End of low RAM, at most.
pub const GAP_START: u64 = 3 * GIB;
/// Start of high RAM.
pub const GAP_END: u64 = 4 * GIB;

/// The first virtio-mmio page.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Size of a virtio-mmio page.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Interrupt line of the first virtio device. 0–4 are the timer, the keyboard, the cascade and the serial ports.
pub const VIRTIO_IRQ: u32 = 5;
/// Input pins of the I/O APIC.
pub const IO_APIC_PINS: u32 = 24;
/// Most virtio devices: one interrupt line each.
pub const VIRTIO_DEVICES_MAX: usize = (IO_APIC_PINS - VIRTIO_IRQ) as usize;
/// I/O APIC registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// Page for KVM's identity map (Intel, real mode).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's task state segment (Intel, real mode).
pub const KVM_TSS: usize = 0xfffb_d000;

/// First serial port.
pub const COM1: u16 = 0x3f8;
/// Interrupt line of the first serial port.
pub const COM1_IRQ: u32 = 4;
/// Keyboard controller, data register.
pub const I8042_DATA: u16 = 0x60;
/// Keyboard controller, command and status register.
pub const I8042_COMMAND: u16 = 0x64;

/// Alignment of pmem, and of its size: what the guest kernel maps in one piece.
pub const PMEM_ALIGN: u64 = 2 * MIB;

/// RAM as (start, length) for `memory_mib` MiB: one range, or two around the gap.
pub fn ram_ranges(memory_mib: u32) -> Vec<(GuestAddress, u64)> {
    let size = u64::from(memory_mib) * MIB;
    if size <= GAP_START {
        vec![(GuestAddress(0), size)]
    } else {
        vec![(GuestAddress(0), GAP_START), (GuestAddress(GAP_END), size - GAP_START)]
    }
}

/// End of low RAM for `memory_mib` MiB.
pub fn low_ram_end(memory_mib: u32) -> u64 {
    (u64::from(memory_mib) * MIB).min(GAP_START)
}

/// Where pmem goes for `memory_mib` MiB of RAM: above all RAM and above the gap.
pub fn pmem_start(memory_mib: u32) -> GuestAddress {
    let end = (u64::from(memory_mib) * MIB).saturating_sub(GAP_START) + GAP_END;
    GuestAddress(end.next_multiple_of(GIB))
}

/// Address of the `index`th virtio-mmio page.
pub fn virtio_mmio(index: usize) -> u64 {
    VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_SIZE
}

/// Interrupt line of the `index`th virtio device.
pub fn virtio_irq(index: usize) -> u32 {
    VIRTIO_IRQ + index as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_gap() {
        assert_eq!(ram_ranges(64), vec![(GuestAddress(0), 64 * MIB)]);
        assert_eq!(ram_ranges(3072), vec![(GuestAddress(0), 3 * GIB)]);
        assert_eq!(ram_ranges(5120), vec![(GuestAddress(0), 3 * GIB), (GuestAddress(4 * GIB), 2 * GIB)]);
    }

    #[test]
    fn pmem_is_above_all_ram() {
        assert_eq!(pmem_start(64).0, 4 * GIB);
        assert_eq!(pmem_start(3072).0, 4 * GIB);
        assert_eq!(pmem_start(5120).0, 6 * GIB);
        assert_eq!(pmem_start(5121).0, 7 * GIB);
    }

    #[test]
    fn virtio_lines_fit_the_io_apic() {
        assert!(virtio_irq(VIRTIO_DEVICES_MAX - 1) < IO_APIC_PINS);
        assert!(virtio_mmio(VIRTIO_DEVICES_MAX) < u64::from(IO_APIC));
    }
}
