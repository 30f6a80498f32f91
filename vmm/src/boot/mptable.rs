//! The MP table (Intel MultiProcessor Specification 1.4): how a guest without ACPI learns of its processors and of the
//! I/O APIC. Without it the guest falls back to the PIC's 16 lines.
//!
//! A floating pointer structure, directly followed by the configuration table. All integers are little endian; each of the two
//! structures sums to zero modulo 256.
#![forbid(unsafe_code)]

use crate::layout;

const FLOATING_POINTER_SIZE: u32 = 16;
const HEADER_SIZE: usize = 44;
const VERSION_1_4: u8 = 4;
/// Version of the integrated local APIC.
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;

/// Entry types.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Interrupt types.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
const ALL_LOCAL_APICS: u8 = 0xff;

/// The table for `vcpus` processors, to be written at [`layout::MP_TABLE`].
pub fn table(vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        // Enabled; the first is the boot processor. Signature: family 6; features: FPU and APIC.
        let flags = 1 | if id == 0 { 2 } else { 0 };
        entry(&[
            PROCESSOR,
            id,
            APIC_VERSION,
            flags,
            0x00,
            0x06,
            0,
            0,
            0x01,
            0x02,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ]);
    }
    entry(&[BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let io_apic_id = vcpus;
    let at = layout::IO_APIC.to_le_bytes();
    entry(&[IO_APIC, io_apic_id, APIC_VERSION, 1, at[0], at[1], at[2], at[3]]);
    for pin in 0..layout::IO_APIC_PINS as u8 {
        // Flags 0: polarity and trigger conform to the bus, so for ISA edge triggered, as irqfd pulses.
        entry(&[IO_INTERRUPT, INT, 0, 0, ISA_BUS, pin, io_apic_id, pin]);
    }
    entry(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    entry(&[LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);

    let length = (HEADER_SIZE + entries.len()) as u16;
    let mut header = Vec::with_capacity(usize::from(length));
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&length.to_le_bytes());
    header.extend_from_slice(&[VERSION_1_4, 0]);
    header.extend_from_slice(b"COMMONAG");
    header.extend_from_slice(b"SLIVER      ");
    header.extend_from_slice(&[0; 6]); // OEM table: none
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]); // extended table: none
    debug_assert_eq!(header.len(), HEADER_SIZE);
    header.extend_from_slice(&entries);
    header[7] = checksum(&header);

    let at = (layout::MP_TABLE.0 as u32 + FLOATING_POINTER_SIZE).to_le_bytes();
    let mut table =
        vec![b'_', b'M', b'P', b'_', at[0], at[1], at[2], at[3], 1, VERSION_1_4, 0, 0, 0, 0, 0, 0];
    table[10] = checksum(&table);
    table.extend_from_slice(&header);
    table
}

/// The byte that makes the sum of `bytes` zero, given that its place holds zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    proptest! {
        #[test]
        fn both_structures_sum_to_zero_and_fit(vcpus in 1..=layout::MAX_VCPUS) {
            let table = table(vcpus);
            prop_assert!(table.len() <= layout::MP_TABLE_MAX);
            let (pointer, rest) = table.split_at(FLOATING_POINTER_SIZE as usize);
            prop_assert_eq!(sum(pointer), 0);
            prop_assert_eq!(sum(rest), 0);
            prop_assert_eq!(usize::from(u16::from_le_bytes([rest[4], rest[5]])), rest.len());
        }

        #[test]
        fn entries_are_as_many_as_announced(vcpus in 1..=layout::MAX_VCPUS) {
            let table = table(vcpus);
            let announced = u16::from_le_bytes([table[16 + 34], table[16 + 35]]);
            let (mut at, mut found) = (16 + HEADER_SIZE, 0);
            while at < table.len() {
                at += if table[at] == PROCESSOR { 20 } else { 8 };
                found += 1;
            }
            prop_assert_eq!(at, table.len());
            prop_assert_eq!(found, announced);
        }
    }
}
