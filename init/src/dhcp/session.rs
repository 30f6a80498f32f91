//! Gives the DHCP machine a socket and a clock.
//!
//! The socket is bound to one interface and sends limited broadcasts, which Linux does without an address; answers are
//! asked for as broadcasts, so they come in without one too.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use super::{Lease, Machine, Output};
use crate::{
    error::{Context as _, Error, Result},
    poll,
};

const CLIENT_PORT: u16 = 68;
const SERVER_PORT: u16 = 67;

/// What became of the lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Configure this.
    Bound(Lease),
    /// The address must not be used any more.
    Lost,
}

/// A DHCP client at work.
pub struct Session {
    socket: UdpSocket,
    machine: Machine,
    epoch: Instant,
}

impl Session {
    /// Starts on an interface that is up.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn start(interface: &str, mac: [u8; 6]) -> Result<Self> {
        let what = || format!("open a DHCP socket on {interface}");
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).map_err(io::Error::other).what(what)?;
        let epoch = Instant::now();
        let machine = Machine::new(mac, u64::from_ne_bytes(seed), Duration::ZERO);
        Ok(Self { socket: socket(interface).what(what)?, machine, epoch })
    }

    /// When [`Session::step`] wants to be called at the latest.
    pub fn deadline(&self) -> Instant {
        self.epoch + self.machine.deadline()
    }

    /// Whether a lease holds.
    pub fn has_lease(&self) -> bool {
        self.machine.lease().is_some()
    }

    /// Does what is due and takes what has come, without waiting.
    ///
    /// # Errors
    /// When nothing can be sent, as through an interface that is gone; it is tried again at the next deadline.
    pub fn step(&mut self) -> Result<Vec<Change>> {
        let mut outputs = self.machine.on_time(self.epoch.elapsed());
        let mut datagram = [0; 1_500];
        loop {
            match self.socket.recv(&mut datagram) {
                Ok(length) => {
                    let bytes = datagram.get(..length).unwrap_or_default();
                    outputs.extend(self.machine.on_datagram(self.epoch.elapsed(), bytes));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // An earlier datagram's ICMP error; the timers take care.
                Err(_) => continue,
            }
        }
        let mut changes = Vec::new();
        let mut failed = None;
        for output in outputs {
            match output {
                Output::Send { to, bytes } => {
                    let sent = self.socket.send_to(&bytes, SocketAddrV4::new(to, SERVER_PORT));
                    failed = sent.what(|| format!("send a DHCP message to {to}")).err().or(failed);
                }
                Output::Bound(lease) => changes.push(Change::Bound(lease)),
                Output::Lost => changes.push(Change::Lost),
            }
        }
        match failed {
            Some(e) if changes.is_empty() => Err(e),
            _ => Ok(changes),
        }
    }

    /// Waits for the first lease.
    ///
    /// # Errors
    /// [`Error::TimedOut`] after `patience`.
    pub fn acquire(&mut self, interface: &str, patience: Duration) -> Result<Lease> {
        let end = Instant::now() + patience;
        loop {
            for change in self.step()? {
                if let Change::Bound(lease) = change {
                    return Ok(lease);
                }
            }
            if Instant::now() >= end {
                let seconds = patience.as_secs();
                return Err(Error::TimedOut(format!(
                    "no DHCP server answered on {interface} within {seconds} s; check the cable and the network's DHCP server"
                )));
            }
            poll::wait(&[self.socket.as_fd()], Some(self.deadline().min(end)))?;
        }
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn socket(interface: &str) -> io::Result<UdpSocket> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, socket_with, sockopt};

    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, Some(ipproto::UDP))?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    sockopt::set_socket_broadcast(&fd, true)?;
    let length = libc::socklen_t::try_from(interface.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `length` bytes of the name, which lives through the call.
    let bound = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            interface.as_ptr().cast(),
            length,
        )
    };
    if bound < 0 {
        return Err(io::Error::last_os_error());
    }
    bind(&fd, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, CLIENT_PORT))?;
    Ok(UdpSocket::from(fd))
}
