//! One connection to a machine's control socket: requests out, answers in, descriptors beside both.
//!
//! The machine may be in its tenant's hands, so an answer is at most [`MAX_LINE`] bytes and at most [`MAX_DESCRIPTORS`] descriptors wait for
//! the line they came with. Descriptors arrive with a line's first byte, in the order of the lines.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use commonage_vmm_api::{Request, Response};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Longest answer, bytes: 4 KiB of console, each byte of which may be six of JSON, and some more.
const MAX_LINE: usize = 64 * 1024;
/// Most descriptors beside one line: a network ring's.
const MAX_ATTACHED: usize = 3;
/// Most descriptors that wait for their lines.
const MAX_DESCRIPTORS: usize = 64;

/// A connection.
#[derive(Debug)]
pub struct Wire {
    stream: UnixStream,
    input: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Wire {
    /// Connects to the control socket at `path`.
    pub async fn connect(path: &Path) -> io::Result<Self> {
        Ok(Self::new(UnixStream::connect(path).await?))
    }

    fn new(stream: UnixStream) -> Self {
        Self { stream, input: Vec::new(), descriptors: VecDeque::new() }
    }

    /// Sends a request, with descriptors beside it.
    pub async fn send(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        // A request is far smaller than a socket's buffer, so it is sent whole or the machine does not read.
        let sent =
            self.stream.async_io(Interest::WRITABLE, || send(&self.stream, &line, descriptors)).await?;
        if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// The next answer. Cancel safe.
    pub async fn next(&mut self) -> io::Result<Response> {
        loop {
            if let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                return Ok(serde_json::from_slice(&line)?);
            }
            if self.input.len() >= MAX_LINE {
                return Err(invalid("the machine answers without end"));
            }
            let (bytes, descriptors) =
                self.stream.async_io(Interest::READABLE, || receive(&self.stream)).await?;
            if bytes.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.input.extend(bytes);
            self.descriptors.extend(descriptors);
            if self.descriptors.len() > MAX_DESCRIPTORS {
                return Err(invalid("the machine sends descriptors that no answer speaks of"));
            }
        }
    }

    /// The oldest descriptors that came beside answers, exactly `N`.
    pub fn take<const N: usize>(&mut self) -> io::Result<[OwnedFd; N]> {
        let count = N.min(self.descriptors.len());
        let taken: Vec<OwnedFd> = self.descriptors.drain(..count).collect();
        taken.try_into().map_err(|_| invalid("descriptors are missing beside the machine's answer"))
    }

    /// Whether nothing came that was not asked for.
    pub fn is_drained(&self) -> bool {
        self.input.is_empty() && self.descriptors.is_empty()
    }
}

fn send(stream: &UnixStream, line: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    Ok(rustix::net::sendmsg(stream, &[IoSlice::new(line)], &mut control, flags)?)
}

/// What has come; the kernel never hands out two messages' descriptors at once.
fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut buffer = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut buffer)], &mut control, flags)?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(invalid("the machine sends more descriptors than an answer has"));
    }
    Ok((buffer.get(..got.bytes).unwrap_or_default().to_vec(), descriptors))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
