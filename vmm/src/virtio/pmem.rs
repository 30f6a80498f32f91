//! The persistent-memory device (virtio 1.2, section 5.19), always read-only: the guest maps the base image's pages, which are the
//! host's page cache, directly. Its one request, flush, has nothing to do.
#![forbid(unsafe_code)]

use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use vm_memory::GuestAddress;

use super::segments::split;
use super::{Active, Chain, DeviceError, Memory, VirtioDevice, read_config_from};

const FLUSH: u32 = 0;
const OK: u32 = 0;
const UNKNOWN_REQUEST: u32 = 1;

/// The persistent-memory device.
pub struct Pmem {
    config: [u8; 16],
    active: Option<Active>,
}

impl Pmem {
    /// A device whose memory the guest finds at `start`, `size` bytes long.
    pub fn new(start: GuestAddress, size: u64) -> Self {
        let mut config = [0; 16];
        let (low, high) = config.split_at_mut(8);
        low.copy_from_slice(&start.0.to_le_bytes());
        high.copy_from_slice(&size.to_le_bytes());
        Self { config, active: None }
    }
}

/// Serves one request; returns the number of bytes written.
fn serve(memory: &Memory, chain: Chain<'_>) -> u32 {
    let Ok((request, response)) = split(chain) else { return 0 };
    let Some(kind) = request.read_array::<4>(memory) else { return 0 };
    let result = if u32::from_le_bytes(kind) == FLUSH { OK } else { UNKNOWN_REQUEST };
    response.write(memory, &result.to_le_bytes()).map_or(0, |written| written as u32)
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_from(&self.config, offset, data);
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
