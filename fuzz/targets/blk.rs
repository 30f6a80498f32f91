//! See `commonage_vmm::fuzz::blk`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| commonage_vmm::fuzz::blk(input));
