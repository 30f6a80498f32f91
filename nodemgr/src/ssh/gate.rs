//! Flow control from the peer to the commands of one connection.
//!
//! russh grants a channel new window as soon as data arrives, whether or not anybody took it, and cannot be told to wait. If the
//! handler waited instead, the whole connection would: a command that writes before it goes on reading (`cat`) would never be
//! able to, and stop for good. So the handler never waits: input that is not taken is counted here, and three things bound it.
//!
//! 1. With much of it waiting, granted windows shrink ([`Gate::window`]).
//! 2. Over [`HIGH`] bytes the connection is not read until half is taken, unless output waits: the peer's leave to
//!    send more output (WINDOW_ADJUST) lies behind the input in the same stream, so then reading must go on.
//! 3. Over [`MOST`] bytes, which takes a peer that goes on sending but takes no output, the connection ends and says why.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::Interval;

/// Window granted to a channel whose input is taken, and to one whose input is not, bytes.
pub(super) const WINDOW: u32 = 1 << 20;
const SMALL_WINDOW: u32 = 32 << 10;
/// Waiting input from which windows are small, reading stops, and the connection ends, bytes.
const LOW: usize = 256 << 10;
const HIGH: usize = 1 << 20;
const MOST: usize = 2 << 20;
/// How often a connection that is not read is looked at for its end.
const LOOK: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct State {
    /// Input that commands have not taken, bytes.
    waiting: usize,
    /// Sessions whose output waits for the peer.
    blocked_outputs: usize,
    /// Reading stopped at [`HIGH`], until half is taken.
    closed: bool,
    cut: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// Counts what waits on one connection. Clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Gate(Arc<(Mutex<State>, Notify)>);

impl Gate {
    pub(super) fn new() -> Self {
        Self(Arc::new((Mutex::default(), Notify::new())))
    }

    /// Input came that waits for a command as long as what is returned lives.
    pub(super) fn hold(&self, bytes: usize) -> Held {
        let mut state = self.lock();
        state.waiting = state.waiting.saturating_add(bytes);
        state.closed |= state.waiting >= HIGH;
        if state.waiting > MOST {
            self.0.1.notify_one();
        }
        Held { gate: self.clone(), bytes }
    }

    /// A session's output waits for the peer as long as what is returned lives.
    pub(super) fn block_output(&self) -> BlockedOutput {
        let mut state = self.lock();
        state.blocked_outputs = state.blocked_outputs.saturating_add(1);
        wake(&mut state.reader);
        BlockedOutput(self.clone())
    }

    /// The window to grant from now on, bytes.
    pub(super) fn window(&self) -> u32 {
        if self.lock().waiting < LOW { WINDOW } else { SMALL_WINDOW }
    }

    /// Returns when more waits than ever may; with what to tell the peer.
    pub(super) async fn overrun(&self) -> &'static str {
        self.0.1.notified().await;
        "too much input waits for a command, while its output is not read here"
    }

    /// Ends the connection for both halves, whatever they wait for.
    pub(super) fn cut(&self) {
        let mut state = self.lock();
        state.cut = true;
        wake(&mut state.reader);
        wake(&mut state.writer);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

/// See [`Gate::hold`].
#[derive(Debug)]
pub(super) struct Held {
    gate: Gate,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.waiting = state.waiting.saturating_sub(self.bytes);
        if state.closed && state.waiting <= HIGH / 2 {
            state.closed = false;
            wake(&mut state.reader);
        }
    }
}

/// See [`Gate::block_output`].
#[derive(Debug)]
pub(super) struct BlockedOutput(Gate);

impl Drop for BlockedOutput {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.blocked_outputs = state.blocked_outputs.saturating_sub(1);
    }
}

/// A connection that is read as the gate allows.
#[derive(Debug)]
pub(super) struct Gated {
    stream: TcpStream,
    gate: Gate,
    look: Interval,
}

impl Gated {
    pub(super) fn new(stream: TcpStream, gate: Gate) -> Self {
        Self { stream, gate, look: tokio::time::interval(LOOK) }
    }
}

/// Whether the peer has closed, or is lost, although what it sent before is not read.
fn ended(stream: &TcpStream) -> bool {
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&none)).is_ok_and(|n| n > 0)
        && fds.iter().any(|fd| fd.revents().intersects(gone))
}

impl AsyncRead for Gated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        {
            let mut state = self.gate.lock();
            if state.cut {
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
            // Kept in any case: a cut must wake a read that waits for bytes too.
            state.reader = Some(cx.waker().clone());
            let closed = state.closed && state.blocked_outputs == 0;
            drop(state);
            if closed {
                while self.look.poll_tick(cx).is_ready() {
                    if ended(&self.stream) {
                        return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                    }
                }
                return Poll::Pending;
            }
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Gated {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        {
            let mut state = self.gate.lock();
            if state.cut {
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
            state.writer = Some(cx.waker().clone());
        }
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connect = TcpStream::connect(listener.local_addr().unwrap());
        let (client, server) = tokio::join!(connect, listener.accept());
        (client.unwrap(), server.unwrap().0)
    }

    /// Whether the stream yields a byte now, having yielded to everything else first.
    async fn reads(stream: &mut Gated) -> bool {
        tokio::select! {
            biased;
            read = stream.read_u8() => read.is_ok(),
            () = async { for _ in 0..100 { tokio::task::yield_now().await } } => false,
        }
    }

    #[tokio::test]
    async fn reading_stops_when_much_waits_and_output_does_not() {
        let (mut client, server) = pair().await;
        let gate = Gate::new();
        let mut stream = Gated::new(server, gate.clone());
        client.write_all(b"abcdef").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'a');
        let (some, most) = (gate.hold(100), gate.hold(HIGH));
        assert_eq!(gate.window(), SMALL_WINDOW);
        assert!(!reads(&mut stream).await);
        let blocked = gate.block_output();
        assert!(reads(&mut stream).await);
        drop(blocked);
        drop(some);
        assert!(!reads(&mut stream).await);
        drop(most);
        assert!(reads(&mut stream).await);
        assert_eq!(gate.window(), WINDOW);
    }

    #[tokio::test]
    async fn a_peer_that_closes_is_noticed_though_it_is_not_read() {
        let (mut client, server) = pair().await;
        let gate = Gate::new();
        let mut stream = Gated::new(server, gate.clone());
        client.write_all(b"unread").await.unwrap();
        let _held = gate.hold(HIGH);
        drop(client);
        tokio::time::pause();
        assert_eq!(stream.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn overrun_and_cut_are_told() {
        let (_client, server) = pair().await;
        let gate = Gate::new();
        let _held = gate.hold(MOST + 1);
        assert!(gate.overrun().await.contains("input"));
        let mut stream = Gated::new(server, gate.clone());
        let (read, ()) = tokio::join!(stream.read_u8(), async { gate.cut() });
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }
}
