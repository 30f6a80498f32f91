//! What the guest says on its serial port and its virtio console, as one stream: a log file that never exceeds [`MAX_BYTES`] (or standard
//! output), the last [`HISTORY`] bytes, and the clients that are attached at the moment.
//!
//! The guest writes byte by byte; bytes are gathered to lines. A line that stays incomplete for [`PARTIAL_MS`] is written as it is (a
//! prompt), for which the event loop calls [`Console::commit`] when [`Console::timer`] is ready. A file that would grow too large keeps
//! its most recent half. The host's trouble is not the guest's: bytes that cannot be written are dropped, and so are those that an attached
//! client does not take at once. What nobody has said anything on costs no memory.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::OFlags;
use rustix::net::SendFlags;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use vmm_sys_util::eventfd::EventFd;

/// Largest log file, bytes.
pub const MAX_BYTES: u64 = 1 << 20;
/// What a client that attaches is told of the past, at most, bytes.
pub const HISTORY: usize = 16 << 10;
/// How long an incomplete line waits, milliseconds.
pub const PARTIAL_MS: i64 = 20;
const LINE: usize = 1024;
/// What Linux says last when it halts.
const HALTED: &[u8] = b"System halted";

enum Sink {
    Stdout,
    /// The file and its length, bytes.
    File(File, u64),
}

struct Log {
    sink: Sink,
    line: Vec<u8>,
    armed: bool,
    history: VecDeque<u8>,
    /// Who is attached. The control server holds them: those it has dropped are gone.
    attached: Vec<Weak<UnixStream>>,
    /// Written when a line says [`HALTED`].
    halt: Option<EventFd>,
}

struct Shared {
    timer: OwnedFd,
    log: Mutex<Log>,
}

/// The stream; a clone is another handle of the same.
#[derive(Clone)]
pub struct Console(Arc<Shared>);

impl Console {
    /// Standard output.
    pub fn stdout() -> io::Result<Self> {
        Self::new(Sink::Stdout)
    }

    /// The file at `path`, created if need be, appended to. A symbolic link is refused: the directory may belong to the sliver.
    pub fn file(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o640)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32)
            .open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Self::new(Sink::File(file, metadata.len()))
    }

    fn new(sink: Sink) -> io::Result<Self> {
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        let log = Log {
            sink,
            line: Vec::new(),
            armed: false,
            history: VecDeque::new(),
            attached: Vec::new(),
            halt: None,
        };
        Ok(Self(Arc::new(Shared { timer, log: Mutex::new(log) })))
    }

    /// From now on `event` is written whenever a line says that the system halted. The guest says what it likes: it is a hint to look.
    pub fn on_halt(&self, event: EventFd) {
        self.lock().halt = Some(event);
    }

    /// Ready when [`Console::commit`] is due.
    pub fn timer(&self) -> BorrowedFd<'_> {
        self.0.timer.as_fd()
    }

    /// Writes what was gathered.
    pub fn commit(&self) {
        self.commit_locked(&mut self.lock());
    }

    /// Tells `client`, which must not block, the history and then everything, until the last reference to it is dropped.
    pub fn attach(&self, client: &Arc<UnixStream>) {
        let mut log = self.lock();
        self.commit_locked(&mut log);
        let (first, second) = log.history.as_slices();
        for part in [first, second] {
            tell(client, part);
        }
        log.attached.retain(|attached| attached.strong_count() > 0);
        log.attached.push(Arc::downgrade(client));
    }

    /// The last words, at most `most` bytes of text; what is no text is replaced.
    pub fn last_words(&self, most: usize) -> String {
        let mut log = self.lock();
        self.commit_locked(&mut log);
        let bytes: Vec<u8> = log.history.iter().rev().take(most).rev().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        // Replacements take three bytes each.
        let mut start = text.len().saturating_sub(most);
        while !text.is_char_boundary(start) {
            start += 1;
        }
        text.get(start..).unwrap_or_default().to_owned()
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.0.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commit_locked(&self, log: &mut Log) {
        if std::mem::take(&mut log.armed) {
            self.set_timer(0);
        }
        log.commit();
    }

    /// One shot in `milliseconds`; 0 disarms. Also takes back the timer's readiness.
    fn set_timer(&self, milliseconds: i64) {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec { tv_sec: 0, tv_nsec: milliseconds * 1_000_000 };
        let spec = Itimerspec { it_interval: zero, it_value: value };
        // The timer is valid and so are the times: it cannot fail. If it did, only an incomplete line would stay longer.
        let _ = rustix::time::timerfd_settime(&self.0.timer, TimerfdTimerFlags::empty(), &spec);
    }
}

impl Log {
    fn commit(&mut self) {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            return;
        }
        let _ = match &mut self.sink {
            Sink::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&line).and_then(|()| stdout.flush())
            }
            Sink::File(file, len) => append(file, len, &line),
        };
        let excess = (self.history.len() + line.len()).saturating_sub(HISTORY);
        self.history.drain(..excess.min(self.history.len()));
        self.history.extend(&line);
        self.attached.retain(|attached| {
            let client = attached.upgrade();
            client.is_some_and(|client| tell(&client, &line))
        });
        if let Some(halt) = &self.halt {
            // The words may have come in two pieces: a slow guest's line is written before it is complete.
            let start = self.history.len().saturating_sub(line.len() + HALTED.len() - 1);
            let recent: Vec<u8> = self.history.range(start..).copied().collect();
            if recent.windows(HALTED.len()).any(|words| words == HALTED) {
                let _ = halt.write(1); // fails only if the counter is full: told already
            }
        }
    }
}

/// Sends what fits without waiting. False if the client is gone.
fn tell(client: &UnixStream, bytes: &[u8]) -> bool {
    match rustix::net::send(client, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => true,
        Err(_) => false,
    }
}

/// Appends to a file of `len` bytes, dropping its older half if it would become too large.
fn append(file: &File, len: &mut u64, bytes: &[u8]) -> io::Result<()> {
    if *len + bytes.len() as u64 > MAX_BYTES {
        let mut recent = vec![0; (MAX_BYTES / 2).min(*len) as usize];
        let start = *len - recent.len() as u64;
        file.read_exact_at(&mut recent, start)?;
        let from_line = recent.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let recent = recent.get(from_line..).unwrap_or(&[]);
        file.set_len(0)?;
        *len = 0;
        file.write_all_at(recent, 0)?;
        *len = recent.len() as u64;
    }
    file.write_all_at(bytes, *len)?;
    *len += bytes.len() as u64;
    Ok(())
}

/// Never fails and never blocks for long; `flush` does nothing, because the serial port flushes after every byte.
impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut log = self.lock();
        for byte in bytes {
            log.line.push(*byte);
            if *byte == b'\n' || log.line.len() >= LINE {
                self.commit_locked(&mut log);
            }
        }
        if !log.line.is_empty() && !std::mem::replace(&mut log.armed, true) {
            self.set_timer(PARTIAL_MS);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.log.get_mut().unwrap_or_else(PoisonError::into_inner).commit();
    }
}

#[cfg(test)]
#[path = "console_test.rs"]
mod tests;
