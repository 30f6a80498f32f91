//! The first serial port (a 16550A): what the guest sends goes to the [`Console`], what clients type comes in as fast as the guest takes it.
//!
//! Invariant: at most [`MAX_TYPED`] bytes wait for the guest. A serial line has no way to hold back who types: what does not fit is lost.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::console::Console;

/// Most typed bytes that wait for the guest.
pub const MAX_TYPED: usize = 16 << 10;
/// The port's own buffer, bytes.
const FIFO: usize = 64;
/// Registers in a saved state.
const REGISTERS: usize = 9;

/// Interrupts the guest by writing an eventfd that KVM watches.
#[derive(Clone)]
pub struct Line(Arc<EventFd>);

impl Line {
    /// A line whose pulses are writes to `event`.
    pub fn new(event: EventFd) -> Self {
        Self(Arc::new(event))
    }
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The port.
pub struct SerialPort {
    uart: Serial<Line, NoEvents, Console>,
    line: Line,
    typed: VecDeque<u8>,
}

impl SerialPort {
    /// A port that interrupts by `line` and speaks to `console`.
    pub fn new(line: Line, console: Console) -> Self {
        Self { uart: Serial::new(line.clone(), console), line, typed: VecDeque::new() }
    }

    /// Where it speaks to.
    pub fn console(&self) -> &Console {
        self.uart.writer()
    }

    /// The guest reads register `offset`.
    pub fn read(&mut self, offset: u8) -> u8 {
        let value = self.uart.read(offset);
        if !self.typed.is_empty() && self.uart.fifo_capacity() == FIFO {
            self.feed();
        }
        value
    }

    /// The guest writes register `offset`.
    pub fn write(&mut self, offset: u8, value: u8) {
        // The console never fails; an interrupt that cannot be raised is pending already.
        let _ = self.uart.write(offset, value);
    }

    /// Types `bytes`, as many as there is room for.
    pub fn type_in(&mut self, bytes: &[u8]) {
        let room = MAX_TYPED.saturating_sub(self.typed.len());
        self.typed.extend(bytes.iter().take(room));
        self.feed();
    }

    fn feed(&mut self) {
        let count = self.uart.fifo_capacity().min(self.typed.len());
        if count == 0 {
            return;
        }
        let bytes: Vec<u8> = self.typed.drain(..count).collect();
        if self.typed.is_empty() {
            self.typed = VecDeque::new(); // nothing waits: no memory kept
        }
        // In loopback mode, a driver's test of the port, what is typed is lost; an interrupt that cannot be raised is pending already.
        let _ = self.uart.enqueue_raw_bytes(&bytes);
    }

    /// All that a snapshot needs: registers, the port's buffer behind its length, what waits.
    pub fn save(&self) -> Vec<u8> {
        let state = self.uart.state();
        let mut bytes = vec![
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
            state.in_buffer.len() as u8,
        ];
        bytes.extend(state.in_buffer);
        bytes.extend(&self.typed);
        bytes
    }

    /// Becomes what [`SerialPort::save`] told.
    pub fn restore(&mut self, saved: &[u8]) -> io::Result<()> {
        let refuse = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let short = || refuse("the serial port's state is too short");
        let (registers, rest) = saved.split_first_chunk::<REGISTERS>().ok_or_else(short)?;
        let (len, rest) = rest.split_first().ok_or_else(short)?;
        let (in_buffer, typed) = rest.split_at_checked(usize::from(*len)).ok_or_else(short)?;
        let state = SerialState {
            baud_divisor_low: registers[0],
            baud_divisor_high: registers[1],
            interrupt_enable: registers[2],
            interrupt_identification: registers[3],
            line_control: registers[4],
            line_status: registers[5],
            modem_control: registers[6],
            modem_status: registers[7],
            scratch: registers[8],
            in_buffer: in_buffer.to_vec(),
        };
        let console = self.console().clone();
        self.uart = Serial::from_state(&state, self.line.clone(), NoEvents, console)
            .map_err(|error| refuse(&format!("the serial port's state is none: {error}")))?;
        self.typed = typed.iter().take(MAX_TYPED).copied().collect();
        self.feed();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    const DATA: u8 = 0;
    const INTERRUPT_ENABLE: u8 = 1;
    const LINE_STATUS: u8 = 5;
    const SCRATCH: u8 = 7;

    struct Rig {
        port: SerialPort,
        line: EventFd,
        _directory: tempfile::TempDir,
    }

    impl Rig {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let console = Console::file(&directory.path().join("console")).unwrap();
            let line = EventFd::new(EFD_NONBLOCK).unwrap();
            let port = SerialPort::new(Line::new(line.try_clone().unwrap()), console);
            Self { port, line, _directory: directory }
        }

        /// As an interrupt handler does: reads while there is something.
        fn take(&mut self) -> Vec<u8> {
            let mut bytes = Vec::new();
            while self.port.read(LINE_STATUS) & 1 == 1 {
                bytes.push(self.port.read(DATA));
            }
            bytes
        }
    }

    #[test]
    fn what_is_typed_arrives_in_order_however_much_it_is_up_to_a_bound() {
        let mut rig = Rig::new();
        rig.port.write(INTERRUPT_ENABLE, 1);
        let sent: Vec<u8> = (0..1000u32).map(|at| (at % 251) as u8).collect();
        rig.port.type_in(&sent[..10]);
        assert_eq!(rig.line.read().unwrap(), 1, "typing interrupts");
        rig.port.type_in(&sent[10..]);
        assert_eq!(rig.take(), sent);
        assert_eq!(rig.port.typed.capacity(), 0);

        rig.port.type_in(&vec![b'x'; 2 * MAX_TYPED]);
        rig.port.type_in(&vec![b'y'; 2 * MAX_TYPED]);
        let got = rig.take();
        assert_eq!(got.len(), MAX_TYPED + FIFO);
        rig.port.type_in(b"again");
        assert_eq!(rig.take(), b"again");
    }

    #[test]
    fn a_restored_port_goes_on_where_it_was() {
        let mut rig = Rig::new();
        rig.port.write(SCRATCH, 0x5a);
        rig.port.write(INTERRUPT_ENABLE, 1);
        let sent = [7; 200];
        rig.port.type_in(&sent);
        let saved = rig.port.save();
        let mut other = Rig::new();
        other.port.restore(&saved).unwrap();
        assert_eq!(other.port.read(SCRATCH), 0x5a);
        assert_eq!(other.take(), sent);
        assert!(other.line.read().is_ok(), "the guest is interrupted for what it had not read");
        for damaged in [&saved[..8], &saved[..9], &saved[..20], &[0xff; 300]] {
            assert!(other.port.restore(damaged).is_err());
        }
    }
}
