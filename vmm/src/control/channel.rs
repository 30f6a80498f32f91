//! Lines with descriptors beside them over a Unix stream, both ends of the protocol.
//!
//! The kernel gives descriptors to the reader together with the bytes that they were sent with, so they arrive with the line's first byte or
//! earlier, never later. At most [`MAX_DESCRIPTORS`] are taken at a time; those beyond are closed by the kernel, and the reader is told.
#![forbid(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;

/// Most descriptors beside one line: a ring has three.
pub const MAX_DESCRIPTORS: usize = 4;

/// Whether a sender waits for a slow reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// A reader that leaves no room for the line is an error.
    Never,
    /// Waits as the stream does.
    Yes,
}

/// Sends `message` as one line, with `descriptors` beside it.
pub fn send(
    stream: impl AsFd,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
    patience: Patience,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one line"));
    }
    let mut flags = SendFlags::NOSIGNAL;
    flags.set(SendFlags::DONTWAIT, patience == Patience::Never);
    let sent = rustix::net::sendmsg(stream.as_fd(), &[io::IoSlice::new(&line)], &mut control, flags)?;
    // Any line is far smaller than a socket's buffer; a reader that filled it does not read.
    if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Reads some bytes, and the descriptors beside them. 0 is the end.
pub fn receive(
    stream: impl AsFd,
    buffer: &mut [u8],
    descriptors: &mut impl Extend<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [io::IoSliceMut::new(buffer)];
    let received = rustix::net::recvmsg(stream.as_fd(), &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("more than {MAX_DESCRIPTORS} descriptors beside one line"),
        ));
    }
    Ok(received.bytes)
}
