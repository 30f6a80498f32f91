//! A machine's serial console: kept in a file, and waited on line by line.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// What a machine has said so far.
#[derive(Debug, Clone)]
pub struct Console {
    shared: Arc<(Mutex<State>, Condvar)>,
    path: PathBuf,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    closed: bool,
}

/// A place in a console: only what comes after it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(usize);

impl Mark {
    /// The very start.
    pub const START: Self = Self(0);
}

impl Console {
    /// Follows `output` in a thread of its own until it ends, writing it to `path` as well.
    ///
    /// # Errors
    /// `path` cannot be written.
    pub fn follow(output: impl Read + Send + 'static, path: &Path) -> Result<Self> {
        let mut file =
            std::fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        let shared = Arc::new((Mutex::new(State::default()), Condvar::new()));
        let writer = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut line = Vec::new();
            while matches!(output.read_until(b'\n', &mut line), Ok(n) if n > 0) {
                // A full disk must not stop the machine: the console is still in memory.
                let _ = file.write_all(&line);
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                writer.0.lock().unwrap_or_else(PoisonError::into_inner).lines.push(text);
                writer.1.notify_all();
                line.clear();
            }
            writer.0.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
            writer.1.notify_all();
        });
        Ok(Self { shared, path: path.to_owned() })
    }

    /// The present end.
    pub fn mark(&self) -> Mark {
        Mark(self.state().lines.len())
    }

    /// Waits for a line after `from` that contains one of `wanted`; a line with one of `fatal` ends the wait with an error.
    ///
    /// # Errors
    /// Time is up, a fatal line came, or the machine ended; with the last console lines.
    pub fn wait(&self, from: Mark, wanted: &[&str], fatal: &[&str], time: Duration) -> Result<String> {
        let deadline = Instant::now() + time;
        let mut seen = from.0;
        let mut state = self.state();
        loop {
            while let Some(line) = state.lines.get(seen) {
                if wanted.iter().any(|w| line.contains(w)) {
                    return Ok(line.clone());
                }
                if fatal.iter().any(|f| line.contains(f)) {
                    bail!("the machine said {line:?}\n{}", tail(&state.lines, 30));
                }
                seen += 1;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                let what = if state.closed { "the machine ended" } else { "time is up" };
                bail!(
                    "{what} while waiting for {wanted:?} ({time:?}); the last console lines:\n{}",
                    tail(&state.lines, 30)
                );
            }
            state = self.shared.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The line at `mark`, and where the next one will be.
    ///
    /// # Errors
    /// Time is up before it comes, or the machine ended; with the last console lines.
    pub fn next(&self, mark: Mark, time: Duration) -> Result<(String, Mark)> {
        self.wait(mark, &[""], &[], time)?;
        let state = self.state();
        let line = state.lines.get(mark.0).context("the console has no such line")?;
        Ok((line.clone(), Mark(mark.0 + 1)))
    }

    /// The last lines.
    pub fn tail(&self, lines: usize) -> String {
        tail(&self.state().lines, lines)
    }

    /// The file with all of it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn tail(lines: &[String], n: usize) -> String {
    lines[lines.len().saturating_sub(n)..].iter().map(|l| format!("  | {l}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_the_line_the_fatal_line_or_the_machine() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let console = Console::follow(&b"one\ntwo: up\nthree: failed\n"[..], &path).unwrap();
        let start = Mark::START;
        let time = Duration::from_secs(20);
        assert_eq!(console.wait(start, &["up"], &["failed"], time).unwrap(), "two: up");
        assert!(
            console
                .wait(start, &["four"], &["failed"], time)
                .unwrap_err()
                .to_string()
                .contains("three: failed")
        );
        assert!(
            console.wait(start, &["four"], &[], time).unwrap_err().to_string().contains("the machine ended")
        );
        assert_eq!(console.mark(), Mark(3));
        let (first, second) = console.next(start, time).unwrap();
        assert_eq!((first.as_str(), console.next(second, time).unwrap().0.as_str()), ("one", "two: up"));
        assert!(console.next(Mark(3), time).unwrap_err().to_string().contains("the machine ended"));
        assert_eq!(std::fs::read_to_string(path).unwrap(), "one\ntwo: up\nthree: failed\n");
    }
}
