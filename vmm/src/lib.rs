//! The machine monitor of one sliver: [`machine::Machine`] puts together what a [`MachineConfig`](commonage_vmm_api::MachineConfig)
//! describes and runs it until it ends. `docs/architecture.md` walks through it; `layout` says what the guest finds where.
//!
//! Two kinds of threads: one per virtual processor ([`vcpu`]), which runs the guest and serves its register accesses, and the main
//! thread, which runs the event loop ([`reactor`]) and with it every device's back end and the control socket.

pub mod boot;
pub mod control;
pub mod cpuid;
pub mod devices;
pub mod entropy;
pub mod event;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod halt;
pub mod jail;
pub mod layout;
pub mod machine;
pub mod mapping;
pub mod metrics;
pub mod opened;
pub mod origin;
pub mod processors;
pub mod rate_limit;
pub mod reactor;
mod reclaim;
mod running;
pub mod seccomp;
pub mod snapshot;
mod uring;
pub mod vcpu;
pub mod vcpu_state;
pub mod virtio;
pub mod vm;
