//! The control socket: a Unix stream on which each side writes one JSON value a line. A client sends a [`Request`]; the machine answers each
//! with one [`Response`], in order.
//!
//! Descriptors travel beside a line (`SCM_RIGHTS`, with the line's first byte). [`Request::Wait`] is answered when the machine ends; a
//! connection that ends without that answer means that the process was killed. [`Request::Accept`] is answered once for each connection of the
//! guest's, and [`Request::Console`] turns the connection into the console: neither takes further requests.

use serde::{Deserialize, Serialize};

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// How is it? Answer: [`Response::Status`].
    Status,
    /// What has it done? Answer: [`Response::Metrics`].
    Metrics,
    /// The network ring's descriptors. Answer: [`Response::Ring`].
    Ring,
    /// The guest's connections to ports of the host are this client's from now on, and no longer another's, which is disconnected. Answers:
    /// [`Response::Connection`], one for each. While nobody accepts, the guest's connections are refused.
    Accept,
    /// Stops all processors between two instructions. Answer: [`Response::Done`].
    Pause,
    /// Lets a paused machine go on. Answer: [`Response::Done`].
    Resume,
    /// Writes the whole machine, which must be paused, to the two files attached: state, memory. Answer: [`Response::Done`].
    Snapshot,
    /// Which pages of memory the machine has to itself, written to the one file attached, for
    /// [`Start::Restore`](crate::Start::Restore). Answer: [`Response::Done`].
    Touched,
    /// Asks the guest to leave itself this much memory. Answer: [`Response::Done`] at once; [`Metrics::balloon_mib`] tells how far it is.
    Balloon {
        /// Memory for the guest, MiB: at most what the machine has.
        memory_mib: u32,
    },
    /// The console: [`Response::Console`], what was said before (bounded), then what the guest says; what the client sends is what is typed, on the
    /// virtio console once the guest has spoken there, on the serial port before. A client that reads too slowly misses bytes; the guest never waits.
    Console,
    /// Ends the machine. With a grace the guest is asked first ([`POWER_PORT`](crate::POWER_PORT)), unless it is paused: a guest that leaves by itself is
    /// told of as it left, one that does not as [`ExitReason::Stopped`]. Answer: [`Response::Stopping`].
    Stop {
        /// How long the guest has, milliseconds; 0 ends it at once.
        #[serde(default)]
        grace_ms: u32,
    },
    /// Answer only when the machine ends: [`Response::Exited`].
    Wait,
}

/// What the machine answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub enum Response {
    /// The machine as it is.
    Status {
        /// Host process id, as the process itself sees it: 1 in a jail.
        pid: u32,
        /// Milliseconds since the process started.
        uptime_ms: u64,
        /// Whether its processors run.
        state: RunState,
    },
    /// Counters since the process started.
    Metrics(Box<Metrics>),
    /// Three descriptors are attached: the ring's memory, the event "guest sent" and the event "guest may receive".
    Ring,
    /// The guest connected to a port of the host; the connection is attached.
    Connection {
        /// The port.
        port: u32,
    },
    /// It is done.
    Done,
    /// From the next byte on this is the console.
    Console,
    /// It will end.
    Stopping,
    /// It ended.
    Exited {
        /// Why.
        reason: ExitReason,
        /// What the console said last, at most 4 KiB.
        console: String,
    },
    /// The request could not be served.
    Error {
        /// What happened and what to do.
        message: String,
    },
}

/// Whether a machine's processors run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// They do.
    Running,
    /// They do not.
    Paused,
}

/// What a machine has done since its process started, and what it takes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Metrics {
    /// Memory that only this process has and no file could give back, guest's and its own, KiB.
    pub private_kib: u64,
    /// Of that, the process's own: what is not guest memory, KiB.
    pub vmm_private_kib: u64,
    /// Each processor.
    pub vcpus: Vec<VcpuMetrics>,
    /// The disk.
    pub disk: BlockMetrics,
    /// Frames that the guest sent and received.
    pub net_frames: (u64, u64),
    /// Bytes of those.
    pub net_bytes: (u64, u64),
    /// vsock connections that exist.
    pub vsock_connections: u64,
    /// Memory that the balloon holds, MiB.
    pub balloon_mib: u32,
    /// Memory that the guest says is free, KiB, if it has said anything.
    pub guest_free_kib: Option<u64>,
    /// Free pages that the guest reported and the host took back, KiB.
    pub reported_kib: u64,
}

/// What a processor has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VcpuMetrics {
    /// Times that it left the guest for the process.
    pub exits: u64,
}

/// What a disk has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BlockMetrics {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests served.
    pub requests: u64,
    /// Requests that the rate limit held back.
    pub held_back: u64,
}

/// Why a machine ended. The process's exit status says the same: see [`ExitReason::code`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest rebooted.
    Reboot,
    /// The guest halted or powered itself off.
    Halt,
    /// The guest's kernel panicked.
    Panic,
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
    /// Process exit status: 0 reboot, halt or stopped, 3 triple fault, 4 panic, 1 host failure.
    pub fn code(&self) -> i32 {
        match self {
            Self::Reboot | Self::Halt | Self::Stopped => 0,
            Self::TripleFault => 3,
            Self::Panic => 4,
            Self::Failed { .. } => 1,
        }
    }
}
