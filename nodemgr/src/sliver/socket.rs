//! One end of a connection that a guest made to the host, handed over by its machine.
//!
//! The machine keeps a descriptor of the same open file and may be in its tenant's hands: it could make reads block by clearing
//! `O_NONBLOCK`. So nothing here relies on that flag: every call says `MSG_DONTWAIT` itself.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

/// A guest's connection.
#[derive(Debug)]
pub struct GuestSocket(UnixStream);

impl GuestSocket {
    /// Takes the descriptor, if it is a Unix stream socket.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let stream = sockopt::socket_type(&descriptor)? == SocketType::STREAM;
        if !stream || sockopt::socket_domain(&descriptor)? != AddressFamily::UNIX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no Unix stream socket"));
        }
        let stream = std::os::unix::net::UnixStream::from(descriptor);
        // Only so that tokio takes it.
        stream.set_nonblocking(true)?;
        Ok(Self(UnixStream::from_std(stream)?))
    }
}

impl AsyncRead for GuestSocket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            let receive =
                || Ok(rustix::net::recv(&self.0, &mut *buf.initialize_unfilled(), RecvFlags::DONTWAIT)?.0);
            match self.0.try_io(Interest::READABLE, receive) {
                Ok(count) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

impl AsyncWrite for GuestSocket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match self.0.try_io(Interest::WRITABLE, || Ok(rustix::net::send(&self.0, bytes, flags)?)) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                sent => return Poll::Ready(sent),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn a_machine_that_makes_its_socket_block_stops_nobody() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let kept = ours.try_clone().unwrap();
        let mut socket = GuestSocket::new(ours.into()).unwrap();
        kept.set_nonblocking(false).unwrap();
        // One thread runs this test: a second read that blocked would keep the second byte from being written.
        let (first, read_first) = tokio::sync::oneshot::channel();
        let read = async {
            let x = socket.read_u8().await.unwrap();
            first.send(()).unwrap();
            (x, socket.read_u8().await.unwrap())
        };
        let write = async {
            rustix::io::write(&theirs, b"x").unwrap();
            read_first.await.unwrap();
            rustix::io::write(&theirs, b"y").unwrap();
        };
        let (read, ()) = tokio::join!(read, write);
        assert_eq!(read, (b'x', b'y'));
        // Full, then drained: writes wait for room without blocking the thread.
        let write = async {
            for _ in 0..64 {
                socket.write_all(&[7; 65536]).await.unwrap();
            }
            socket.shutdown().await.unwrap();
        };
        theirs.set_nonblocking(true).unwrap();
        let mut theirs = UnixStream::from_std(theirs).unwrap();
        let mut all = Vec::new();
        let (_, read) = tokio::join!(write, theirs.read_to_end(&mut all));
        assert_eq!(read.unwrap(), 64 * 65536);
    }

    #[tokio::test]
    async fn only_a_unix_stream_is_taken() {
        let null = std::fs::File::open("/dev/null").unwrap();
        GuestSocket::new(null.into()).unwrap_err();
        let (datagram, _) = std::os::unix::net::UnixDatagram::pair().unwrap();
        GuestSocket::new(datagram.into()).unwrap_err();
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        GuestSocket::new(udp.into()).unwrap_err();
    }
}
