//! A learning Ethernet switch between QEMU machines: each port a Unix socket that one machine connects to.
//!
//! QEMU's stream protocol: four bytes big-endian length, then the frame. A frame goes to the port its destination was last heard
//! on, and to all others when that is unknown or a group. It must be a switch and not a hub: the user-mode network stack at the uplink takes every IP packet it sees
//! for one to carry, whatever its Ethernet address, so it must not see what nodes say to each other.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};

/// Longer frames end the connection.
const MAX_FRAME: usize = 65_536;
/// Addresses remembered; beyond, frames to new ones go to all ports.
const MAX_ADDRESSES: usize = 1024;

type Address = [u8; 6];

#[derive(Debug, Default)]
struct Table {
    ports: Vec<Option<UnixStream>>,
    heard: HashMap<Address, usize>,
}

/// A running switch. Dropping it disconnects everybody.
#[derive(Debug)]
pub struct Switch(Arc<Mutex<Table>>);

impl Switch {
    /// Opens a port at each of these paths and serves them, each by a thread of its own.
    ///
    /// # Errors
    /// A socket cannot be made.
    pub fn start(paths: &[PathBuf]) -> Result<Self> {
        let mut table = Table::default();
        table.ports.resize_with(paths.len(), || None);
        let table = Arc::new(Mutex::new(table));
        for (port, path) in paths.iter().enumerate() {
            let listener =
                UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
            let table = Arc::downgrade(&table);
            std::thread::spawn(move || {
                // A machine that is switched off and on again connects again.
                while let (Ok((stream, _)), Some(table)) = (listener.accept(), table.upgrade()) {
                    let Ok(writer) = stream.try_clone() else { continue };
                    lock(&table).ports[port] = Some(writer);
                    let weak = Arc::downgrade(&table);
                    drop(table);
                    serve(port, stream, &weak);
                }
            });
        }
        Ok(Self(table))
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        for stream in lock(&self.0).ports.iter().flatten() {
            // It may be closed already.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// Forwards what a machine sends until it goes.
fn serve(port: usize, mut stream: UnixStream, table: &std::sync::Weak<Mutex<Table>>) {
    let mut frame = Vec::new();
    loop {
        let mut length = [0; 4];
        if stream.read_exact(&mut length).is_err() {
            return;
        }
        let size = u32::from_be_bytes(length) as usize;
        if size > MAX_FRAME {
            return;
        }
        frame.resize(4 + size, 0);
        frame[..4].copy_from_slice(&length);
        if stream.read_exact(&mut frame[4..]).is_err() {
            return;
        }
        let Some(table) = table.upgrade() else { return };
        forward(port, &frame, &mut lock(&table));
    }
}

fn forward(from: usize, frame: &[u8], table: &mut Table) {
    let (Some(to), Some(source)) = (address(frame, 4), address(frame, 10)) else { return };
    if source[0] & 1 == 0 && (table.heard.len() < MAX_ADDRESSES || table.heard.contains_key(&source)) {
        table.heard.insert(source, from);
    }
    let known = table.heard.get(&to).copied().filter(|_| to[0] & 1 == 0);
    for (port, stream) in table.ports.iter_mut().enumerate() {
        if port == from || known.is_some_and(|known| known != port) {
            continue;
        }
        // A machine that is gone gets nothing until it connects again.
        if stream.as_mut().is_some_and(|stream| stream.write_all(frame).is_err()) {
            *stream = None;
        }
    }
}

fn address(frame: &[u8], at: usize) -> Option<Address> {
    frame.get(at..at + 6)?.try_into().ok()
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: u8, from: u8, text: &[u8]) -> Vec<u8> {
        let addresses = [to, 0, 0, 0, 0, to, from, 0, 0, 0, 0, from];
        [&(12 + text.len() as u32).to_be_bytes()[..], &addresses, text].concat()
    }

    fn receives(machine: &mut UnixStream, expected: &[u8]) {
        let mut got = vec![0; expected.len()];
        machine.read_exact(&mut got).unwrap();
        assert_eq!(got, expected);
    }

    #[test]
    fn who_was_heard_is_spoken_to_alone() {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = ["a", "b", "c"].map(|name| dir.path().join(name)).into();
        let _switch = Switch::start(&paths).unwrap();
        let mut machines: Vec<UnixStream> =
            paths.iter().map(|path| UnixStream::connect(path).unwrap()).collect();
        let [a, b, c] = &mut machines[..] else { panic!("three machines") };
        // Each is accepted by a thread of its own: a group frame is said until all have heard one.
        for machine in [&mut *b, &mut *c] {
            machine.set_nonblocking(true).unwrap();
            let mut byte = [0; 1];
            while machine.read(&mut byte).is_err() {
                a.write_all(&frame(0xff, 2, b"")).unwrap();
                std::thread::yield_now();
            }
            machine.set_nonblocking(false).unwrap();
        }
        // b answers a, whom it heard; c must not hear that, nor what a then says to b.
        b.write_all(&frame(2, 4, b"answer")).unwrap();
        receives(a, &frame(2, 4, b"answer"));
        a.write_all(&frame(4, 2, b"private")).unwrap();
        a.write_all(&frame(0xff, 2, b"to all")).unwrap();
        let everything = |machine: &mut UnixStream| {
            let (mut heard, mut byte) = (Vec::new(), [0; 1]);
            while !heard.ends_with(b"to all") {
                machine.read_exact(&mut byte).unwrap();
                heard.push(byte[0]);
            }
            heard
        };
        assert!(everything(b).windows(7).any(|w| w == b"private"));
        assert!(!everything(c).windows(6).any(|w| w == b"answer" || w == b"privat"));
    }
}
