//! `ctl SOCKET console`: this terminal becomes the guest's, until Ctrl-] is typed or the machine ends.

use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// Ctrl-]: what telnet took.
const ESCAPE: u8 = 0x1d;

/// Raw mode for as long as it lives, if standard input is a terminal.
struct Raw(Option<Termios>);

impl Raw {
    fn new() -> io::Result<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self(None));
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // It was settable a moment ago; nothing is left to be done if it no longer is.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}

/// Makes this terminal, if it is one, the machine's; `first` was read of it already.
pub fn attach(first: &[u8], machine: UnixStream) -> io::Result<()> {
    let raw = Raw::new()?;
    if raw.0.is_some() {
        eprint!("attached; Ctrl-] detaches\r\n");
    }
    let escape = raw.0.as_ref().map(|_| ESCAPE);
    copy(first, machine, escape, |_| Ok(()))
}

/// Copies both ways between standard input and output and `peer`, until the peer ends or `escape` is typed; `first` was read of the peer already.
/// The end of standard input ends only the typing, after `at_end`.
pub fn copy(
    first: &[u8],
    mut peer: UnixStream,
    escape: Option<u8>,
    at_end: impl Fn(&UnixStream) -> io::Result<()>,
) -> io::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(first)?;
    stdout.flush()?;
    let mut typing = true;
    loop {
        let stdin = io::stdin();
        let mut fds = vec![PollFd::new(&peer, PollFlags::IN)];
        if typing {
            fds.push(PollFd::new(&stdin, PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut buffer = [0; 4096];
        if ready.first() == Some(&true) {
            let count = peer.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            stdout.write_all(buffer.get(..count).unwrap_or_default())?;
            stdout.flush()?;
        }
        if ready.get(1) == Some(&true) {
            let count = rustix::io::read(&stdin, &mut buffer)?;
            let typed = buffer.get(..count).unwrap_or_default();
            let detach = typed.iter().position(|byte| Some(*byte) == escape);
            peer.write_all(typed.get(..detach.unwrap_or(count)).unwrap_or_default())?;
            if detach.is_some() {
                return Ok(());
            }
            if count == 0 {
                typing = false;
                at_end(&peer)?;
            }
        }
    }
}
