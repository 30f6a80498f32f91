//! Guest memory written to a file and mapped from it, by machines and by machines of machines.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges")]

use super::*;
use std::os::unix::fs::MetadataExt;

const MIB: u32 = 32;
const ID: Id = [3; 16];

fn memory() -> Memory {
    Memory::from_ranges(&[(vm_memory::GuestAddress(0), (MIB as usize) << 20)]).unwrap()
}

fn at(page: u64) -> vm_memory::GuestAddress {
    vm_memory::GuestAddress(page * PAGE as u64)
}

fn save_all(memory: &Memory, pagemap: Option<&Pagemap>) -> (File, u64) {
    let file = tempfile::tempfile().unwrap();
    let checksum = save(memory, pagemap, &file, ID).unwrap();
    (file, checksum)
}

#[test]
fn what_was_written_comes_back_and_the_rest_is_holes() {
    let memory = memory();
    for page in [0, 7, 8, 200, 8191] {
        memory.write_obj(page + 1, at(page)).unwrap();
    }
    let pagemap = Pagemap::open().unwrap();
    let (file, checksum) = save_all(&memory, Some(&pagemap));
    assert_eq!(file.metadata().unwrap().len(), (u64::from(MIB) << 20) + PAGE as u64);
    assert!(file.metadata().unwrap().blocks() * 512 <= 6 * PAGE as u64 + 4096);
    check(&file, MIB, ID, checksum).unwrap();
    // Looking at every page finds the same.
    assert_eq!(save_all(&memory, None).1, checksum);
    let clone = map(file, MIB).unwrap();
    for page in 0..8192 {
        let expected = if [0, 7, 8, 200, 8191].contains(&page) { page + 1 } else { 0 };
        assert_eq!(clone.read_obj::<u64>(at(page)).unwrap(), expected);
    }
}

#[test]
fn clones_do_not_see_each_other_and_a_clone_is_saved_whole() {
    let template = memory();
    for page in [1, 2, 3] {
        template.write_obj(7u64, at(page)).unwrap();
    }
    let (file, _) = save_all(&template, None);
    let blocks = file.metadata().unwrap().blocks();
    let [first, second] = [(); 2].map(|()| map(file.try_clone().unwrap(), MIB).unwrap());
    first.write_obj(8u64, at(2)).unwrap();
    first.write_obj(0u64, at(3)).unwrap();
    first.write_obj(9u64, at(4)).unwrap();
    assert_eq!(second.read_obj::<u64>(at(2)).unwrap(), 7);
    let pagemap = Pagemap::open().unwrap();
    assert_eq!(pagemap.private_ranges(&first).unwrap(), [2..5]);
    assert_eq!(pagemap.private_ranges(&second).unwrap(), []);
    let (again, checksum) = save_all(&first, Some(&pagemap));
    check(&again, MIB, ID, checksum).unwrap();
    let resumed = map(again, MIB).unwrap();
    let pages = [1, 2, 3, 4, 5].map(|page| resumed.read_obj::<u64>(at(page)).unwrap());
    assert_eq!(pages, [7, 8, 0, 9, 0]);
    // Saving a clone reads the template but makes it no larger.
    assert_eq!(file.metadata().unwrap().blocks(), blocks);
}

#[test]
fn pages_named_beforehand_are_copied_at_once() {
    let template = memory();
    template.write_obj(7u64, at(5)).unwrap();
    let clone = map(save_all(&template, None).0, MIB).unwrap();
    if crate::mapping::populate(&clone, &[4..6, 8190..8192]) == 0 {
        return; // Linux before 5.14
    }
    assert_eq!(Pagemap::open().unwrap().private_ranges(&clone).unwrap(), [4..6, 8190..8192]);
    assert_eq!(clone.read_obj::<u64>(at(5)).unwrap(), 7);
}

#[test]
fn a_file_that_is_not_the_snapshots_memory_is_refused_with_the_reason() {
    let memory = memory();
    memory.write_obj(7u64, at(5)).unwrap();
    let (file, good) = save_all(&memory, None);
    assert!(matches!(check(&file, MIB + 1, ID, good), Err(MemoryRefusal::Length { .. })));
    assert!(matches!(check(&file, MIB, [4; 16], good), Err(MemoryRefusal::OtherSnapshot)));
    let checksum = |file| super::checksum(file, MIB).unwrap();
    assert_eq!(checksum(&file), good);
    file.write_all_at(&[6], 5 * PAGE as u64).unwrap();
    assert_ne!(checksum(&file), good);
    file.write_all_at(&[7], 5 * PAGE as u64).unwrap();
    file.write_all_at(&[1], 77 * PAGE as u64).unwrap();
    assert_ne!(checksum(&file), good);
    if !is_in_memory(&file) {
        assert!(matches!(check(&file, MIB, ID, good), Err(MemoryRefusal::Damaged)));
    }
    file.set_len(u64::from(MIB) << 20).unwrap();
    assert!(matches!(check(&file, MIB, ID, good), Err(MemoryRefusal::Length { .. })));
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(16))]
    /// A page may not be mistaken for another of the same contents.
    #[test]
    fn the_checksum_tells_where_a_page_is(page in 0u64..8192, other in 0u64..8192) {
        let sum = |page| {
            let memory = memory();
            memory.write_obj(7u64, at(page)).unwrap();
            save_all(&memory, Some(&Pagemap::open().unwrap())).1
        };
        proptest::prop_assert_eq!(sum(page) == sum(other), page == other);
    }
}
