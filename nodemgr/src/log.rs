//! The log: standard error, each event led by the program's name, because several programs share a node's console.
//!
//! A console may be a slow serial line, so a thread of its own writes; events wait in a queue of bounded length. When it is full events are
//! dropped rather than waited for, and their number is said.

use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// Events that wait.
const QUEUE: usize = 1024;
/// How long the last events may take.
const FLUSH_WAIT: Duration = Duration::from_secs(2);

enum Item {
    Event(Vec<u8>),
    /// Answered when all before it is written.
    Flush(SyncSender<()>),
}

static SENDER: OnceLock<SyncSender<Item>> = OnceLock::new();
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Starts logging what `RUST_LOG` says, or what an operator wants to know.
///
/// # Errors
/// The thread cannot be started.
pub fn start() -> io::Result<()> {
    let (sender, receiver) = sync_channel(QUEUE);
    std::thread::Builder::new().name("log".to_owned()).spawn(move || write_all(&receiver, io::stderr()))?;
    SENDER.set(sender).ok();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| "info,russh=warn".into()))
        .with_target(false)
        .with_ansi(false)
        .without_time()
        .with_writer(|| Queue)
        .init();
    Ok(())
}

/// Waits until what was said is written, but not long.
pub fn flush() {
    let (sender, written) = sync_channel(1);
    if let Some(queue) = SENDER.get()
        && queue.send(Item::Flush(sender)).is_ok()
    {
        written.recv_timeout(FLUSH_WAIT).ok();
    }
}

fn write_all(queue: &Receiver<Item>, mut out: impl Write) {
    while let Ok(item) = queue.recv() {
        match item {
            // One write an event, so that lines of several programs do not mix. Nobody could be told of an error.
            Item::Event(event) => drop(out.write_all(&event)),
            Item::Flush(written) => drop(written.send(())),
        }
        let dropped = DROPPED.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            out.write_all(format!("nodemgr: {dropped} messages were dropped here\n").as_bytes()).ok();
        }
    }
}

struct Queue;

impl Write for Queue {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let item = Item::Event([b"nodemgr: ", event].concat());
        if SENDER.get().is_none_or(|queue| queue.try_send(item).is_err()) {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_written_in_order_and_dropped_ones_counted() {
        let (sender, receiver) = sync_channel(4);
        let (flushed, told) = sync_channel(1);
        for event in ["a\n", "b\n"] {
            sender.send(Item::Event(event.into())).unwrap();
        }
        sender.send(Item::Flush(flushed)).unwrap();
        drop(sender);
        DROPPED.store(3, Ordering::Relaxed);
        let mut out = Vec::new();
        write_all(&receiver, &mut out);
        told.try_recv().unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "a\nnodemgr: 3 messages were dropped here\nb\n");
    }
}
