//! The two devices: a packet socket on the NIC, and the host's TAP. All of this crate's `unsafe`: structures and ioctls that rustix lacks.
//!
//! Neither ever waits. Frames are whole Ethernet frames, without checksum, of at most [`BUFFER`] bytes.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::io::Errno;

use crate::engine::packet::Mac;

/// Room for any frame, also for what the NIC joined before we could tell it not to.
pub const BUFFER: usize = 65536 + 64;

/// Frames the kernel holds for us, bytes.
const SOCKET_BUFFER: usize = 4 << 20;

const SIOCETHTOOL: u64 = 0x8946;
/// Commands of `linux/ethtool.h` that turn something off. Joined frames are longer than any sliver may get.
const OFFLOADS: [u32; 5] = [
    0x2c, // generic receive offload
    0x15, // receive checksums, without which virtio does not join frames either
    0x1f, // TCP segmentation
    0x24, // generic segmentation
    0x17, // transmit checksums
];
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_SFLAGS: u32 = 0x26;
const ETH_FLAG_LRO: u32 = 1 << 15;

/// The NIC.
#[derive(Debug)]
pub struct Nic {
    socket: OwnedFd,
    /// Its MAC address.
    pub mac: Mac,
}

/// What came from the NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// A frame of so many bytes; its TCP or UDP checksum may be only begun.
    Frame { length: usize, partial_checksum: bool },
    /// A frame that is not ours to see: sent by ourselves, of a VLAN, or cut.
    Ignored,
    /// Nothing now.
    Nothing,
}

impl Nic {
    /// Opens a packet socket that gets every frame of the interface.
    pub fn open(name: &str) -> io::Result<Self> {
        // Protocol 0: nothing is received until the socket is bound to one interface.
        // SAFETY: no pointers.
        let socket = unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
        };
        let socket = own(socket)?;
        let mut request = ifreq(name)?;
        ioctl(&socket, libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: SIOCGIFINDEX filled in this member.
        let index = unsafe { request.ifr_ifru.ifru_ifindex };
        let mut request = ifreq(name)?;
        ioctl(&socket, libc::SIOCGIFHWADDR, &mut request)?;
        // SAFETY: SIOCGIFHWADDR filled in this member.
        let address = unsafe { request.ifr_ifru.ifru_hwaddr };
        if address.sa_family != libc::ARPHRD_ETHER {
            return Err(io::Error::other("it is not an Ethernet interface"));
        }
        let mut mac = [0; 6];
        mac.iter_mut().zip(address.sa_data).for_each(|(to, from)| *to = from as u8);

        set_option(&socket, libc::PACKET_AUXDATA, 1)?;
        // Old kernels lack it; `Received::Ignored` does the same.
        let _ = set_option(&socket, libc::PACKET_IGNORE_OUTGOING, 1);
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER);

        // SAFETY: plain data, for which zeros are a value.
        let mut here: libc::sockaddr_ll = unsafe { zeroed() };
        here.sll_family = libc::AF_PACKET as u16;
        here.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        here.sll_ifindex = index;
        // SAFETY: the address is a sockaddr_ll of the length given, and is only read.
        let bound = unsafe {
            libc::bind(socket.as_raw_fd(), (&raw const here).cast(), size_of::<libc::sockaddr_ll>() as u32)
        };
        check(bound)?;
        Ok(Self { socket, mac })
    }

    /// Tells the NIC to join no frames. What it does not know, it does not do.
    pub fn disable_offloads(&self, name: &str) -> io::Result<()> {
        for command in OFFLOADS {
            let _ = self.ethtool(name, command, 0);
        }
        if let Ok(flags) = self.ethtool(name, ETHTOOL_GFLAGS, 0)
            && flags & ETH_FLAG_LRO != 0
        {
            self.ethtool(name, ETHTOOL_SFLAGS, flags & !ETH_FLAG_LRO)?;
        }
        Ok(())
    }

    fn ethtool(&self, name: &str, command: u32, data: u32) -> io::Result<u32> {
        // struct ethtool_value
        let mut value = [command, data];
        let mut request = ifreq(name)?;
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        ioctl(&self.socket, SIOCETHTOOL, &mut request)?;
        Ok(value[1])
    }

    /// Takes the next frame.
    pub fn recv(&self, buf: &mut [u8]) -> io::Result<Received> {
        // SAFETY: plain data, for which zeros are a value.
        let (mut from, mut message): (libc::sockaddr_ll, libc::msghdr) = unsafe { (zeroed(), zeroed()) };
        let mut control = [0u64; 16];
        let mut part = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = size_of::<libc::sockaddr_ll>() as u32;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: every pointer in `message` points to live memory of the length given beside it.
        let got = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        let Ok(length) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Received::Nothing),
                _ => Err(error),
            };
        };
        // SAFETY: `message` is as recvmsg left it, and its control buffer lives.
        let status = unsafe { auxiliary_status(&message) };
        if from.sll_pkttype == libc::PACKET_OUTGOING
            || status & libc::TP_STATUS_VLAN_VALID != 0
            || message.msg_flags & libc::MSG_TRUNC != 0
        {
            return Ok(Received::Ignored);
        }
        Ok(Received::Frame { length, partial_checksum: status & libc::TP_STATUS_CSUMNOTREADY != 0 })
    }

    /// Sends a frame.
    pub fn send(&self, frame: &[u8]) -> Result<(), Errno> {
        let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
        rustix::net::send(&self.socket, frame, flags).map(drop)
    }
}

impl AsFd for Nic {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The status bits of a received frame (PACKET_AUXDATA), 0 if there are none.
///
/// # Safety
/// `message` must be as a successful recvmsg left it, with its control buffer alive.
unsafe fn auxiliary_status(message: &libc::msghdr) -> u32 {
    // SAFETY: as the caller promises.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give headers within the buffer, and the kernel wrote a
        // whole tpacket_auxdata behind one of this type.
        unsafe {
            if (*header).cmsg_level == libc::SOL_PACKET && (*header).cmsg_type == libc::PACKET_AUXDATA {
                return libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned().tp_status;
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    0
}

/// The host's TAP.
#[derive(Debug)]
pub struct Tap(File);

impl Tap {
    /// Attaches to an existing persistent TAP. Without IFF_VNET_HDR the kernel hands over complete checksums and whole frames.
    pub fn open(name: &str) -> io::Result<Self> {
        // TUNSETIFF would make one, which would be gone with us, and the host's address with it.
        let socket =
            rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
        ioctl(&socket, libc::SIOCGIFINDEX, &mut ifreq(name)?).map_err(|error| {
            io::Error::new(error.kind(), format!("{error}: node-init makes it (ip tuntap add)"))
        })?;
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        let mut request = ifreq(name)?;
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
        ioctl(&file, libc::TUNSETIFF, &mut request)?;
        Ok(Self(file))
    }

    /// Takes the next frame, `None` if there is none now.
    pub fn recv(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        match rustix::io::read(&self.0, buf) {
            Ok(length) => Ok(Some(length)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives the host a frame; false if it did not take it.
    pub fn send(&self, frame: &[u8]) -> bool {
        rustix::io::write(&self.0, frame).is_ok()
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn ifreq(name: &str) -> io::Result<libc::ifreq> {
    let name = CString::new(name)?;
    // SAFETY: plain data, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    let bytes = name.as_bytes_with_nul();
    if bytes.len() > request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an interface's name has at most 15 bytes"));
    }
    request.ifr_name.iter_mut().zip(bytes).for_each(|(to, &from)| *to = from as libc::c_char);
    Ok(request)
}

fn ioctl(fd: &impl AsFd, number: u64, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: every request used here takes an ifreq; the one that holds a pointer (SIOCETHTOOL) is called with one to live memory.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), number, &raw mut *request) })
}

fn set_option(socket: &OwnedFd, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: the value is an int of the length given, and is only read.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            option,
            (&raw const value).cast(),
            size_of::<i32>() as u32,
        )
    })
}

fn own(fd: i32) -> io::Result<OwnedFd> {
    check(fd)?;
    // SAFETY: a descriptor just made, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
