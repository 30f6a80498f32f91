//! Tells a person what is going on: a spinner on a terminal, otherwise a plain line every ten seconds, so that a log of a long build
//! stays alive and short. What is shown beside the task's name is the last line of its log.

use std::fs::File;
use std::io::{IsTerminal as _, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Between lines when nobody watches.
const PLAIN_EVERY: Duration = Duration::from_secs(10);
/// Between looks at the log on a terminal.
const LIVE_EVERY: Duration = Duration::from_millis(200);

/// A task under way. Dropping it ends the display.
#[derive(Debug)]
pub struct Task {
    name: String,
    started: Instant,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Task {
    /// Starts to show `name`, with the last line of `log` when there is one.
    pub fn start(name: &str, log: Option<&Path>) -> Self {
        let (stop, stopped) = mpsc::channel();
        let (label, log, started) = (name.to_owned(), log.map(Path::to_owned), Instant::now());
        let show = move || {
            if std::io::stderr().is_terminal() {
                live(&label, log.as_ref(), &stopped);
            } else {
                plain(&label, log.as_ref(), started, &stopped);
            }
        };
        let thread = std::thread::Builder::new().name("progress".into()).spawn(show).ok();
        Self { name: name.to_owned(), started, stop: Some(stop), thread }
    }

    /// Ends the display and leaves a line saying how it went.
    pub fn done(mut self, outcome: &str) {
        self.end();
        eprintln!("{}: {outcome} ({})", self.name, seconds(self.started.elapsed()));
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A display that panicked is no reason to end the build.
            let _ = thread.join();
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.end();
    }
}

/// `3 min 45 s` or `0.4 s`.
pub fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        s => format!("{} min {} s", s / 60, s % 60),
    }
}

/// `16.4 MB`.
pub fn megabytes(bytes: u64) -> String {
    format!("{}.{} MB", bytes / 1_000_000, bytes % 1_000_000 / 100_000)
}

fn live(name: &str, log: Option<&PathBuf>, stopped: &mpsc::Receiver<()>) {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {elapsed} {wide_msg:.dim}") {
        bar.set_style(style);
    }
    bar.set_prefix(name.to_owned());
    while stopped.recv_timeout(LIVE_EVERY) == Err(RecvTimeoutError::Timeout) {
        bar.set_message(log.and_then(|l| last_line(l)).unwrap_or_default());
        bar.tick();
    }
    bar.finish_and_clear();
}

fn plain(name: &str, log: Option<&PathBuf>, started: Instant, stopped: &mpsc::Receiver<()>) {
    while stopped.recv_timeout(PLAIN_EVERY) == Err(RecvTimeoutError::Timeout) {
        let line = log.and_then(|l| last_line(l)).unwrap_or_default();
        eprintln!("{name}: {} so far; {line}", seconds(started.elapsed()));
    }
}

/// The last line with anything in it.
fn last_line(path: &Path) -> Option<String> {
    tail(path, 1000)
        .ok()?
        .lines()
        .rev()
        .map(str::trim)
        .find(|l| !l.is_empty())
        .map(|l| l.chars().take(120).collect())
}

/// The last `limit` bytes of a file, as text.
pub(crate) fn tail(path: &Path, limit: u64) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_read_well() {
        assert_eq!(seconds(Duration::from_millis(1234)), "1.2 s");
        assert_eq!(seconds(Duration::from_secs(225)), "3 min 45 s");
        assert_eq!(megabytes(16_449_000), "16.4 MB");
    }

    #[test]
    fn tail_finds_the_last_line_that_says_something() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        std::fs::write(&log, "first\nCC net/ipv4/tcp.o\n\n").unwrap();
        assert_eq!(last_line(&log).as_deref(), Some("CC net/ipv4/tcp.o"));
        assert_eq!(tail(&log, 3).unwrap(), "o\n\n");
        assert_eq!(last_line(&directory.path().join("none")), None);
    }
}
