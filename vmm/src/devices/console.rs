//! Where the guest's serial port goes: a log file that never exceeds [`MAX_BYTES`], or standard output.
//!
//! The guest writes byte by byte; bytes are gathered to lines. A line that stays incomplete for [`PARTIAL_MS`] is written as it is (a
//! prompt), for which the event loop calls [`Console::commit`] when [`Console::timer`] is ready. A file that would grow too large keeps
//! its most recent half. The host's trouble with the file is not the guest's: bytes that cannot be written are dropped.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

/// Largest log file, bytes.
pub const MAX_BYTES: u64 = 1 << 20;
/// How long an incomplete line waits, milliseconds.
pub const PARTIAL_MS: i64 = 20;
const LINE: usize = 1024;

enum Sink {
    Stdout,
    /// The file and its length, bytes.
    File(File, u64),
}

/// The log.
pub struct Console {
    sink: Sink,
    line: Vec<u8>,
    timer: OwnedFd,
    armed: bool,
}

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
        Ok(Self { sink, line: Vec::with_capacity(LINE), timer, armed: false })
    }

    /// Ready when [`Console::commit`] is due.
    pub fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Writes what was gathered.
    pub fn commit(&mut self) {
        if std::mem::take(&mut self.armed) {
            self.set_timer(0);
        }
        let line = std::mem::take(&mut self.line);
        let _ = match &mut self.sink {
            Sink::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&line).and_then(|()| stdout.flush())
            }
            Sink::File(file, len) => append(file, len, &line),
        };
        self.line = line;
        self.line.clear();
    }

    fn push(&mut self, byte: u8) {
        self.line.push(byte);
        if byte == b'\n' || self.line.len() >= LINE {
            self.commit();
        } else if !self.armed {
            self.armed = true;
            self.set_timer(PARTIAL_MS);
        }
    }

    /// One shot in `milliseconds`; 0 disarms. Also takes back the timer's readiness.
    fn set_timer(&self, milliseconds: i64) {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec { tv_sec: 0, tv_nsec: milliseconds * 1_000_000 };
        let spec = Itimerspec { it_interval: zero, it_value: value };
        // The timer is valid and so are the times: it cannot fail. If it did, only an incomplete line would stay longer.
        let _ = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec);
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
        for byte in bytes {
            self.push(*byte);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.commit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags};

    #[test]
    fn lines_are_written_when_complete_and_partial_lines_when_the_timer_fires() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let mut console = Console::file(&path).unwrap();
        console.write_all(b"one\ntwo").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one\n");
        let mut fds = [PollFd::new(&console.timer, PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
        console.commit();
        assert_eq!(std::fs::read(&path).unwrap(), b"one\ntwo");
        let mut fds = [PollFd::new(&console.timer, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&now)).unwrap(), 0);
    }

    #[test]
    fn the_file_stays_bounded_and_keeps_the_most_recent_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let mut console = Console::file(&path).unwrap();
        let mut line = 0;
        for _ in 0..60_000 {
            line += 1;
            writeln!(console, "this is line number {line}").unwrap();
            if line % 1000 == 0 {
                assert!(std::fs::metadata(&path).unwrap().len() <= MAX_BYTES);
            }
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() as u64 > MAX_BYTES / 4);
        let last = line;
        let lines: Vec<_> = text.lines().collect();
        for (at, text) in lines.iter().rev().enumerate() {
            assert_eq!(*text, format!("this is line number {}", last - at));
        }
    }

    #[test]
    fn a_new_machine_appends_and_a_link_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        Console::file(&path).unwrap().write_all(b"first\n").unwrap();
        Console::file(&path).unwrap().write_all(b"second\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"first\nsecond\n");
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Console::file(&link).is_err());
    }
}
