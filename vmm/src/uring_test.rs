//! The ring against a model of the image, on a file system with and one without every kind of hole, and against what it must refuse.

use super::*;
use crate::reactor::{Reactor, Readiness};
use proptest::prelude::*;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress};

const IMAGE_LEN: usize = 64 << 10;
const MEMORY_LEN: usize = 256 << 10;

fn memory() -> Memory {
    // Two regions, so that segments cross from one to the other.
    let half = MEMORY_LEN / 2;
    Memory::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)]).unwrap()
}

/// A file without ZERO_RANGE.
fn memory_file() -> File {
    rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
}

fn segments(ranges: &[(u64, u32)]) -> Segments {
    Segments::of(ranges.iter().map(|(start, len)| (GuestAddress(*start), *len)).collect())
}

impl<T> Ring<T> {
    /// Runs one job to its end.
    fn run(&mut self, job: &Job<'_>, tag: T, on_the_spot: bool) -> Ended<T> {
        if let Some(ended) = self.start(job, tag, on_the_spot).unwrap() {
            return ended;
        }
        loop {
            self.wait().unwrap();
            if let Some(ended) = self.ended() {
                return ended;
            }
        }
    }
}

#[test]
fn nothing_but_the_four_jobs_on_the_one_file() {
    let file = tempfile::tempfile().unwrap();
    let mut uring = create(&file).unwrap();
    let mut byte = 0u8;
    let piece = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let other = io_uring::types::Fd(file.as_raw_fd());
    let path = c"/etc/passwd";
    let refused = [
        opcode::Nop::new().build(),
        opcode::OpenAt::new(io_uring::types::Fd(libc::AT_FDCWD), path.as_ptr()).build(),
        opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
        // Permitted, but on a descriptor that is not registered.
        Readv::new(other, &raw const piece, 1).build(),
        opcode::Read::new(IMAGE, &raw mut byte, 1).build(),
    ];
    for entry in refused {
        // SAFETY: what the entry points to outlives its completion, which is waited for.
        unsafe { uring.submission().push(&entry).unwrap() };
        uring.submit_and_wait(1).unwrap();
        let completion = uring.completion().next().unwrap();
        assert_eq!(completion.result(), -libc::EACCES, "{entry:?}");
    }
    let again = uring.submitter().register_files(&[file.as_raw_fd()]).unwrap_err();
    assert_eq!(again.raw_os_error(), Some(libc::EACCES));
}

#[test]
fn an_image_that_became_shorter_is_an_error() {
    let file = memory_file();
    file.set_len(4096).unwrap();
    let mut ring = Ring::new(file.try_clone().unwrap()).unwrap();
    ring.attach(memory());
    file.set_len(1024).unwrap();
    let into = segments(&[(0, 2048)]);
    let ended = ring.run(&Job::Read { offset: 0, into: &into }, (), false);
    assert_eq!(ended.result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn segments_outside_memory_are_refused_before_anything_moves() {
    let file = memory_file();
    file.set_len(8192).unwrap();
    let mut ring = Ring::new(file.try_clone().unwrap()).unwrap();
    ring.attach(memory());
    let from = segments(&[(0, 512), (MEMORY_LEN as u64 - 1, 512)]);
    for on_the_spot in [false, true] {
        let ended = ring.start(&Job::Write { offset: 0, from: &from }, (), on_the_spot).unwrap().unwrap();
        assert_eq!(ended.result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    assert_eq!(ring.under_way(), 0);
}

#[test]
fn without_memory_nothing_is_read() {
    let mut ring = Ring::new(memory_file()).unwrap();
    let into = segments(&[(0, 512)]);
    assert!(ring.start(&Job::Read { offset: 0, into: &into }, (), false).unwrap().unwrap().result.is_err());
    ring.attach(memory());
    ring.detach();
    assert!(ring.start(&Job::Read { offset: 0, into: &into }, (), false).unwrap().unwrap().result.is_err());
}

#[test]
fn as_many_jobs_as_there_are_places_end_each_once() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(IMAGE_LEN as u64).unwrap();
    let mut ring = Ring::new(file).unwrap();
    ring.attach(memory());
    let mut reactor = Reactor::new().unwrap();
    reactor.poller(0).add(ring.event(), 0, Readiness::READ).unwrap();
    let buffer = segments(&[(0, 512)]);
    let mut ended = vec![0; DEPTH];
    let mut missing = DEPTH;
    for tag in 0..DEPTH {
        let job = match tag % 4 {
            0 => Job::Read { offset: 512, into: &buffer },
            1 => Job::Write { offset: 1024, from: &buffer },
            2 => Job::Flush,
            _ => Job::Erase { offset: 4096, len: 4096, unmap: tag % 8 == 3 },
        };
        assert!(ring.start(&job, tag, false).unwrap().is_none());
    }
    assert_eq!(ring.under_way(), DEPTH);
    loop {
        ring.submit().unwrap();
        while let Some(Ended { tag, result }) = ring.ended() {
            result.unwrap();
            ended[tag] += 1;
            missing -= 1;
        }
        if missing == 0 {
            break;
        }
        // What is still under way says so.
        assert!(reactor.wait().unwrap().count() <= 1);
    }
    assert_eq!((ended, ring.under_way()), (vec![1; DEPTH], 0));
}

#[derive(Debug, Clone)]
enum Step {
    Read { offset: usize, ranges: Vec<(u64, u32)> },
    Write { offset: usize, ranges: Vec<(u64, u32)>, on_the_spot: bool },
    Erase { offset: usize, len: usize, unmap: bool },
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let ranges = prop::collection::vec((0u64..MEMORY_LEN as u64 - 2000, 0u32..2000), 0..6);
    let step = prop_oneof![
        (0..IMAGE_LEN, ranges.clone()).prop_map(|(offset, ranges)| Step::Read { offset, ranges }),
        (0..IMAGE_LEN, ranges, any::<bool>()).prop_map(|(offset, ranges, on_the_spot)| Step::Write {
            offset,
            ranges,
            on_the_spot
        }),
        (0..IMAGE_LEN, 0..IMAGE_LEN, any::<bool>()).prop_map(|(offset, len, unmap)| Step::Erase {
            offset,
            len,
            unmap
        }),
        Just(Step::Flush),
    ];
    prop::collection::vec(step, 0..20)
}

/// Cuts ranges so that they end within the image.
fn within(offset: usize, ranges: &[(u64, u32)]) -> Vec<(u64, u32)> {
    let mut room = IMAGE_LEN - offset;
    let cut = |(start, len): &(u64, u32)| {
        let len = (*len as usize).min(room);
        room -= len;
        (*start, len as u32)
    };
    ranges.iter().map(cut).collect()
}

fn agrees_with_the_model(file: File, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut image: Vec<u8> = (0..IMAGE_LEN).map(|at| (at % 251) as u8 + 1).collect();
    file.write_all_at(&image, 0).unwrap();
    let shadow: Vec<u8> = (0..MEMORY_LEN).map(|at| (at % 239) as u8 + 3).collect();
    let mut shadow = shadow;
    let memory = memory();
    memory.write_slice(&shadow, GuestAddress(0)).unwrap();
    let mut ring = Ring::new(file.try_clone().unwrap()).unwrap();
    ring.attach(memory.clone());
    for step in steps {
        let ended = match step {
            Step::Read { offset, ranges } => {
                let ranges = within(offset, &ranges);
                let mut at = offset;
                for (start, len) in &ranges {
                    let (start, len) = (*start as usize, *len as usize);
                    shadow[start..start + len].copy_from_slice(&image[at..at + len]);
                    at += len;
                }
                ring.run(&Job::Read { offset: offset as u64, into: &segments(&ranges) }, (), false)
            }
            Step::Write { offset, ranges, on_the_spot } => {
                let ranges = within(offset, &ranges);
                let mut at = offset;
                for (start, len) in &ranges {
                    let (start, len) = (*start as usize, *len as usize);
                    image[at..at + len].copy_from_slice(&shadow[start..start + len]);
                    at += len;
                }
                let from = segments(&ranges);
                ring.run(&Job::Write { offset: offset as u64, from: &from }, (), on_the_spot)
            }
            Step::Erase { offset, len, unmap } => {
                let len = len.min(IMAGE_LEN - offset);
                image[offset..offset + len].fill(0);
                ring.run(&Job::Erase { offset: offset as u64, len: len as u64, unmap }, (), false)
            }
            Step::Flush => ring.run(&Job::Flush, (), false),
        };
        prop_assert!(ended.result.is_ok(), "{:?}", ended.result);
    }
    let mut found = vec![0; IMAGE_LEN];
    file.read_exact_at(&mut found, 0).unwrap();
    prop_assert!(found == image, "the image differs");
    let mut found = vec![0; MEMORY_LEN];
    memory.read_slice(&mut found, GuestAddress(0)).unwrap();
    prop_assert!(found == shadow, "memory differs");
    prop_assert_eq!(file.metadata().unwrap().len(), IMAGE_LEN as u64);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn jobs_do_to_a_file_what_they_say(steps in steps()) {
        agrees_with_the_model(tempfile::tempfile().unwrap(), steps)?;
    }

    #[test]
    fn and_where_the_file_system_has_holes_only(steps in steps()) {
        agrees_with_the_model(memory_file(), steps)?;
    }

    #[test]
    fn advancing_skips_exactly_so_many_bytes(
        lens in prop::collection::vec(0u32..50, 0..10),
        counts in prop::collection::vec(0usize..60, 0..20),
    ) {
        let memory = memory();
        let ranges: Vec<(u64, u32)> = lens.iter().enumerate().map(|(at, len)| (at as u64 * 100, *len)).collect();
        let mut pieces = Pieces::new(&memory, &segments(&ranges)).unwrap();
        let addresses = |pieces: &Pieces| -> Vec<usize> {
            pieces.rest().iter().flat_map(|piece| (0..piece.iov_len).map(|at| piece.iov_base as usize + at)).collect()
        };
        let mut expected = addresses(&pieces);
        for count in counts {
            let count = count.min(expected.len());
            pieces.advance(count);
            expected.drain(..count);
            prop_assert_eq!(addresses(&pieces), expected.clone());
        }
    }
}
