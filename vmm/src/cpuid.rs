//! What processor a guest sees: the host's CPUID made that of one of the machine's processors, and whether this host can go on with a
//! guest that saw another's.
#![forbid(unsafe_code)]

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1.
const FEATURES: u32 = 0x1;
/// Leaf 7.
const MORE_FEATURES: u32 = 0x7;
/// AMD's leaf 1.
const EXTENDED_FEATURES: u32 = 0x8000_0001;

const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HYPER_THREADING: u32 = 1 << 28;
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
const OSXSAVE: u32 = 1 << 27;
const MWAIT: u32 = 1 << 3;
const OSPKE: u32 = 1 << 4;

/// Makes the host's CPUID, or a snapshot's, that of processor `id` of `count`.
///
/// * "Hypervisor present" lets the guest find kvm-clock, and the TSC deadline timer lets it sleep without a tick: without these two
///   bits every idle guest wakes 250 times a second.
/// * Virtualisation is hidden: a guest of the guest would be state that no snapshot holds, and the host's nested KVM is much to attack.
pub fn adapt(cpuid: &mut CpuId, id: u8, count: u8, tsc_deadline: bool) {
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            FEATURES => {
                entry.ecx = (entry.ecx | HYPERVISOR) & !VMX;
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
            EXTENDED_FEATURES => entry.ecx &= !SVM,
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

/// Registers whose bits each say that the processor, or KVM, can do something: leaf, index, and for EAX to EDX the bits that count. Those
/// left out mirror what the guest itself has switched on.
const FEATURE_REGISTERS: [(u32, u32, [u32; 4]); 10] = [
    (FEATURES, 0, [0, 0, !(OSXSAVE | MWAIT), !0]),
    (MORE_FEATURES, 0, [0, !0, !OSPKE, !0]),
    (MORE_FEATURES, 1, [!0, !0, !0, !0]),
    (0xd, 0, [!0, 0, 0, !0]),
    (0xd, 1, [!0, 0, !0, !0]),
    (EXTENDED_FEATURES, 0, [0, 0, !0, !0]),
    (0x8000_0007, 0, [0, 0, 0, !0]),
    (0x8000_0008, 0, [0, !0, 0, 0]),
    (0x8000_0021, 0, [!0, 0, 0, 0]),
    (0x4000_0001, 0, [!0, 0, 0, 0]),
];
const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

fn find(cpuid: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<[u32; 4]> {
    let entry = cpuid.iter().find(|entry| entry.function == function && entry.index == index)?;
    Some([entry.eax, entry.ebx, entry.ecx, entry.edx])
}

/// What `host` lacks of what a guest was told by `seen`, if anything. Both as [`adapt`]ed.
pub fn missing(seen: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Option<String> {
    let vendor =
        |cpuid| find(cpuid, 0, 0).map(|[_, ebx, ecx, edx]| [ebx, edx, ecx].map(u32::to_le_bytes).concat());
    let name = |vendor: Option<Vec<u8>>| String::from_utf8_lossy(&vendor.unwrap_or_default()).into_owned();
    let (was, is) = (vendor(seen), vendor(host));
    if was != is {
        return Some(format!("it is of {}, not of {}", name(is), name(was)));
    }
    for (function, index, counts) in FEATURE_REGISTERS {
        let Some(was) = find(seen, function, index) else { continue };
        let is = find(host, function, index).unwrap_or_default();
        for (at, register) in REGISTERS.iter().enumerate() {
            let lacks = (was[at] & counts[at]) & !is[at];
            if lacks != 0 {
                let bit = lacks.trailing_zeros();
                return Some(format!(
                    "it lacks CPUID leaf {function:#x} index {index} {register} bit {bit}, which the guest was told it has"
                ));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn cpuid_says_hypervisor_and_tsc_deadline_and_hides_virtualisation() {
        let leaves = [leaf(1, 0x1234_0800, VMX, 1 << 28), leaf(0x8000_0001, 0, SVM | 1, 0)];
        let mut cpuid = CpuId::from_entries(&leaves).unwrap();
        adapt(&mut cpuid, 0, 1, true);
        let leaf = cpuid.as_slice()[0];
        assert_eq!(leaf.ecx, HYPERVISOR | TSC_DEADLINE);
        assert_eq!(leaf.edx >> 28 & 1, 0);
        assert_eq!(leaf.ebx, 0x0001_0800);
        assert_eq!(cpuid.as_slice()[1].ecx, 1);
        adapt(&mut cpuid, 3, 4, false);
        assert_eq!(cpuid.as_slice()[0].ebx, 0x0304_0800);
    }

    #[test]
    fn a_processor_that_lacks_a_feature_is_told_by_leaf_and_bit() {
        let seen = [leaf(0, 1, 2, 3), leaf(1, 0, 0b101 | OSXSAVE, 0), leaf(7, 1 << 16, 0, 0)];
        assert_eq!(missing(&seen, &seen), None);
        let more = [leaf(0, 1, 2, 3), leaf(1, 0, 0b111, 9), leaf(7, 3 << 16, 1, 1)];
        assert_eq!(missing(&seen, &more), None);
        let less = [leaf(0, 1, 2, 3), leaf(1, 0, 0b101, 0), leaf(7, 0, 0, 0)];
        assert!(missing(&seen, &less).unwrap().contains("leaf 0x7 index 0 EBX bit 16"));
        assert!(missing(&seen, &less[..2]).unwrap().contains("leaf 0x7"));
        let text = b"AuthenticAMD";
        let word = |at: usize| u32::from_le_bytes(text[at..at + 4].try_into().unwrap());
        let other = missing(&seen, &[leaf(0, word(0), word(8), word(4))]).unwrap();
        assert!(other.contains("it is of AuthenticAMD"), "{other}");
    }
}
