//! The Unix sockets on the host's side: the listening one, where host programs ask for a guest's port by a line, and the pairs by which
//! the guest's connections are handed to the client that accepts them.
//!
//! Nothing here blocks: every socket of ours is non-blocking from its creation. Nothing is connected to by path.

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, chmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    recv, send, socket_with, socketpair,
};

use super::VsockError;

/// Longest request line, its newline included: `CONNECT 4294967295\n` and some.
const MAX_LINE: usize = 32;
/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;

/// The listening socket. Its file goes when it is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

impl Listener {
    /// Creates the socket at `path` for its owner alone (mode 0600), in place of one that an earlier process left.
    pub fn create(path: &Path) -> Result<Self, VsockError> {
        let failed = |what: &'static str| {
            move |source: io::Error| VsockError::Socket { path: path.to_owned(), what, source }
        };
        let Ok(address) = SocketAddrUnix::new(path) else {
            return Err(VsockError::PathTooLong { path: path.to_owned() });
        };
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => {
                fs::remove_file(path).map_err(failed("remove the stale socket"))?;
            }
            Ok(_) => return Err(VsockError::InTheWay { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look for a stale socket")(error)),
        }
        let create = || -> io::Result<OwnedFd> {
            let socket = new_socket()?;
            bind(&socket, &address)?;
            chmod(path, Mode::RUSR | Mode::WUSR)?;
            // Nobody can connect before this, so nobody can before the mode is right.
            listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        let socket = create().map_err(failed("create the socket"))?;
        Ok(Self { socket, path: path.to_owned() })
    }

    /// The next client; `None` when there is none now.
    pub fn accept(&self) -> io::Result<Option<OwnedFd>> {
        loop {
            match accept_with(&self.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(client) => return Ok(Some(client)),
                Err(Errno::AGAIN) => return Ok(None),
                // The client that was next has left already.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The socket, to be polled.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // After the privileges are gone this may be forbidden; the next process removes what is left.
        let _ = fs::remove_file(&self.path);
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Where the guest's connections to ports of the host go: is given the port and the client's end of a connection, of which it keeps a copy.
pub type Accepter = Box<dyn FnMut(u32, BorrowedFd<'_>) -> io::Result<()> + Send>;

/// A connection: our end, which does not block, and the client's, which is as clients expect a descriptor to be.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}

/// What reading a stream gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Later,
    /// The peer sends no more.
    End,
    /// The peer is gone.
    Broken,
}

/// Reads into `buffer`, which must not be empty.
pub fn read(stream: &OwnedFd, buffer: &mut [u8]) -> Read {
    receive(stream, buffer, RecvFlags::empty())
}

fn receive(stream: &OwnedFd, buffer: &mut [u8], flags: RecvFlags) -> Read {
    loop {
        match recv(stream, &mut *buffer, flags) {
            Ok((_, 0)) => return Read::End,
            Ok((_, count)) => return Read::Bytes(count),
            Err(Errno::AGAIN) => return Read::Later,
            Err(Errno::INTR) => {}
            Err(_) => return Read::Broken,
        }
    }
}

/// Writes some of `bytes`; `Ok(0)` when there is no room now, an error when the peer does not receive any more.
pub fn write(stream: &OwnedFd, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match send(stream, bytes, SendFlags::NOSIGNAL) {
            Ok(count) => return Ok(count),
            Err(Errno::AGAIN) => return Ok(0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A host program that has not said yet which port it wants.
#[derive(Debug)]
pub struct Greeting {
    /// The connection to it.
    pub stream: OwnedFd,
    line: Vec<u8>,
}

/// What a [`Greeting`] has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Greeted {
    /// The line is not complete.
    Later,
    /// It wants the guest's port.
    Connect(u32),
    /// It left, or said something else.
    Never,
}

impl Greeting {
    /// A client that has said nothing yet.
    pub fn new(stream: OwnedFd) -> Self {
        Self { stream, line: Vec::new() }
    }

    /// Reads on, and not a byte beyond the newline: what follows is the guest's.
    pub fn read(&mut self) -> Greeted {
        loop {
            let mut ahead = [0; MAX_LINE];
            let room = MAX_LINE.saturating_sub(self.line.len());
            let Some(ahead) = ahead.get_mut(..room).filter(|ahead| !ahead.is_empty()) else {
                return Greeted::Never;
            };
            let peeked = match receive(&self.stream, ahead, RecvFlags::PEEK) {
                Read::Bytes(count) => ahead.get(..count).unwrap_or_default(),
                Read::Later => return Greeted::Later,
                Read::End | Read::Broken => return Greeted::Never,
            };
            let newline = peeked.iter().position(|byte| *byte == b'\n');
            let mut taken = vec![0; newline.map_or(peeked.len(), |at| at + 1)];
            // What was peeked at is there, in full.
            if read(&self.stream, &mut taken) != Read::Bytes(taken.len()) {
                return Greeted::Never;
            }
            self.line.append(&mut taken);
            if newline.is_some() {
                return parse(&self.line).map_or(Greeted::Never, Greeted::Connect);
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let port = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?.strip_suffix('\n')?;
    // `parse` would take a sign as well.
    port.bytes().all(|byte| byte.is_ascii_digit()).then_some(())?;
    port.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn requests_are_strict() {
        assert_eq!(parse(b"CONNECT 808\n"), Some(808));
        assert_eq!(parse(b"CONNECT 4294967295\n"), Some(u32::MAX));
        for bad in ["CONNECT 4294967296\n", "CONNECT +1\n", "CONNECT \n", "connect 1\n", "CONNECT 1 \n", "\n"]
        {
            assert_eq!(parse(bad.as_bytes()), None, "{bad:?}");
        }
    }

    #[test]
    fn a_request_may_come_in_pieces_and_with_data_behind() {
        let (mut client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        let mut greeting = Greeting::new(server.into());
        assert_eq!(greeting.read(), Greeted::Later);
        client.write_all(b"CONN").unwrap();
        assert_eq!(greeting.read(), Greeted::Later);
        client.write_all(b"ECT 7\nhello").unwrap();
        assert_eq!(greeting.read(), Greeted::Connect(7));
        let mut rest = [0; 16];
        assert_eq!(read(&greeting.stream, &mut rest), Read::Bytes(5));
        assert_eq!(&rest[..5], b"hello");
    }

    #[test]
    fn an_endless_request_is_cut() {
        let (mut client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        let mut greeting = Greeting::new(server.into());
        client.write_all(&[b'x'; 1000]).unwrap();
        assert_eq!(greeting.read(), Greeted::Never);
    }

    #[test]
    fn only_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());

        fs::write(&path, "precious").unwrap();
        assert!(matches!(Listener::create(&path), Err(VsockError::InTheWay { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");

        let long = dir.path().join("x".repeat(108));
        assert!(matches!(Listener::create(&long), Err(VsockError::PathTooLong { .. })));
    }
}
