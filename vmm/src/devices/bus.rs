//! What a guest's access to a port or to memory-mapped registers reaches: the serial port, the keyboard controller's reset line, the
//! virtio pages. Anything else reads as all ones and ignores writes, as an empty bus does.
#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::console::Console;
use crate::layout;
use crate::virtio::VirtioDevice;
use crate::virtio::mmio::Transport;

/// Keyboard controller command: pulse the reset line.
const I8042_RESET: u8 = 0xfe;
/// Keyboard controller status, always: "input buffer empty", so that a reset command is sent at once, and "output buffer full" however often it
/// is read, from which Linux's driver concludes within a millisecond that there is no controller (an idle one costs it a second of
/// waiting for answers).
const I8042_STATUS: u8 = 1;
const SERIAL_PORTS: u16 = 8;

/// Interrupts the guest by writing an eventfd that KVM watches.
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The first serial port.
pub type Com1 = Serial<Line, NoEvents, Console>;

/// The guest pulsed the reset line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResetRequested;

/// All devices, shared by the processors' threads and the event loop.
pub struct Bus {
    serial: Mutex<Com1>,
    transports: Vec<Mutex<Transport>>,
}

/// Locks, also after another thread panicked: devices keep no invariants that a panic could leave half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// A bus with a serial port and virtio devices, the first at the first page.
    pub fn new(serial: Com1, transports: Vec<Transport>) -> Arc<Self> {
        Arc::new(Self {
            serial: Mutex::new(serial),
            transports: transports.into_iter().map(Mutex::new).collect(),
        })
    }

    /// `in`: fills `data`.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        match (port, serial_offset(port)) {
            (_, Some(offset)) => {
                let mut serial = lock(&self.serial);
                data.iter_mut().for_each(|byte| *byte = serial.read(offset));
            }
            (layout::I8042_COMMAND, _) => data.fill(I8042_STATUS),
            (layout::I8042_DATA, _) => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// `out`.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Result<(), ResetRequested> {
        if let Some(offset) = serial_offset(port) {
            let mut serial = lock(&self.serial);
            for byte in data {
                // The console never fails; an interrupt that cannot be raised is pending already.
                let _ = serial.write(offset, *byte);
            }
        }
        if port == layout::I8042_COMMAND && data == [I8042_RESET] {
            return Err(ResetRequested);
        }
        Ok(())
    }

    /// A load from an address without memory.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        match self.transport(address) {
            Some((mut transport, offset)) => transport.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A store to an address without writable memory.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((mut transport, offset)) = self.transport(address) {
            transport.write(offset, data);
        }
    }

    fn transport(&self, address: u64) -> Option<(MutexGuard<'_, Transport>, u64)> {
        let offset = address.checked_sub(layout::VIRTIO_MMIO)?;
        let index = usize::try_from(offset / layout::VIRTIO_MMIO_SIZE).ok()?;
        Some((lock(self.transports.get(index)?), offset % layout::VIRTIO_MMIO_SIZE))
    }

    /// The `index`th virtio device.
    pub fn virtio(&self, index: usize) -> Option<MutexGuard<'_, Transport>> {
        self.transports.get(index).map(lock)
    }

    /// What `ask` says of the first virtio device that is a `T`; `None` if there is none.
    pub fn with_device<T: VirtioDevice, R>(&self, ask: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.transports
            .iter()
            .find_map(|transport| {
                let mut transport = lock(transport);
                transport.device::<T>().is_some().then_some(transport)
            })
            .and_then(|mut transport| transport.device().map(ask))
    }

    /// Writes what the console gathered.
    pub fn commit_console(&self) {
        lock(&self.serial).writer_mut().commit();
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    let offset = port.checked_sub(layout::COM1).filter(|offset| *offset < SERIAL_PORTS)?;
    u8::try_from(offset).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn bus(path: &std::path::Path) -> Arc<Bus> {
        let line = Line(EventFd::new(EFD_NONBLOCK).unwrap());
        Bus::new(Serial::new(line, Console::file(path).unwrap()), Vec::new())
    }

    #[test]
    fn only_the_reset_command_resets() {
        let directory = tempfile::tempdir().unwrap();
        let bus = bus(&directory.path().join("console"));
        assert_eq!(bus.write_port(0x64, &[0xfe]), Err(ResetRequested));
        for (port, data) in [(0x64, &[0xd1][..]), (0x60, &[0xfe]), (0x64, &[0xfe, 0xfe]), (0x64, &[])] {
            assert_eq!(bus.write_port(port, data), Ok(()));
        }
        let mut status = [0xff];
        bus.read_port(0x64, &mut status);
        assert_eq!(status, [I8042_STATUS]);
    }

    #[test]
    fn an_empty_bus_reads_as_ones() {
        let directory = tempfile::tempdir().unwrap();
        let bus = bus(&directory.path().join("console"));
        for address in [0, layout::VIRTIO_MMIO, u64::MAX] {
            let mut data = [0; 4];
            bus.read_memory(address, &mut data);
            bus.write_memory(address, &data);
            assert_eq!(data, [0xff; 4]);
        }
        let mut data = [0; 2];
        bus.read_port(0xcf8, &mut data);
        assert_eq!(data, [0xff; 2]);
    }

    #[test]
    fn the_serial_port_writes_to_the_console() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let bus = bus(&path);
        for byte in b"hello\n" {
            bus.write_port(layout::COM1, &[*byte]).unwrap();
        }
        assert_eq!(std::fs::read(path).unwrap(), b"hello\n");
        let mut lsr = [0];
        bus.read_port(layout::COM1 + 5, &mut lsr);
        assert_eq!(lsr[0] & 0x60, 0x60);
    }
}
