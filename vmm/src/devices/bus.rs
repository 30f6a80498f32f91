//! What a guest's access to a port or to memory-mapped registers reaches: the serial port, the keyboard controller's reset line, the
//! virtio pages. Anything else reads as all ones and ignores writes, as an empty bus does.
#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::console::Console;
use super::serial::SerialPort;
use crate::layout;
use crate::virtio::VirtioDevice;
use crate::virtio::console::VirtioConsole;
use crate::virtio::mmio::Transport;

/// Keyboard controller command: pulse the reset line.
const I8042_RESET: u8 = 0xfe;
/// Keyboard controller status, always: "input buffer empty", so that a reset command is sent at once, and "output buffer full" however often it
/// is read, from which Linux's driver concludes within a millisecond that there is no controller (an idle one costs it a second of
/// waiting for answers).
const I8042_STATUS: u8 = 1;
const SERIAL_PORTS: u16 = 8;

/// The guest pulsed the reset line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResetRequested;

/// All devices, shared by the processors' threads and the event loop.
pub struct Bus {
    serial: Mutex<SerialPort>,
    console: Console,
    transports: Vec<Mutex<Transport>>,
}

/// Locks, also after another thread panicked: devices keep no invariants that a panic could leave half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// A bus with a serial port and virtio devices, the first at the first page.
    pub fn new(serial: SerialPort, transports: Vec<Transport>) -> Arc<Self> {
        Arc::new(Self {
            console: serial.console().clone(),
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
            data.iter().for_each(|byte| serial.write(offset, *byte));
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

    /// What the guest says on its serial port and its virtio console.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Types `bytes`: on the virtio console once the guest has spoken there, on the serial port before.
    pub fn type_in(&self, bytes: &[u8]) {
        if self.with_device(|console: &mut VirtioConsole| console.type_in(bytes)) != Some(true) {
            lock(&self.serial).type_in(bytes);
        }
    }

    /// The serial port, as a snapshot needs it.
    pub fn save_serial(&self) -> Vec<u8> {
        lock(&self.serial).save()
    }

    /// The serial port becomes what [`Bus::save_serial`] told.
    pub fn restore_serial(&self, saved: &[u8]) -> io::Result<()> {
        lock(&self.serial).restore(saved)
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    let offset = port.checked_sub(layout::COM1).filter(|offset| *offset < SERIAL_PORTS)?;
    u8::try_from(offset).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::serial::Line;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    fn bus(path: &std::path::Path) -> Arc<Bus> {
        let line = Line::new(EventFd::new(EFD_NONBLOCK).unwrap());
        Bus::new(SerialPort::new(line, Console::file(path).unwrap()), Vec::new())
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
