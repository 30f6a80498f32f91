//! The typed protocol of a virtual machine's control socket, and the configuration it starts from.
//!
//! The socket is a Unix stream. Each side writes one JSON value a line. A client sends a [`Request`]; the machine answers with one
//! [`Response`]. [`Request::Ring`] is answered with three descriptors attached (SCM_RIGHTS) to the response line: the
//! ring's memory, the event "guest sent" and the event "guest may receive", in that order. [`Request::Wait`] is answered when the
//! machine ends; a connection that ends without that answer means that the process was killed.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a machine is made of. Every path is opened before privileges are dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Uncompressed ELF kernel with a PVH entry.
    pub kernel: PathBuf,
    /// Initial RAM file system, in any format the kernel takes.
    pub initrd: Option<PathBuf>,
    /// Appended to the command line the machine needs anyway.
    #[serde(default)]
    pub cmdline: String,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub vcpus: u8,
    /// Read-only image, mapped through virtio-pmem (guest: `/dev/pmem0`).
    pub base: Option<PathBuf>,
    /// The machine's own disk, read-write, virtio-blk (guest: `/dev/vda`).
    pub disk: Option<PathBuf>,
    /// Network interface; its ring is handed out by [`Request::Ring`].
    pub net: Option<NetConfig>,
    /// vsock.
    pub vsock: Option<VsockConfig>,
    /// Where the guest's serial port is written; standard output when absent.
    pub console: Option<PathBuf>,
    /// The control socket, created by the machine. Its directory must exist.
    pub control: Option<PathBuf>,
    /// User and group to become before the guest's first instruction; unchanged when absent.
    pub uid: Option<u32>,
}

/// The guest's network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Its MAC address.
    pub mac: [u8; 6],
}

/// The guest's vsock, by the Unix-socket convention: a host program connects to `path`, writes `CONNECT port\n`, reads `OK port\n`,
/// and is then connected to the guest's port; a guest that connects to host port P reaches the Unix socket `{path}_P`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Guest context id: 3 or more.
    pub cid: u32,
    /// The Unix socket, created by the machine.
    pub path: PathBuf,
}

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// How is it? Answer: [`Response::Status`].
    Status,
    /// The network ring's descriptors. Answer: [`Response::Ring`].
    Ring,
    /// Ends the machine at once; the guest is asked first by whoever speaks to its init. Answer: [`Response::Stopping`].
    Stop,
    /// Answer only when the machine ends: [`Response::Exited`].
    Wait,
}

/// What the machine answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub enum Response {
    /// The machine as it is.
    Status {
        /// Host process id.
        pid: u32,
        /// Milliseconds since the process started.
        uptime_ms: u64,
    },
    /// Descriptors are attached.
    Ring,
    /// It will end.
    Stopping,
    /// It ended.
    Exited {
        /// Why.
        reason: ExitReason,
    },
    /// The request could not be served.
    Error {
        /// What happened and what to do.
        message: String,
    },
}

/// Why a machine ended. The process's exit status says the same: see [`ExitReason::code`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest reset the machine (reboot, also by `panic=-1`).
    Reset,
    /// The guest's processor shut down (triple fault).
    TripleFault,
    /// A client asked.
    Stopped,
    /// The host failed.
    Failed {
        /// How.
        message: String,
    },
}

impl ExitReason {
    /// Process exit status: 0 reset or stopped, 3 triple fault, 1 host failure.
    pub fn code(&self) -> i32 {
        match self {
            Self::Reset | Self::Stopped => 0,
            Self::TripleFault => 3,
            Self::Failed { .. } => 1,
        }
    }
}
