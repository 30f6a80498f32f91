//! Breaking things on purpose: tests kill services and restart the node through a serial port, and watch it recover.
//!
//! Off unless the kernel command line names a port (`commonage.faults=/dev/ttyS1`). That line is part of the boot
//! script that the offline key signed, so nobody turns this on for a node whose releases don't. The orders are
//! `kill SERVICE`, and `restart`, which does what ctrl-alt-del does; answers are on the console.

use std::{
    fs::File,
    io::Read as _,
    os::fd::{AsFd as _, BorrowedFd},
};

use commonage_init::{error as files, say};
use rustix::fs::{Mode, OFlags};

use crate::ME;

const KEY: &str = "commonage.faults=";
/// No order is longer.
const LONGEST: usize = 64;

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Order {
    /// Kill this service.
    Kill(String),
    /// End everything in order, and start the machine again.
    Restart,
}

/// The port, if there is one.
#[derive(Default)]
pub struct Faults {
    port: Option<File>,
    line: Vec<u8>,
}

impl Faults {
    /// Opens the port that the kernel command line names.
    pub fn open() -> Self {
        let cmdline = files::read("/proc/cmdline").unwrap_or_default();
        let Some(path) = port_of(&cmdline) else { return Self::default() };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let port = rustix::fs::open(path, flags, Mode::empty()).map(File::from);
        say!(ME, "warning: this release takes orders to break things from {path}");
        Self { port: port.map_err(|e| say!(ME, "warning: {path}: {e}")).ok(), line: vec![] }
    }

    /// What to wait for.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.port.as_ref().map(|p| p.as_fd())
    }

    /// What was ordered since the last time.
    pub fn read(&mut self) -> Vec<Order> {
        let mut bytes = [0; 256];
        let mut orders = Vec::new();
        loop {
            let Some(port) = &mut self.port else { return orders };
            match port.read(&mut bytes) {
                Ok(0) => self.port = None,
                Ok(length) => orders.extend(lines(&mut self.line, bytes.get(..length).unwrap_or_default())),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return orders,
                Err(_) => self.port = None,
            }
        }
    }
}

fn port_of(cmdline: &str) -> Option<&str> {
    cmdline.split_whitespace().find_map(|word| word.strip_prefix(KEY)).filter(|p| p.starts_with("/dev/tty"))
}

/// Adds bytes to an unfinished line; the orders in the lines that they finish.
fn lines(line: &mut Vec<u8>, bytes: &[u8]) -> Vec<Order> {
    let mut orders = Vec::new();
    for byte in bytes {
        if !matches!(byte, b'\n' | b'\r') {
            if line.len() < LONGEST {
                line.push(*byte);
            }
            continue;
        }
        let text = String::from_utf8_lossy(line).into_owned();
        line.clear();
        orders.extend(match text.trim() {
            "restart" => Some(Order::Restart),
            text => text.strip_prefix("kill ").map(|service| Order::Kill(service.trim().to_owned())),
        });
    }
    orders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_off_unless_asked_for() {
        assert_eq!(port_of("console=ttyS0 quiet"), None);
        assert_eq!(port_of("commonage.faults=/etc/passwd"), None);
        assert_eq!(port_of("quiet commonage.faults=/dev/ttyS1\n"), Some("/dev/ttyS1"));
    }

    #[test]
    fn reads_orders_in_pieces() {
        let mut line = Vec::new();
        assert_eq!(lines(&mut line, b"kill node"), []);
        let kill = |service: &str| Order::Kill(service.to_owned());
        let orders = [kill("nodemgr"), Order::Restart, kill("net-demux")];
        assert_eq!(lines(&mut line, b"mgr\r\nnonsense\nrestart\nkill net-demux\nk"), orders);
        assert_eq!(line, b"k");
        lines(&mut line, &[b'x'; 1000]);
        assert_eq!(line.len(), LONGEST);
    }
}
