//! The control socket's packets: one request in, with its descriptors, one response out. The other side is the node manager, trusted
//! but not to be waited for: a client that does not read its answers is disconnected.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use commonage_net_demux_api::control::{MAX_PACKET, Request, Response, SliverStatus};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// What a client's socket had to say.
#[derive(Debug)]
pub enum Incoming {
    /// A request and the descriptors that came with it.
    Request(Request, Vec<OwnedFd>),
    /// Something else, and what was wrong with it.
    Nonsense(String),
    /// Nothing now.
    Nothing,
    /// Goodbye.
    Closed,
}

/// Listens at `path`, instead of whoever listened there before: an earlier net-demux that is gone. Only root may connect.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::fs::chmod(path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
    rustix::net::listen(&socket, 16)?;
    Ok(socket)
}

/// Accepts a client, `None` if there is none now.
pub fn accept(listener: &OwnedFd) -> Option<OwnedFd> {
    rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).ok()
}

/// Takes the next request.
pub fn receive(client: BorrowedFd<'_>) -> Incoming {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message =
        match rustix::net::recvmsg(client, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
            Ok(message) => message,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Incoming::Nothing,
            Err(_) => return Incoming::Closed,
        };
    let mut fds = Vec::new();
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if message.bytes == 0 {
        return Incoming::Closed;
    }
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Incoming::Nonsense(format!(
            "the request is longer than {MAX_PACKET} bytes, or has too many descriptors"
        ));
    }
    match serde_json::from_slice(bytes.get(..message.bytes).unwrap_or(&[])) {
        Ok(request) => Incoming::Request(request, fds),
        Err(error) => Incoming::Nonsense(format!("this is not a request: {error}")),
    }
}

/// Answers; false if the client must be disconnected.
pub fn respond(client: BorrowedFd<'_>, response: &Response) -> bool {
    let Ok(bytes) = serde_json::to_vec(response) else { return false };
    let mut ancillary = SendAncillaryBuffer::default();
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    rustix::net::sendmsg(client.as_fd(), &[IoSlice::new(&bytes)], &mut ancillary, flags).is_ok()
}

/// As many of the first slivers as fit into one packet beside `reserved` bytes of other things.
pub fn fitting(slivers: Vec<SliverStatus>, reserved: usize) -> Vec<SliverStatus> {
    let mut room = MAX_PACKET.saturating_sub(reserved);
    let mut fits = |status: &SliverStatus| {
        let length = serde_json::to_vec(status).map_or(usize::MAX, |json| json.len() + 1);
        room.checked_sub(length).map(|left| room = left).is_some()
    };
    slivers.into_iter().take_while(|status| fits(status)).collect()
}
