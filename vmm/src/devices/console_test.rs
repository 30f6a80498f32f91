//! The console's log, history and attached clients.

use std::io::Read;

use rustix::event::{PollFd, PollFlags};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;

fn client(console: &Console) -> (UnixStream, Arc<UnixStream>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let ours = Arc::new(ours);
    console.attach(&ours);
    theirs.set_nonblocking(true).unwrap();
    (theirs, ours)
}

/// What is there to read.
fn heard(mut client: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    assert_eq!(client.read_to_end(&mut bytes).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    bytes
}

#[test]
fn lines_are_written_when_complete_and_partial_lines_when_the_timer_fires() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console.log");
    let mut console = Console::file(&path).unwrap();
    console.write_all(b"one\ntwo").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"one\n");
    let timer = console.timer();
    let mut fds = [PollFd::new(&timer, PollFlags::IN)];
    rustix::event::poll(&mut fds, None).unwrap();
    console.commit();
    assert_eq!(std::fs::read(&path).unwrap(), b"one\ntwo");
    let mut fds = [PollFd::new(&timer, PollFlags::IN)];
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
    Console::file(&path).unwrap().write_all(b"first").unwrap();
    Console::file(&path).unwrap().write_all(b"second\n").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"firstsecond\n");
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(Console::file(&link).is_err());
}

#[test]
fn clients_come_and_go_and_hear_the_past_and_the_present() {
    let directory = tempfile::tempdir().unwrap();
    let mut console = Console::file(&directory.path().join("console.log")).unwrap();
    console.write_all(b"before\nlogin: ").unwrap();
    let (first, first_end) = client(&console);
    assert_eq!(heard(&first), b"before\nlogin: ");
    console.write_all(b"now\n").unwrap();
    let (second, _second_end) = client(&console);
    assert_eq!(heard(&first), b"now\n");
    assert_eq!(heard(&second), b"before\nlogin: now\n");
    // One is dropped by its server, the other leaves by itself.
    drop(first_end);
    drop(second);
    console.write_all(b"alone\n").unwrap();
    assert!(console.lock().attached.is_empty());
    let (_third, third_end) = client(&console);
    drop(third_end);
    let (_fourth, _fourth_end) = client(&console);
    assert_eq!(console.lock().attached.len(), 1);
}

#[test]
fn a_client_that_does_not_read_misses_bytes_and_the_guest_does_not_wait() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console.log");
    let mut console = Console::file(&path).unwrap();
    let (slow, _slow_end) = client(&console);
    let line = [b'x'; 199];
    // Far more than a socket holds.
    for _ in 0..5_000 {
        console.write_all(&line).unwrap();
        console.write_all(b"\n").unwrap();
    }
    let got = heard(&slow);
    assert!(!got.is_empty() && got.len() < 1_000_000, "{}", got.len());
    console.write_all(b"after\n").unwrap();
    assert_eq!(heard(&slow), b"after\n", "it is still attached");
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1_000_006);
    assert_eq!(console.lock().history.len(), HISTORY);
    assert!(console.lock().history.capacity() < 2 * HISTORY);
}

#[test]
fn last_words_are_bounded_text() {
    let directory = tempfile::tempdir().unwrap();
    let mut console = Console::file(&directory.path().join("console.log")).unwrap();
    assert_eq!(console.last_words(100), "");
    console.write_all(&[0xff; 90]).unwrap();
    console.write_all("\nthe end \u{e9}".as_bytes()).unwrap();
    let words = console.last_words(20);
    assert!(words.len() <= 20 && words.ends_with("the end \u{e9}"), "{words:?}");
    // A cut through a character leaves no more than was asked for.
    let words = console.last_words(1);
    assert!(words.len() <= 1, "{words:?}");
}

#[test]
fn a_halt_is_heard() {
    let directory = tempfile::tempdir().unwrap();
    let mut console = Console::file(&directory.path().join("console.log")).unwrap();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    console.on_halt(event.try_clone().unwrap());
    console.write_all(b"[    1.0] system is fine\r\n").unwrap();
    assert!(event.read().is_err());
    console.write_all(b"[    1.1] reboot: System halted\r\n").unwrap();
    assert_eq!(event.read().unwrap(), 1);
    // A line that took long to come.
    console.write_all(b"[    1.1] reboot: System ha").unwrap();
    console.commit();
    assert!(event.read().is_err());
    console.write_all(b"lted\r\n").unwrap();
    assert_eq!(event.read().unwrap(), 1);
}

#[test]
fn silence_costs_no_memory() {
    let directory = tempfile::tempdir().unwrap();
    let console = Console::file(&directory.path().join("console.log")).unwrap();
    let log = console.lock();
    assert_eq!((log.line.capacity(), log.history.capacity(), log.attached.capacity()), (0, 0, 0));
}
