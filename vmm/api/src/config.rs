//! What a machine is made of. Every path is opened before privileges are dropped; nothing is opened by path afterwards.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a machine is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// How its guest begins.
    pub start: Start,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Virtual processors, 1 to 8.
    pub vcpus: u8,
    /// Read-only image, mapped through virtio-pmem (guest: `/dev/pmem0`).
    pub base: Option<PathBuf>,
    /// The machine's own disk, virtio-blk (guest: `/dev/vda`).
    pub disk: Option<DiskConfig>,
    /// Network interface; its ring is handed out by [`Request::Ring`](crate::Request::Ring).
    pub net: Option<NetConfig>,
    /// vsock.
    pub vsock: Option<VsockConfig>,
    /// Whether it has a balloon: free pages are reported, and memory can be taken back.
    #[serde(default)]
    pub balloon: bool,
    /// Where the serial port and the virtio console are logged, a file of bounded size; standard output when absent.
    pub console: Option<PathBuf>,
    /// The control socket, created by the machine. Its directory must exist.
    pub control: Option<PathBuf>,
    /// What it locks itself into before the guest's first instruction; runs as it was started when absent.
    pub jail: Option<JailConfig>,
}

/// How a guest begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "how", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Start {
    /// At its kernel's entry.
    Boot {
        /// Uncompressed ELF kernel with a PVH entry.
        kernel: PathBuf,
        /// Initial RAM file system, in any format the kernel takes.
        initrd: Option<PathBuf>,
        /// Appended to the command line the machine needs anyway.
        #[serde(default)]
        cmdline: String,
    },
    /// Where a snapshot left it ([`Request::Snapshot`](crate::Request::Snapshot)). Memory size, processors, devices and base must be those of the
    /// machine it was taken of; disk, MAC address and sockets may be others. The guest runs at once.
    Restore {
        /// The processors', interrupt controllers' and devices' state.
        state: PathBuf,
        /// Guest memory, mapped privately: any number of machines may start from one file, which must not change while they live.
        memory: PathBuf,
        /// Pages that an earlier machine of this snapshot wrote soon after its start
        /// ([`Request::Touched`](crate::Request::Touched)); they are copied in one call instead of one fault each. A hint: what is
        /// damaged or absent is ignored.
        #[serde(default)]
        prefault: Option<PathBuf>,
    },
}

/// A machine's own disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Raw image. It is locked: no two machines use one disk.
    pub path: PathBuf,
    /// How fast it may be used; without bound when absent.
    #[serde(default)]
    pub rate: Option<RateLimit>,
}

/// Two token buckets, of bytes and of requests, each of one second's depth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes a second; 0 is without bound.
    #[serde(default)]
    pub bytes_per_second: u64,
    /// Requests a second; 0 is without bound.
    #[serde(default)]
    pub requests_per_second: u64,
}

/// The guest's network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Its MAC address.
    pub mac: [u8; 6],
}

/// The guest's vsock. A host program connects to `path`, writes `CONNECT port\n`, reads `OK port\n`, and is then connected to the guest's port.
/// A guest that connects to a port of the host reaches the client of the control socket that said
/// [`Request::Accept`](crate::Request::Accept).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Guest context id: 3 or more. Each machine's vsock is a world of its own, so all may have the same.
    pub cid: u32,
    /// The Unix socket, created by the machine.
    pub path: PathBuf,
}

/// What a machine's process locks itself into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// User and group to become; neither 0 nor anybody else's.
    pub uid: u32,
}
