//! What a program outside needs to know of a virtual machine: the [configuration](config) it starts from and the typed
//! [protocol](control) of its control socket.
#![forbid(unsafe_code)]

pub mod config;
pub mod control;

pub use config::{
    DiskConfig, JailConfig, MachineConfig, NetConfig, RateLimit, Start, VsockConfig,
};
pub use control::{BlockMetrics, ExitReason, Metrics, Request, Response, RunState, VcpuMetrics};

/// vsock port on which a guest's init listens for the request to shut down: whoever connects asks for it. The machine connects there for
/// [`control::Request::Stop`] with a grace; a guest where nobody listens is ended at once.
pub const POWER_PORT: u32 = 809;
