//! A processor's whole state, as KVM tells and takes it.
//!
//! The order of the calls matters and is said where it does; it is the same that other monitors (Firecracker) found to be needed.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_debugregs,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use crate::snapshot::codec::{Reader, Refusal, Writer};
use crate::vm::{VmError, refused};

/// The TSC deadline: taken only once the TSC and the local APIC are as they were.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const INTERRUPT_FLAG: u64 = 1 << 9;

/// A processor between two instructions.
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Of `vcpu`, which is not running; `msrs` are the indices that KVM says must be saved.
    pub fn of(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, VmError> {
        let tell = || refused("to tell a processor's state");
        Ok(Self {
            // First: it makes KVM act upon INIT and SIPI that came, which changes the rest.
            mp_state: vcpu.get_mp_state().map_err(tell())?,
            regs: vcpu.get_regs().map_err(tell())?,
            sregs: vcpu.get_sregs().map_err(tell())?,
            xsave: Box::new(vcpu.get_xsave().map_err(tell())?),
            xcrs: vcpu.get_xcrs().map_err(tell())?,
            debug: vcpu.get_debug_regs().map_err(tell())?,
            lapic: vcpu.get_lapic().map_err(tell())?,
            msrs: read_msrs(vcpu, msrs)?,
            // Last: what the others do to pending events is in it.
            events: vcpu.get_vcpu_events().map_err(tell())?,
        })
    }

    /// Makes `vcpu`, whose CPUID is set, what this says.
    pub fn apply(&self, vcpu: &VcpuFd) -> Result<(), VmError> {
        vcpu.set_mp_state(self.mp_state).map_err(refused("whether a processor runs, as saved"))?;
        vcpu.set_regs(&self.regs).map_err(refused("a processor's saved registers"))?;
        vcpu.set_sregs(&self.sregs).map_err(refused("a processor's saved special registers"))?;
        // SAFETY: KVM reads 4096 bytes, the size of the structure, unless this process asked for dynamically enabled features
        // (arch_prctl ARCH_REQ_XCOMP_GUEST_PERM), which it never does.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(refused("a processor's saved vector registers"))?;
        // A host without XSAVE has none, and refuses to be told so.
        if self.xcrs.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.xcrs)
                .map_err(refused("which vector registers a processor uses, as saved"))?;
        }
        vcpu.set_debug_regs(&self.debug).map_err(refused("a processor's saved debug registers"))?;
        // After the special registers, which hold the APIC's base; before the MSRs, of which the TSC deadline needs it.
        vcpu.set_lapic(&self.lapic).map_err(refused("a local interrupt controller's saved state"))?;
        write_msrs(vcpu, &self.msrs)?;
        // After the registers, whose setting clears pending exceptions.
        vcpu.set_vcpu_events(&self.events).map_err(refused("a processor's saved pending events"))
    }

    /// Appends it to a state file.
    pub fn write(&self, to: &mut Writer) {
        to.plain(&self.mp_state);
        to.plain(&self.regs);
        to.plain(&self.sregs);
        to.plain(&*self.xsave);
        to.plain(&self.xcrs);
        to.plain(&self.debug);
        to.plain(&self.lapic);
        to.plains(&self.msrs);
        to.plain(&self.events);
    }

    /// Reads what [`VcpuState::write`] wrote.
    pub fn read(from: &mut Reader<'_>) -> Result<Self, Refusal> {
        Ok(Self {
            mp_state: from.plain()?,
            regs: from.plain()?,
            sregs: from.plain()?,
            xsave: Box::new(from.plain()?),
            xcrs: from.plain()?,
            debug: from.plain()?,
            lapic: from.plain()?,
            msrs: from.plains()?,
            events: from.plain()?,
        })
    }
}

/// Whether no interrupt can make `vcpu` go on: halted with interrupts off, or never started.
pub fn is_halted_for_good(vcpu: &VcpuFd) -> bool {
    let Ok(mp_state) = vcpu.get_mp_state() else { return false };
    match mp_state.mp_state {
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => true,
        KVM_MP_STATE_HALTED => vcpu.get_regs().is_ok_and(|regs| regs.rflags & INTERRUPT_FLAG == 0),
        _ => false,
    }
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, VmError> {
    Msrs::from_entries(entries).map_err(|error| VmError::Refused {
        what: "so many model-specific registers",
        source: std::io::Error::other(error),
    })
}

/// Those of `indices` that can be read, the TSC deadline last. KVM lists some that this host does not have.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, VmError> {
    let mut indices = indices.to_vec();
    indices.sort_by_key(|index| *index == MSR_TSC_DEADLINE);
    let mut wanted: Vec<_> =
        indices.into_iter().map(|index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut found = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let mut msrs = list(&wanted)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(refused("to tell model-specific registers"))?;
        found.extend(msrs.as_slice().iter().take(read).copied());
        wanted.drain(..wanted.len().min(read + 1)); // and the one at which it stopped
    }
    Ok(found)
}

/// Sets all. One that KVM refuses must have the value already.
fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), VmError> {
    let mut left = entries;
    while !left.is_empty() {
        let written = vcpu.set_msrs(&list(left)?).map_err(refused("model-specific registers"))?;
        let Some((stuck, rest)) = left.get(written..).and_then(<[_]>::split_first) else { return Ok(()) };
        let mut current = list(&[kvm_msr_entry { index: stuck.index, ..Default::default() }])?;
        let same = vcpu.get_msrs(&mut current).is_ok_and(|read| read == 1)
            && current.as_slice().first().is_some_and(|entry| entry.data == stuck.data);
        if !same {
            return Err(VmError::Msr { index: stuck.index, value: stuck.data });
        }
        left = rest;
    }
    Ok(())
}
