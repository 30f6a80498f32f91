//! One io_uring that can do nothing but read, write, flush and punch holes in one file, and the buffers of guest memory it works on.
//!
//! The ring is created disabled, given its one file and its restrictions (`IORING_REGISTER_RESTRICTIONS`), and enabled: afterwards not even a
//! process that was taken over can make it open, connect or send anything, or register another file.
//!
//! Invariants:
//! * At most [`DEPTH`] transfers are in the ring, each with one entry at a time, so neither queue overflows.
//! * The kernel works on guest memory behind this process's back: [`Ring`] keeps the mapping alive until the last transfer ended, and its
//!   destructor waits for that.
//!
//! All offsets and lengths are in bytes.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::opcode::{Fallocate, Fsync, Readv, Writev};
use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use vm_memory::GuestMemoryBackend;

use crate::virtio::Memory;
use crate::virtio::segments::Segments;

/// Most transfers at a time: as many as the queue has descriptors.
pub const DEPTH: usize = 128;
/// Entries per system call. 64 of them are one page, and so are [`DEPTH`] completions.
const SUBMISSIONS: u32 = 64;
/// Kernel threads that the ring may use for what cannot be done without waiting: (for files, for all else).
const WORKERS: [u32; 2] = [4, 1];
/// Most pieces of memory for one transfer: UIO_MAXIOV.
const MOST_PIECES: usize = 1024;
/// How often a transfer that the kernel asks to repeat is repeated.
const REPEATS: u8 = 16;
const IMAGE: Fixed = Fixed(0);

/// What to do with the image.
pub enum Job<'a> {
    /// Read from `offset` into the segments.
    Read {
        /// Where in the image.
        offset: u64,
        /// Where to.
        into: &'a Segments,
    },
    /// Write the segments at `offset`.
    Write {
        /// Where in the image.
        offset: u64,
        /// Where from.
        from: &'a Segments,
    },
    /// `fdatasync`.
    Flush,
    /// Make a range read as zeroes.
    Erase {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        len: u64,
        /// Give its blocks back.
        unmap: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    /// Blocks stay allocated, if the file system can do that.
    Zero,
    Punch,
}

/// Pieces of guest memory, in order.
#[derive(Default)]
struct Pieces {
    list: Vec<libc::iovec>,
    /// The first that is not finished.
    first: usize,
}

// SAFETY: the pointers are only handed to the kernel, which does not care for the thread; the memory they point to outlives them (see `Ring`).
unsafe impl Send for Pieces {}

impl Pieces {
    /// The pieces of `segments`; none if not all of them are in guest memory.
    fn new(memory: &Memory, segments: &Segments) -> Option<Self> {
        let mut list = Vec::new();
        for (start, len) in segments.ranges() {
            for slice in memory.get_slices(start, len) {
                let slice = slice.ok()?;
                let base = slice.ptr_guard_mut().as_ptr();
                list.push(libc::iovec { iov_base: base.cast(), iov_len: slice.len() });
            }
        }
        (list.len() <= MOST_PIECES).then_some(Self { list, first: 0 })
    }

    fn rest(&self) -> &[libc::iovec] {
        self.list.get(self.first..).unwrap_or(&[])
    }

    /// The first `count` bytes are done.
    fn advance(&mut self, mut count: usize) {
        while let Some(piece) = self.list.get_mut(self.first) {
            if count < piece.iov_len {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(count).cast();
                piece.iov_len -= count;
                return;
            }
            count -= piece.iov_len;
            self.first += 1;
        }
    }
}

/// A job under way, and whose it is.
struct Transfer<T> {
    tag: T,
    kind: Kind,
    pieces: Pieces,
    offset: u64,
    /// Still to do.
    left: u64,
    repeats: u8,
}

/// A job that ended.
pub struct Ended<T> {
    /// Whose it was.
    pub tag: T,
    /// How.
    pub result: io::Result<()>,
}

/// The ring.
pub struct Ring<T> {
    uring: IoUring,
    file: File,
    /// Where transfers go. `None`: there are none.
    memory: Option<Memory>,
    transfers: Vec<Option<Transfer<T>>>,
    vacant: Vec<u16>,
    /// Transfers in the ring.
    under_way: usize,
}

impl<T> Ring<T> {
    /// A ring for `file`, without memory yet.
    pub fn new(file: File) -> io::Result<Self> {
        let uring = create(&file).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!(
                    "no io_uring for the disk: {error}; the host needs Linux 5.15 or newer with CONFIG_IO_URING, and \
                     kernel.io_uring_disabled=0 where that setting exists"
                ),
            )
        })?;
        Ok(Self { uring, file, memory: None, transfers: Vec::new(), vacant: Vec::new(), under_way: 0 })
    }

    /// Ready for reading when a job ended.
    pub fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `uring` lives, and the result borrows it.
        unsafe { BorrowedFd::borrow_raw(self.uring.as_raw_fd()) }
    }

    /// From now on jobs are about `memory`. No job may be under way.
    pub fn attach(&mut self, memory: Memory) {
        debug_assert_eq!(self.under_way, 0);
        if self.under_way == 0 {
            self.memory = Some(memory);
        }
    }

    /// Waits for all jobs, forgets how they ended, and lets go of the memory.
    pub fn detach(&mut self) {
        while self.under_way > 0 {
            if self.wait().is_err() {
                // The kernel may still write to it: it must stay mapped for ever.
                mem::forget(self.memory.take());
                return;
            }
            while self.ended().is_some() {}
        }
        self.memory = None;
        // A device that is reset is likely not to be used again.
        self.transfers = Vec::new();
        self.vacant = Vec::new();
    }

    /// Jobs begun and not yet ended.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// Takes on a job; [`Ring::submit`] begins it. The tag comes back when the job ended, at once if there is nothing to do or it cannot be done. A write
    /// that `on_the_spot` asks for is done before this returns, unless the file system refuses.
    pub fn start(&mut self, job: &Job<'_>, tag: T, on_the_spot: bool) -> io::Result<Option<Ended<T>>> {
        let (kind, pieces, offset, left) = match job {
            Job::Read { offset, into } => (Kind::Read, self.pieces(into), *offset, into.len()),
            Job::Write { offset, from } => (Kind::Write, self.pieces(from), *offset, from.len()),
            Job::Flush => (Kind::Flush, Some(Pieces::default()), 0, 1),
            Job::Erase { offset, len, unmap } => {
                let kind = if *unmap { Kind::Punch } else { Kind::Zero };
                (kind, Some(Pieces::default()), *offset, *len)
            }
        };
        let Some(pieces) = pieces else {
            return Ok(Some(Ended { tag, result: Err(io::ErrorKind::InvalidInput.into()) }));
        };
        let mut transfer = Transfer { tag, kind, pieces, offset, left, repeats: 0 };
        if on_the_spot && kind == Kind::Write {
            while transfer.left > 0 {
                match self.write_now(&transfer) {
                    Ok(0) => break,
                    Ok(count) => transfer.advance(count),
                    Err(error) => return Ok(Some(Ended { tag: transfer.tag, result: Err(error) })),
                }
            }
        }
        if transfer.left == 0 {
            return Ok(Some(Ended { tag: transfer.tag, result: Ok(()) }));
        }
        self.push(transfer)?;
        Ok(None)
    }

    fn pieces(&self, segments: &Segments) -> Option<Pieces> {
        Pieces::new(self.memory.as_ref()?, segments)
    }

    /// Writes what is left of `transfer`, or a part of it. 0: let the ring do it.
    fn write_now(&self, transfer: &Transfer<T>) -> io::Result<usize> {
        let rest = transfer.pieces.rest();
        let (Ok(count), Ok(offset)) = (i32::try_from(rest.len()), i64::try_from(transfer.offset)) else {
            return Ok(0);
        };
        // SAFETY: the pieces lie in `self.memory`, which is mapped; the kernel reads them as memory that the guest changes at any time.
        let written = unsafe { libc::pwritev(self.file.as_raw_fd(), rest.as_ptr(), count, offset) };
        match usize::try_from(written) {
            Ok(count) => Ok(count),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => Ok(0),
                error => Err(error),
            },
        }
    }

    fn push(&mut self, transfer: Transfer<T>) -> io::Result<()> {
        let slot = match self.vacant.pop() {
            Some(slot) => slot,
            None => {
                self.transfers.push(None);
                (self.transfers.len() - 1) as u16
            }
        };
        let entry = entry(&transfer, slot);
        self.push_entry(&entry)?;
        if let Some(place) = self.transfers.get_mut(usize::from(slot)) {
            *place = Some(transfer);
        }
        self.under_way += 1;
        Ok(())
    }

    fn push_entry(&mut self, entry: &Entry) -> io::Result<()> {
        // SAFETY: the callers keep the entry's iovecs in `self.transfers`, unchanged until its completion was taken out; what they point to is
        // `self.memory`, which is kept as long.
        if unsafe { self.uring.submission().push(entry) }.is_ok() {
            return Ok(());
        }
        self.submit()?;
        // SAFETY: as above.
        unsafe { self.uring.submission().push(entry) }.map_err(io::Error::other)
    }

    /// Begins all jobs taken on. What is in the page cache is read before this returns. True if there were any.
    pub fn submit(&mut self) -> io::Result<bool> {
        let mut any = false;
        while !self.uring.submission().is_empty() {
            any = true;
            match self.uring.submit() {
                Ok(0) => return Err(io::Error::other("io_uring takes no submission")),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(any)
    }

    /// Begins all jobs taken on and waits until at least one of all ended (or a signal came).
    pub fn wait(&mut self) -> io::Result<()> {
        match self.uring.submit_and_wait(1) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    /// The next job that ended. What must go on is taken on again: [`Ring::submit`] afterwards.
    pub fn ended(&mut self) -> Option<Ended<T>> {
        loop {
            let completion = self.uring.completion().next()?;
            let slot = completion.user_data() as u16;
            let place = self.transfers.get_mut(usize::from(slot))?;
            let mut transfer = place.take()?;
            let result = match transfer.progress(completion.result()) {
                Progress::Ended(result) => result,
                Progress::Again => {
                    let entry = entry(&transfer, slot);
                    *place = Some(transfer);
                    match self.push_entry(&entry) {
                        Ok(()) => continue,
                        Err(error) => {
                            // Nothing was queued for it.
                            transfer = self.transfers.get_mut(usize::from(slot))?.take()?;
                            Err(error)
                        }
                    }
                }
            };
            self.vacant.push(slot);
            self.under_way -= 1;
            return Some(Ended { tag: transfer.tag, result });
        }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        self.detach();
    }
}

enum Progress {
    Ended(io::Result<()>),
    Again,
}

impl<T> Transfer<T> {
    fn advance(&mut self, count: usize) {
        self.pieces.advance(count);
        self.offset = self.offset.saturating_add(count as u64);
        self.left = self.left.saturating_sub(count as u64);
    }

    /// The kernel answered `result`: a count, or an error number below zero.
    fn progress(&mut self, result: i32) -> Progress {
        match usize::try_from(result) {
            Ok(count) if matches!(self.kind, Kind::Read | Kind::Write) => {
                self.advance(count);
                match (self.left, count) {
                    (0, _) => Progress::Ended(Ok(())),
                    // The image became shorter than it was.
                    (_, 0) => Progress::Ended(Err(io::ErrorKind::UnexpectedEof.into())),
                    _ => Progress::Again,
                }
            }
            Ok(_) => Progress::Ended(Ok(())),
            Err(_) => match result.wrapping_neg() {
                libc::EOPNOTSUPP if self.kind == Kind::Zero => {
                    self.kind = Kind::Punch;
                    Progress::Again
                }
                libc::EINTR | libc::EAGAIN if self.repeats < REPEATS => {
                    self.repeats += 1;
                    Progress::Again
                }
                errno => Progress::Ended(Err(io::Error::from_raw_os_error(errno))),
            },
        }
    }
}

/// The submission for what is left of `transfer`.
fn entry<T>(transfer: &Transfer<T>, slot: u16) -> Entry {
    let rest = transfer.pieces.rest();
    let (list, count, offset) = (rest.as_ptr(), rest.len() as u32, transfer.offset);
    let erase = |mode: i32| {
        Fallocate::new(IMAGE, transfer.left).offset(offset).mode(mode | libc::FALLOC_FL_KEEP_SIZE).build()
    };
    let entry = match transfer.kind {
        Kind::Read => Readv::new(IMAGE, list, count).offset(offset).build(),
        Kind::Write => Writev::new(IMAGE, list, count).offset(offset).build(),
        Kind::Flush => Fsync::new(IMAGE).flags(FsyncFlags::DATASYNC).build(),
        Kind::Zero => erase(libc::FALLOC_FL_ZERO_RANGE),
        Kind::Punch => erase(libc::FALLOC_FL_PUNCH_HOLE),
    };
    entry.user_data(u64::from(slot))
}

/// A ring that can do [`Job`]s on `file`.
fn create(file: &File) -> io::Result<IoUring> {
    let uring = IoUring::builder().setup_r_disabled().setup_cqsize(DEPTH as u32).build(SUBMISSIONS)?;
    let submitter = uring.submitter();
    submitter.register_files(&[file.as_raw_fd()])?;
    submitter.register_iowq_max_workers(&mut WORKERS.clone())?;
    let operations = [Readv::CODE, Writev::CODE, opcode::Fsync::CODE, Fallocate::CODE];
    let mut restrictions: Vec<Restriction> = operations.map(Restriction::sqe_op).into();
    // Only the registered file can be named.
    restrictions.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
    submitter.register_restrictions(&mut restrictions)?;
    submitter.register_enable_rings()?;
    Ok(uring)
}

#[cfg(test)]
#[path = "uring_test.rs"]
mod tests;
