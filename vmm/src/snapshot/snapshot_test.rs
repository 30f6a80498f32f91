//! State files: what was written comes back, and whatever else is read is refused.

use super::*;
use proptest::prelude::*;

const CPUID: kvm_cpuid_entry2 =
    kvm_cpuid_entry2 { function: 1, index: 0, flags: 0, eax: 2, ebx: 3, ecx: 4, edx: 5, padding: [0; 3] };

/// A state with every field telling, made of bytes: the kernel's structures are as good with any content here.
fn state(vcpus: u8, base: bool, msrs: u32, serial: &[u8]) -> Vec<u8> {
    let mut body = Writer::default();
    body.raw(&[9; ID_LEN]);
    Shape { memory_mib: 64, vcpus, base: base.then_some((4096, 77)) }.write(&mut body);
    body.u64(0xabcd);
    body.plains(&[CPUID]);
    body.u32(2_400_000);
    for vcpu in 0..vcpus {
        let before = size_of::<kvm_bindings::kvm_mp_state>()
            + size_of::<kvm_bindings::kvm_regs>()
            + size_of::<kvm_bindings::kvm_sregs>()
            + size_of::<kvm_bindings::kvm_xsave>()
            + size_of::<kvm_bindings::kvm_xcrs>()
            + size_of::<kvm_bindings::kvm_debugregs>()
            + size_of::<kvm_bindings::kvm_lapic_state>();
        body.raw(&vec![vcpu + 1; before]);
        body.u32(msrs);
        body.raw(&vec![0x55; msrs as usize * size_of::<kvm_bindings::kvm_msr_entry>()]);
        body.raw(&vec![0x66; size_of::<kvm_bindings::kvm_vcpu_events>()]);
    }
    let shared = 3 * size_of::<kvm_bindings::kvm_irqchip>()
        + size_of::<kvm_bindings::kvm_pit_state2>()
        + size_of::<kvm_bindings::kvm_clock_data>();
    body.raw(&vec![0x77; shared]);
    body.blob(serial);
    body.u32(0);
    body.into_bytes()
}

fn refusal(body: &[u8]) -> Option<Refusal> {
    State::decode(&codec::seal(body)).err()
}

#[test]
fn a_state_comes_back_as_it_was_written() {
    for (vcpus, base) in [(1, true), (8, false)] {
        let body = state(vcpus, base, 40, b"serial");
        let file = codec::seal(&body);
        let state = State::decode(&file).unwrap();
        assert_eq!(state.shape, Shape { memory_mib: 64, vcpus, base: base.then_some((4096, 77)) });
        assert_eq!((state.memory_checksum, state.tsc_khz), (0xabcd, 2_400_000));
        assert_eq!((state.cpuid.as_slice(), state.serial.as_slice()), (&[CPUID][..], &b"serial"[..]));
        assert_eq!(state.encode(), file);
    }
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    assert_eq!(refusal(&state(0, false, 1, b"")), Some(Refusal::Nonsense("processors and memory")));
    assert_eq!(refusal(&state(9, false, 1, b"")), Some(Refusal::Nonsense("processors and memory")));
    assert_eq!(
        refusal(&state(1, false, 1, &vec![0; MAX_SERIAL + 1])),
        Some(Refusal::Nonsense("serial port"))
    );
    let longer = [&state(1, false, 1, b"")[..], b"x"].concat();
    assert_eq!(refusal(&longer), Some(Refusal::Nonsense("lengths")));
}

#[test]
fn another_machine_is_refused_with_what_differs() {
    let shape = Shape { memory_mib: 64, vcpus: 1, base: Some((4096, 1)) };
    shape.must_be(&shape.clone()).unwrap();
    let refused = |other: Shape| shape.must_be(&other).unwrap_err().to_string();
    assert!(
        refused(Shape { memory_mib: 65, ..shape.clone() }).contains("64 MiB of memory, this one has 65 MiB")
    );
    assert!(refused(Shape { vcpus: 2, ..shape.clone() }).contains("this one has 2 virtual processors"));
    assert!(refused(Shape { base: None, ..shape.clone() }).contains("no base image"));
    assert!(refused(Shape { base: Some((4096, 2)), ..shape.clone() }).contains("checksum 0000000000000002"));
}

proptest! {
    /// Behind the checksum, too, nothing is believed.
    #[test]
    fn any_body_is_read_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        at in any::<prop::sample::Index>(),
        keep in any::<bool>(),
    ) {
        let mut body = state(1, true, 3, b"abc");
        let at = at.index(body.len());
        if keep {
            let end = (at + bytes.len()).min(body.len());
            body[at..end].copy_from_slice(&bytes[..end - at]);
        } else {
            body.truncate(at);
            body.extend(bytes);
        }
        if let Ok(state) = State::decode(&codec::seal(&body)) {
            prop_assert_eq!(usize::from(state.shape.vcpus), state.vcpus.len());
        }
    }

    #[test]
    fn any_flipped_bit_and_any_truncation_of_a_file_is_refused(at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let file = codec::seal(&state(1, true, 3, b"abc"));
        let at = at.index(file.len());
        prop_assert!(State::decode(&file[..at]).is_err());
        let mut flipped = file;
        flipped[at] ^= 1 << bit;
        prop_assert!(State::decode(&flipped).is_err());
    }
}
