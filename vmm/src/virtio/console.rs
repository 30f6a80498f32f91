//! The console device (virtio 1.2, section 5.3), one port: the guest's `hvc0`. What the guest sends goes to the [`Console`], where the serial
//! port speaks too; what clients type waits here until the guest has a buffer for it.
//!
//! A driver that is up says nothing about whether anybody listens to it, so typing comes here only once the guest has said something here (a
//! prompt): [`VirtioConsole::type_in`].
//!
//! Invariant: at most [`MAX_TYPED`] bytes wait for the guest; what does not fit is lost, as on a serial line.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::Write;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::QueueT;

use super::segments::split;
use super::{Active, Chain, DeviceError, Memory, VirtioDevice, pop};
use crate::devices::console::Console;
use crate::devices::serial::MAX_TYPED;

const RX: usize = 0;
const TX: usize = 1;
/// Linux fills the receive queue with a page a descriptor, so its size is guest memory that every sliver pays for; of the transmit queue
/// it uses one descriptor at a time.
const QUEUE_SIZES: [u16; 2] = [2, 16];
/// Most bytes taken of one transmit chain. Linux sends less than a page.
const MAX_SAID: usize = 16 << 10;

/// The device.
pub struct VirtioConsole {
    console: Console,
    typed: VecDeque<u8>,
    /// The guest has said something since its driver came up.
    spoken: bool,
    active: Option<Active>,
}

impl VirtioConsole {
    /// A device that speaks to `console`.
    pub fn new(console: Console) -> Self {
        Self { console, typed: VecDeque::new(), spoken: false, active: None }
    }

    /// Types `bytes`, as many as there is room for. False if the guest has not said anything here: then nobody listens either.
    pub fn type_in(&mut self, bytes: &[u8]) -> bool {
        let Some(active) = self.active.as_ref().filter(|_| self.spoken) else { return false };
        let room = MAX_TYPED.saturating_sub(self.typed.len());
        self.typed.extend(bytes.iter().take(room));
        if let Some(kick) = active.kicks.get(RX) {
            let _ = kick.write(1); // fails only if the counter is full: kicked already
        }
        true
    }

    fn deliver(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        // As in `Active::drain`: a guest whose buffers are empty or too short must not hold the event loop.
        let mut budget = 2 * QUEUE_SIZES[RX];
        while !self.typed.is_empty() {
            if budget == 0 {
                if let Some(kick) = active.kicks.get(RX) {
                    let _ = kick.write(1);
                }
                break;
            }
            budget -= 1;
            let Some(chain) = pop(&mut active.queues, &active.memory, RX)? else {
                if wants_more(active)? { continue } else { break }
            };
            let head = chain.head_index();
            let count = give(&active.memory, chain, self.typed.make_contiguous()).unwrap_or(0);
            self.typed.drain(..count);
            active.add_used(RX, head, count as u32)?;
        }
        if self.typed.is_empty() {
            self.typed = VecDeque::new(); // nothing waits: no memory kept
        }
        active.signal_used(RX)
    }

    fn listen(&mut self) -> Result<(), DeviceError> {
        let Self { console, active: Some(active), spoken, .. } = self else { return Ok(()) };
        active.drain(TX, |memory, chain| {
            *spoken = true;
            say(console, memory, chain);
            0
        })
    }
}

/// Asks for a kick at the next receive buffer; whether one came in the meantime.
fn wants_more(active: &mut Active) -> Result<bool, DeviceError> {
    let Some(ring) = active.queues.get_mut(RX).filter(|ring| ring.ready()) else { return Ok(false) };
    ring.enable_notification(&active.memory).map_err(|source| DeviceError::Queue { queue: RX, source })
}

/// Copies what fits of `typed` into a receive chain and returns how much; `None` if it is malformed.
fn give(memory: &Memory, chain: Chain<'_>, typed: &[u8]) -> Option<usize> {
    let (_, buffer) = split(chain).ok()?;
    buffer.write(memory, typed)
}

/// Says what a transmit chain holds. One that is malformed is silent.
fn say(console: &mut Console, memory: &Memory, chain: Chain<'_>) {
    let Ok((buffer, _)) = split(chain) else { return };
    let mut bytes = vec![0; buffer.len().min(MAX_SAID as u64) as usize];
    if let Some(said) = buffer.read(memory, &mut bytes).and_then(|count| bytes.get(..count)) {
        let _ = console.write_all(said); // never fails
    }
}

impl VirtioDevice for VirtioConsole {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// No feature is offered that would give any of it a meaning.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, active: Active) -> Result<(), DeviceError> {
        self.active = Some(active);
        Ok(())
    }

    fn active(&mut self) -> Option<&mut Active> {
        self.active.as_mut()
    }

    /// Whether the guest has spoken, then what waits for it.
    fn save(&self) -> Vec<u8> {
        std::iter::once(u8::from(self.spoken)).chain(self.typed.iter().copied()).collect()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        if let Some((spoken, typed)) = state.split_first() {
            self.spoken = *spoken != 0;
            self.typed = typed.iter().take(MAX_TYPED).copied().collect();
        }
        self.deliver()
    }

    fn reset(&mut self) {
        self.active = None;
        self.typed = VecDeque::new();
        self.spoken = false;
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        match queue {
            RX => self.deliver(),
            _ => self.listen(),
        }
    }
}

#[cfg(test)]
#[path = "console_test.rs"]
mod tests;
