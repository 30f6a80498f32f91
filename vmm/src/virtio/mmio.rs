//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2): one 4 KiB register page per device.
#![forbid(unsafe_code)]
