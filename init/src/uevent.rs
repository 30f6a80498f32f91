//! The kernel's announcements of devices (netlink kobject uevents).

use std::{
    os::fd::{AsFd, BorrowedFd},
    time::Instant,
};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_KOBJECT_UEVENT};

use crate::{
    error::{Context as _, Result},
    modules::Modules,
    poll,
};

/// An announcement: `ACTION=add`, `DEVPATH=…`, `MODALIAS=…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uevent(Vec<(String, String)>);

impl Uevent {
    /// Parses a datagram: `add@/devices/…`, then `KEY=value` strings, each ended by a zero byte.
    pub fn parse(datagram: &[u8]) -> Self {
        let strings = datagram.split(|b| *b == 0).filter_map(|s| std::str::from_utf8(s).ok());
        Self(strings.filter_map(|s| s.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect())
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }
}

/// A subscription. Open it before looking at `/sys`, and nothing is missed between.
pub struct Uevents(Socket);

impl Uevents {
    /// Subscribes.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open() -> Result<Self> {
        let open = || {
            let mut socket = Socket::new(NETLINK_KOBJECT_UEVENT)?;
            socket.bind(&SocketAddr::new(0, 1))?;
            socket.set_non_blocking(true)?;
            socket.set_rx_buf_sz(1_048_576_i32)?;
            std::io::Result::Ok(socket)
        };
        Ok(Self(open().what(|| "listen for new devices".into())?))
    }

    /// What was announced since the last time, without waiting.
    pub fn read(&self) -> Vec<Uevent> {
        let mut events = Vec::new();
        // ENOBUFS says that some were lost; whoever waits looks at /sys again anyway.
        while let Ok((datagram, from)) = self.0.recv_from_full() {
            // Only the kernel has port 0.
            if from.port_number() == 0 {
                events.push(Uevent::parse(&datagram));
            }
        }
        events
    }
}

impl AsFd for Uevents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Loads drivers of devices as they come until `found` finds what it looks for, at most until `deadline`. Errors of
/// modules are told to `told`.
///
/// # Errors
/// Those of `found`, and when the kernel refuses to wait.
pub fn wait_for<T>(
    uevents: &Uevents,
    modules: &mut Modules,
    deadline: Instant,
    mut told: impl FnMut(crate::Error),
    mut found: impl FnMut() -> Result<Option<T>>,
) -> Result<Option<T>> {
    loop {
        for event in uevents.read() {
            if let Some(modalias) = event.get("MODALIAS").filter(|_| event.get("ACTION") == Some("add")) {
                modules.load_for(modalias).into_iter().for_each(&mut told);
            }
        }
        if let Some(it) = found()? {
            return Ok(Some(it));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        poll::wait(&[uevents.as_fd()], Some(deadline))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_keys() {
        let event = Uevent::parse(b"add@/devices/x\0ACTION=add\0MODALIAS=virtio:d1v2\0EMPTY=\0\xff\xfe=1\0");
        assert_eq!(event.get("ACTION"), Some("add"));
        assert_eq!(event.get("MODALIAS"), Some("virtio:d1v2"));
        assert_eq!(event.get("EMPTY"), Some(""));
        assert_eq!(event.get("SEQNUM"), None);
    }
}
