//! The entropy device (virtio 1.2, section 5.4): fills what the guest offers with the host's random bytes.
#![forbid(unsafe_code)]

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::segments::{Segments, split};
use super::{Active, Chain, DeviceError, Memory, VirtioDevice};
use crate::entropy;

/// Most bytes given for one request: a guest that asks for a gibibyte gets a page.
const MAX_REQUEST: u64 = 4096;

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    active: Option<Active>,
}

/// Serves one request; returns the number of bytes written.
fn serve(memory: &Memory, chain: Chain<'_>) -> u32 {
    let Ok((_, buffer)) = split(chain) else { return 0 };
    fill(memory, &buffer).unwrap_or(0)
}

fn fill(memory: &Memory, buffer: &Segments) -> Option<u32> {
    let mut bytes = vec![0; buffer.len().min(MAX_REQUEST) as usize];
    entropy::fill(&mut bytes).ok()?;
    buffer.write(memory, &bytes)?.try_into().ok()
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

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

    fn reset(&mut self) {
        self.active = None;
    }

    fn queue_event(&mut self, queue: usize) -> Result<(), DeviceError> {
        match &mut self.active {
            Some(active) => active.drain(queue, serve),
            None => Ok(()),
        }
    }
}
