//! One virtual processor's loop: runs the guest until it leaves, serves what it left for, and runs it again, until the machine ends or
//! pauses.
//!
//! Invariant: a processor that was parked stands between two instructions. What it left the guest for was served, and KVM has taken the
//! answer: its whole state can be read.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use commonage_vmm_api::ExitReason;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::devices::bus::{Bus, ResetRequested};
use crate::virtio::Memory;

/// Where Linux leaves word for the firmware before it resets the machine (the BIOS data area's "reset flag").
const RESET_FLAG: GuestAddress = GuestAddress(0x472);
/// A warm reboot. The command line makes Linux ask for one only when it panicked (`reboot=cold,panic_warm`).
const WARM: u16 = 0x1234;

/// Why the loop was left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Left {
    /// The machine pauses.
    Parked,
    /// The machine must end.
    Ended(ExitReason),
}

/// What one run of the guest came to.
enum Step {
    Served,
    Interrupted,
    Ended(ExitReason),
}

/// What a processor needs besides itself.
pub struct Surroundings<'a> {
    /// The devices.
    pub bus: &'a Bus,
    /// Guest memory.
    pub memory: &'a Memory,
    /// Set when the machine pauses; whoever sets it then interrupts the thread by a signal until it has parked.
    pub closed: &'a AtomicBool,
    /// Counts how often the guest was left.
    pub exits: &'a AtomicU64,
}

/// Runs processor `id` until the machine ends or pauses.
pub fn run(vcpu: &mut VcpuFd, id: u8, around: &Surroundings<'_>) -> Left {
    loop {
        let closing = around.closed.load(Ordering::SeqCst);
        // KVM then takes the answer to what the guest left for and comes back before the next instruction.
        vcpu.set_kvm_immediate_exit(u8::from(closing));
        match step(vcpu, id, around) {
            Step::Interrupted if closing => {
                vcpu.set_kvm_immediate_exit(0);
                return Left::Parked;
            }
            Step::Served | Step::Interrupted => {}
            Step::Ended(reason) => return Left::Ended(reason),
        }
    }
}

fn step(vcpu: &mut VcpuFd, id: u8, around: &Surroundings<'_>) -> Step {
    let Surroundings { bus, memory, exits, .. } = around;
    let failed =
        |message: String| Step::Ended(ExitReason::Failed { message: format!("processor {id}: {message}") });
    exits.fetch_add(1, Ordering::Relaxed);
    match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => bus.read_port(port, data),
        Ok(VcpuExit::IoOut(port, data)) => {
            if let Err(ResetRequested) = bus.write_port(port, data) {
                return Step::Ended(reset_reason(memory));
            }
        }
        Ok(VcpuExit::MmioRead(address, data)) => bus.read_memory(address, data),
        Ok(VcpuExit::MmioWrite(address, data)) => bus.write_memory(address, data),
        Ok(VcpuExit::Shutdown) => return Step::Ended(ExitReason::TripleFault),
        Ok(VcpuExit::Intr) => return Step::Interrupted,
        Ok(VcpuExit::Hlt) => {}
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return failed(format!("KVM cannot enter the guest (hardware reason {reason:#x}, CPU {cpu})"));
        }
        Ok(VcpuExit::InternalError) => return failed("KVM cannot emulate what the guest does".into()),
        Ok(exit) => return failed(format!("unexpected exit {exit:?}")),
        Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {
            return Step::Interrupted;
        }
        Err(error) => return failed(format!("KVM_RUN: {error}")),
    }
    Step::Served
}

/// Why the guest pulsed the reset line, which `reboot=k` makes Linux do for reboot and, by `panic=-1`, for a panic. A processor that shuts
/// down instead (triple fault) crashed.
fn reset_reason(memory: &Memory) -> ExitReason {
    match memory.read_obj::<u16>(RESET_FLAG) {
        Ok(WARM) => ExitReason::Panic,
        _ => ExitReason::Reboot,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_from_a_reboot_by_the_reset_flag() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        assert_eq!(reset_reason(&memory), ExitReason::Reboot);
        memory.write_obj(WARM, RESET_FLAG).unwrap();
        assert_eq!(reset_reason(&memory), ExitReason::Panic);
    }
}
