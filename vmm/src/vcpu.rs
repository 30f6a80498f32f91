//! One virtual processor: runs the guest until it leaves, serves what it left for, and runs it again, until the machine ends.
#![forbid(unsafe_code)]

use commonage_vmm_api::ExitReason;
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::devices::bus::{Bus, ResetRequested};

/// Runs `vcpu` until the machine must end; tells why.
///
/// A reset is the guest pulsing the keyboard controller's reset line, which `reboot=k` on the command line makes Linux do for reboot and
/// for `panic=-1`. A processor that shuts down (triple fault) therefore crashed.
pub fn run(mut vcpu: VcpuFd, id: u8, bus: &Bus) -> ExitReason {
    let failed = |message: String| ExitReason::Failed { message: format!("processor {id}: {message}") };
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => bus.read_port(port, data),
            Ok(VcpuExit::IoOut(port, data)) => {
                if let Err(ResetRequested) = bus.write_port(port, data) {
                    return ExitReason::Reboot;
                }
            }
            Ok(VcpuExit::MmioRead(address, data)) => bus.read_memory(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.write_memory(address, data),
            Ok(VcpuExit::Shutdown) => return ExitReason::TripleFault,
            Ok(VcpuExit::Intr | VcpuExit::Hlt) => {}
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return failed(format!(
                    "KVM cannot enter the guest (hardware reason {reason:#x}, CPU {cpu})"
                ));
            }
            Ok(VcpuExit::InternalError) => {
                return failed("KVM cannot emulate what the guest does".into());
            }
            Ok(exit) => return failed(format!("unexpected exit {exit:?}")),
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {}
            Err(error) => return failed(format!("KVM_RUN: {error}")),
        }
    }
}
