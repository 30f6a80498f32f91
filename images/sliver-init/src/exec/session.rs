//! One command from [`Frame::Start`] to [`Frame::Exit`]: a loop around one `poll`, so that nothing waits for anything else.
//!
//! What always holds: at most [`MAX_BUFFERED`] bytes and a frame are kept for either direction. When the command takes no input, the host's
//! frames are left in the socket; when the host takes no output, the command's is left in its pipe: each end slows the other down.
//! A host that has closed its end is noticed all the same, and the command hung up.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use commonage_nodemgr_api::exec::{Decoder, Frame, FrameError, Start};
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::Signal;

use super::process::{self, Account, Process};
use crate::children::Children;

/// Bytes kept for a side that does not take them.
const MAX_BUFFERED: usize = 256 * 1024;
/// Bytes read at once. The room for them is never cleared: a sliver's memory is its own only where it was written.
const CHUNK: usize = 32 * 1024;
/// How long the host has to say what to run.
const START_PATIENCE: Duration = Duration::from_secs(10);
/// How long output may come after the command has exited, when something it left holds its pipes: for silence, and in all.
const GRACE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// End of file, as typed on a terminal (VEOF).
const END_OF_TRANSMISSION: u8 = 4;

/// Bytes on their way out.
#[derive(Debug, Default)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
}

impl Outgoing {
    fn len(&self) -> usize {
        self.bytes.len().saturating_sub(self.sent)
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds bytes. What was sent is let go of in time: a receiver that is never quite done must not make this grow.
    fn push(&mut self, bytes: &[u8]) {
        if self.sent >= MAX_BUFFERED {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Writes what `to` takes now.
    fn write(&mut self, to: &OwnedFd) -> rustix::io::Result<()> {
        while let Some(rest @ [_, ..]) = self.bytes.get(self.sent..) {
            match rustix::io::write(to, rest) {
                Ok(n) => self.sent = self.sent.saturating_add(n),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(e) => return Err(e),
            }
        }
        if self.is_empty() {
            self.clear();
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.sent = 0;
    }
}

/// What a poll found ready.
#[derive(Debug, Default)]
struct Ready {
    nothing: bool,
    host_gone: bool,
    host_readable: bool,
    host_writable: bool,
    input: bool,
    output: bool,
    error: bool,
    exit: bool,
}

/// Says that no command is run here.
///
/// # Errors
/// The host does not take even that.
pub fn refuse(host: &OwnedFd, why: &str) -> io::Result<()> {
    let frame = Frame::Error(why.to_owned()).encode().map_err(broken)?;
    // A fresh connection has room for a line.
    rustix::io::write(host, &frame)?;
    Ok(())
}

/// A connection and what is under way on it.
#[derive(Debug)]
pub struct Session {
    host: OwnedFd,
    decoder: Decoder,
    to_host: Outgoing,
    to_command: Outgoing,
    /// The host said that no more input comes.
    input_ended: bool,
}

impl Session {
    /// # Errors
    /// The descriptor cannot be made non-blocking.
    pub fn new(host: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&host, true)?;
        Ok(Self {
            host,
            decoder: Decoder::default(),
            to_host: Outgoing::default(),
            to_command: Outgoing::default(),
            input_ended: false,
        })
    }

    /// Everything, from the first frame to the last.
    pub fn run(mut self, children: &Children, account: &Account) -> io::Result<()> {
        let Some(start) = self.await_start()? else { return Ok(()) };
        match process::spawn(&start, account, children) {
            Ok(process) => self.attend(process, children),
            Err(e) => {
                self.say(&Frame::Error(e.to_string()))?;
                self.flush()
            }
        }
    }

    /// The first frame; `None` if the host went away instead.
    fn await_start(&mut self) -> io::Result<Option<Start>> {
        let end = Instant::now() + START_PATIENCE;
        loop {
            match self.decoder.next_frame().map_err(broken)? {
                Some(Frame::Start(start)) => return Ok(Some(start)),
                Some(_) => return Err(io::Error::other("the first frame does not say what to run")),
                None => {}
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            poll(&mut [PollFd::new(&self.host, PollFlags::IN)], Some(left))?;
            if !self.read_host()? {
                return Ok(None);
            }
        }
    }

    /// Carries bytes to and fro until the command has ended and all it wrote is on its way.
    fn attend(&mut self, mut process: Process, children: &Children) -> io::Result<()> {
        let mut ended: Option<(i32, Instant)> = None;
        loop {
            if let Err(e) = self.take_frames(&mut process, children) {
                hang_up(&process, children);
                return Err(e);
            }
            if self.input_ended && self.to_command.is_empty() && process.terminal.is_none() {
                process.input = None;
            }
            if let Some((status, at)) = ended {
                let silent = process.output.is_none() && process.error.is_none();
                if self.to_host.is_empty() && (silent || at.elapsed() > GRACE.1) {
                    self.say(&Frame::Exit(status))?;
                    return self.flush();
                }
            }
            let ready = self.wait(&process, ended.is_some())?;
            if ready.host_gone || (ready.host_readable && !self.read_host().unwrap_or(false)) {
                hang_up(&process, children);
                return Ok(());
            }
            if ready.nothing {
                // Only after the end: whoever holds the pipes has nothing to say.
                (process.output, process.error) = (None, None);
            }
            if ready.exit {
                ended = Some((process.exit.take(), Instant::now()));
                (process.input, self.input_ended) = (None, true);
                self.to_command.clear();
            }
            if ready.output {
                self.read_command(&mut process.output, Frame::Stdout)?;
            }
            if ready.error {
                self.read_command(&mut process.error, Frame::Stderr)?;
            }
            if ready.input {
                self.write_command(&mut process.input);
            }
            if ready.host_writable && self.to_host.write(&self.host).is_err() {
                hang_up(&process, children);
                return Ok(());
            }
        }
    }

    /// Waits until something can be done.
    fn wait<'process>(&'process self, process: &'process Process, ended: bool) -> io::Result<Ready> {
        let when = |condition: bool, flags| if condition { flags } else { PollFlags::empty() };
        let reads_host = self.to_command.len() < MAX_BUFFERED;
        let reads_command = self.to_host.len() < MAX_BUFFERED;
        let host = PollFlags::RDHUP
            | when(reads_host, PollFlags::IN)
            | when(!self.to_host.is_empty(), PollFlags::OUT);
        let mut fds = vec![PollFd::new(&self.host, host)];
        // A descriptor that is listed reports its errors and hang-ups even when nothing is asked: those of no use now are left out.
        let mut add = |fd: Option<BorrowedFd<'process>>, condition: bool, flags| {
            fds.push(PollFd::from_borrowed_fd(fd.filter(|_| condition)?, flags));
            fds.len().checked_sub(1)
        };
        let fd = |fd: &'process Option<OwnedFd>| fd.as_ref().map(OwnedFd::as_fd);
        let input = add(fd(&process.input), !self.to_command.is_empty(), PollFlags::OUT);
        let output = add(fd(&process.output), reads_command, PollFlags::IN);
        let error = add(fd(&process.error), reads_command, PollFlags::IN);
        let exit = add(Some(process.exit.as_fd()), !ended, PollFlags::IN);
        let count = poll(&mut fds, (ended && self.to_host.is_empty()).then_some(GRACE.0))?;
        let ready =
            |index: Option<usize>| index.and_then(|i| fds.get(i)).is_some_and(|fd| !fd.revents().is_empty());
        let host = fds.first().map_or(PollFlags::empty(), PollFd::revents);
        Ok(Ready {
            nothing: count == 0,
            host_gone: host.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR),
            host_readable: host.contains(PollFlags::IN),
            host_writable: host.contains(PollFlags::OUT),
            input: ready(input),
            output: ready(output),
            error: ready(error),
            exit: ready(exit),
        })
    }

    /// Reads frames as bytes; whether the host is still there.
    fn read_host(&mut self) -> io::Result<bool> {
        let mut bytes = Vec::with_capacity(CHUNK);
        match rustix::io::read(&self.host, spare_capacity(&mut bytes)) {
            Ok(0) => Ok(false),
            Ok(_) => {
                self.decoder.push(&bytes);
                Ok(true)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(true),
            Err(e) => Err(e.into()),
        }
    }

    /// Does what the frames that are complete say, as long as there is room for input.
    fn take_frames(&mut self, process: &mut Process, children: &Children) -> io::Result<()> {
        while self.to_command.len() < MAX_BUFFERED {
            let Some(frame) = self.decoder.next_frame().map_err(broken)? else { return Ok(()) };
            match frame {
                // Input for a command that has closed its end, or ended, goes nowhere; that is not the host's mistake.
                Frame::Stdin(bytes) if !self.input_ended => self.to_command.push(&bytes),
                Frame::Stdin(_) => {}
                Frame::StdinEof => {
                    if process.terminal.is_some() && !self.input_ended {
                        self.to_command.push(&[END_OF_TRANSMISSION]);
                    }
                    self.input_ended = true;
                }
                Frame::Resize(size) => {
                    if let Some(terminal) = &process.terminal {
                        process::resize(terminal, size)?;
                    }
                }
                Frame::Signal(number) => {
                    if let Some(signal) = Signal::from_named_raw(number.into()) {
                        signal_command(process, children, signal);
                    }
                }
                Frame::Start(_) | Frame::Stdout(_) | Frame::Stderr(_) | Frame::Exit(_) | Frame::Error(_) => {
                    return Err(io::Error::other("the host sent a frame that is not its to send"));
                }
            }
        }
        Ok(())
    }

    /// Reads what the command wrote; drops the descriptor at its end.
    fn read_command(
        &mut self,
        from: &mut Option<OwnedFd>,
        frame: impl FnOnce(Vec<u8>) -> Frame,
    ) -> io::Result<()> {
        let Some(fd) = from else { return Ok(()) };
        let mut bytes = Vec::with_capacity(CHUNK);
        match rustix::io::read(&*fd, spare_capacity(&mut bytes)) {
            Ok(1..) => self.say(&frame(bytes)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            // A terminal that nobody has open any more says EIO.
            _ => {
                *from = None;
                Ok(())
            }
        }
    }

    /// Writes input; drops the descriptor when the command has closed its end, or no more comes.
    fn write_command(&mut self, to: &mut Option<OwnedFd>) {
        let Some(fd) = to else { return };
        if self.to_command.write(fd).is_err() {
            (*to, self.input_ended) = (None, true);
            self.to_command.clear();
        }
    }

    fn say(&mut self, frame: &Frame) -> io::Result<()> {
        self.to_host.push(&frame.encode().map_err(broken)?);
        Ok(())
    }

    /// Writes all that is left; gives up when the host goes away.
    fn flush(&mut self) -> io::Result<()> {
        loop {
            self.to_host.write(&self.host)?;
            if self.to_host.is_empty() {
                return Ok(());
            }
            poll(&mut [PollFd::new(&self.host, PollFlags::OUT)], None)?;
        }
    }
}

/// Signals whatever runs in the foreground: on a terminal its foreground group, otherwise the command's own.
fn signal_command(process: &Process, children: &Children, signal: Signal) {
    match process.terminal.as_ref().and_then(|t| rustix::termios::tcgetpgrp(t).ok()) {
        Some(group) => {
            let _ = rustix::process::kill_process_group(group, signal);
        }
        None => children.signal_group(process.pid, signal),
    }
}

/// The host is gone: what a terminal does when its line is cut. Closing the descriptors, which follows, does the rest.
fn hang_up(process: &Process, children: &Children) {
    for signal in [Signal::HUP, Signal::CONT] {
        signal_command(process, children, signal);
        children.signal_group(process.pid, signal);
    }
}

fn broken(e: FrameError) -> io::Error {
    io::Error::other(e)
}

/// Number of descriptors that are ready; 0 when the time is over.
fn poll(fds: &mut [PollFd<'_>], patience: Option<Duration>) -> io::Result<usize> {
    let patience = patience.map(|p| Timespec {
        tv_sec: p.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: p.subsec_nanos().into(),
    });
    loop {
        match rustix::event::poll(fds, patience.as_ref()) {
            Err(Errno::INTR) => {}
            done => return Ok(done?),
        }
    }
}
