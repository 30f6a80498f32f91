//! The last lines of a guest's console, for people who want to know why it ended.
//!
//! What is in it is the guest's: only its end is read, and shown without control characters.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// How much of the end is looked at, bytes.
const TAIL: u64 = 4096;
/// How many lines are shown.
const LINES: usize = 8;
/// What a kernel that panics says first.
const PANIC: &str = "Kernel panic";
/// Longest line shown, characters.
const WIDTH: usize = 160;

/// The last lines, without control characters; empty if there is no console.
pub fn tail(path: &Path) -> String {
    read_tail(path).map(|bytes| last_lines(&bytes)).unwrap_or_default()
}

fn read_tail(path: &Path) -> Option<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
    let meta = file.metadata().ok()?;
    if !meta.is_file() {
        return None;
    }
    file.seek(SeekFrom::Start(meta.len().saturating_sub(TAIL))).ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The last lines of what a console said.
pub fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let clean = |line: &str| line.chars().filter(|c| !c.is_control()).take(WIDTH).collect::<String>();
    let lines: Vec<String> = text.lines().map(clean).filter(|l| !l.trim().is_empty()).collect();
    // After what a kernel says of its panic comes a long trace: the end of that alone tells nothing.
    let end = lines.len().saturating_sub(LINES);
    let panic = lines.iter().rposition(|line| line.contains(PANIC)).filter(|at| *at < end);
    let shown = panic.into_iter().chain(end..lines.len()).filter_map(|at| lines.get(at));
    shown.map(String::as_str).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_clean_lines_are_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        assert_eq!(tail(&path), "");
        let text: String = (0..2000).map(|i| format!("\x1b[1mline {i}\x07\r\n\n")).collect();
        std::fs::write(&path, text).unwrap();
        assert!(tail(&path).ends_with("line 1998\n[1mline 1999"), "{:?}", tail(&path));
        assert_eq!(tail(&path).lines().count(), LINES);
        let panic = format!("Kernel panic - not syncing: why\n{}", "trace\n".repeat(30));
        let shown = last_lines(panic.as_bytes());
        assert!(shown.starts_with("Kernel panic - not syncing: why\ntrace\n"), "{shown:?}");
        assert_eq!(shown.lines().count(), LINES + 1);
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert_eq!(tail(&path), "");
    }
}
