//! The system calls that are left to each kind of thread once the machine is built. Everything else, in any thread, ends the process at once
//! (SIGSYS; the kernel's log tells which call it was).
//!
//! A filter is a list of calls with conditions on their arguments; beside each stands what needs it. No path is ever passed to a call that
//! is left, no process can be made, nothing can become executable, and no socket is made but in pairs.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_list,
    kvm_msrs, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Why a thread has no filter.
#[derive(Debug, thiserror::Error)]
#[error("cannot restrict system calls: {0}; the host's kernel needs CONFIG_SECCOMP_FILTER")]
pub struct FilterError(#[from] seccompiler::Error);

impl From<BackendError> for FilterError {
    fn from(error: BackendError) -> Self {
        Self(error.into())
    }
}

/// What one kind of thread may call.
#[derive(Clone)]
pub struct Filter(BpfProgram);

impl Filter {
    /// For the thread that serves devices and clients.
    ///
    /// # Errors
    /// Never with these lists.
    pub fn event_loop() -> Result<Self, FilterError> {
        compile(&[COMMON, EVENT_LOOP])
    }

    /// For threads that run a virtual processor.
    ///
    /// # Errors
    /// Never with these lists.
    pub fn vcpu() -> Result<Self, FilterError> {
        compile(&[COMMON, VCPU])
    }

    /// Puts the calling thread under it, for ever.
    ///
    /// # Errors
    /// The kernel has no filters.
    pub fn install(&self) -> Result<(), FilterError> {
        Ok(seccompiler::apply_filter(&self.0)?)
    }
}

/// A condition on an argument: masked, it is `value`.
#[derive(Clone, Copy)]
struct Check {
    argument: u8,
    /// Whether all 64 bits of it count, or the low 32.
    wide: bool,
    mask: u32,
    value: u32,
}

/// A call, and the alternatives under which it is allowed; always if there are none. In an alternative all checks must hold.
struct Call(libc::c_long, &'static [&'static [Check]]);

const fn is(argument: u8, value: u32) -> Check {
    Check { argument, wide: false, mask: u32::MAX, value }
}

const fn null(argument: u8) -> Check {
    Check { argument, wide: true, mask: u32::MAX, value: 0 }
}

const fn has(argument: u8, bits: i32) -> Check {
    Check { argument, wide: false, mask: bits as u32, value: bits as u32 }
}

const fn lacks(argument: u8, bits: i32) -> Check {
    Check { argument, wide: false, mask: bits as u32, value: 0 }
}

/// An ioctl's request.
const fn request(value: u32) -> Check {
    is(1, value)
}

/// KVM's requests, composed as `include/uapi/asm-generic/ioctl.h` does.
const fn kvm(direction: u32, number: u32, size: usize) -> Check {
    const KVMIO: u32 = 0xae;
    request(direction << 30 | (size as u32) << 16 | KVMIO << 8 | number)
}

const fn kvm_plain(number: u32) -> Check {
    kvm(0, number, 0)
}

const fn kvm_read<T>(number: u32) -> Check {
    kvm(2, number, size_of::<T>())
}

const fn kvm_exchange<T>(number: u32) -> Check {
    kvm(3, number, size_of::<T>())
}

/// The signal that calls a processor's thread out of the guest: `SIGRTMIN`, of which the C library keeps two to itself.
const KICK: u32 = 34;

/// What every thread needs: memory, locks, the console's log, its own end.
const COMMON: &[Call] = &[
    // The allocator and thread stacks: anonymous memory only, and none of it executable.
    Call(libc::SYS_mmap, &[&[lacks(2, libc::PROT_EXEC), has(3, libc::MAP_ANONYMOUS)]]),
    Call(libc::SYS_mprotect, &[&[lacks(2, libc::PROT_EXEC)]]),
    Call(libc::SYS_munmap, &[]),
    Call(libc::SYS_mremap, &[]),
    Call(libc::SYS_brk, &[]),
    // The allocator gives back; the balloon gives back guest memory.
    Call(libc::SYS_madvise, &[&[is(2, libc::MADV_DONTNEED as u32)]]),
    // Mutexes.
    Call(libc::SYS_futex, &[]),
    // Events (eventfd), timers, the log on standard output or error.
    Call(libc::SYS_read, &[]),
    Call(libc::SYS_write, &[]),
    // The console's log file, which is cut when it is full; snapshots.
    Call(libc::SYS_pread64, &[]),
    Call(libc::SYS_pwrite64, &[]),
    Call(libc::SYS_ftruncate, &[]),
    // The console's incomplete line.
    Call(libc::SYS_timerfd_settime, &[]),
    // The console's clients; vsock. To who is connected, never to an address.
    Call(libc::SYS_sendto, &[&[null(4)]]),
    Call(libc::SYS_close, &[]),
    // Devices that a guest's register access starts or stops.
    Call(libc::SYS_epoll_ctl, &[]),
    // The disk's ring, which was made and restricted before: a guest that resets its disk waits for what is under way.
    Call(libc::SYS_io_uring_enter, &[]),
    // Where the clock cannot be read without the kernel.
    Call(libc::SYS_clock_gettime, &[]),
    // The entropy device; hash tables' seeds.
    Call(libc::SYS_getrandom, &[]),
    // A thread that runs the guest is called out of it by a signal; waits that a stop signal broke go on.
    Call(libc::SYS_rt_sigreturn, &[]),
    Call(libc::SYS_rt_sigprocmask, &[]),
    Call(libc::SYS_restart_syscall, &[]),
    // The standard library's check, where debug assertions are on, that what it closes is open.
    #[cfg(debug_assertions)]
    Call(libc::SYS_fcntl, &[&[is(1, libc::F_GETFD as u32)]]),
    // The end of a thread and of the process.
    Call(libc::SYS_sigaltstack, &[]),
    Call(libc::SYS_exit, &[]),
    Call(libc::SYS_exit_group, &[]),
];

/// What serving devices and clients needs besides.
const EVENT_LOOP: &[Call] = &[
    Call(libc::SYS_epoll_wait, &[]),
    Call(libc::SYS_epoll_pwait, &[]),
    // Clients of the control socket and of vsock, with descriptors either way.
    Call(libc::SYS_accept4, &[]),
    Call(libc::SYS_recvmsg, &[]),
    Call(libc::SYS_sendmsg, &[]),
    Call(libc::SYS_recvfrom, &[]),
    Call(libc::SYS_shutdown, &[]),
    // The guest's connections to the host: one end is handed to the client that accepts them.
    Call(libc::SYS_socketpair, &[&[is(0, libc::AF_UNIX as u32)]]),
    // A guest's grace, once a client asks for one; the disk's rate limit, once it holds something back.
    Call(libc::SYS_timerfd_create, &[]),
    // The disk: writes to the page cache.
    Call(libc::SYS_pwritev, &[]),
    Call(
        libc::SYS_ioctl,
        &[
            // Clients' streams do not block.
            &[request(libc::FIONBIO as u32)],
            // A snapshot: of the machine's parts …
            &[kvm_exchange::<kvm_irqchip>(0x62)],
            &[kvm_read::<kvm_clock_data>(0x7c)],
            &[kvm_read::<kvm_pit_state2>(0x9f)],
            &[kvm_exchange::<kvm_msr_list>(0x02)],
            // … and of each processor's.
            &[kvm_read::<kvm_regs>(0x81)],
            &[kvm_read::<kvm_sregs>(0x83)],
            &[kvm_exchange::<kvm_msrs>(0x88)],
            &[kvm_exchange::<kvm_cpuid2>(0x91)],
            &[kvm_read::<kvm_lapic_state>(0x8e)],
            &[kvm_read::<kvm_mp_state>(0x98)],
            &[kvm_read::<kvm_vcpu_events>(0x9f)],
            &[kvm_read::<kvm_debugregs>(0xa1)],
            &[kvm_plain(0xa3)], // KVM_GET_TSC_KHZ
            &[kvm_read::<kvm_xsave>(0xa4)],
            &[kvm_read::<kvm_xcrs>(0xa6)],
            // The guest's watchdogs are told that it was paused (KVM_KVMCLOCK_CTRL).
            &[kvm_plain(0xad)],
        ],
    ),
    // A snapshot that was reported done survives the host's end.
    Call(libc::SYS_fsync, &[]),
    // Calls processors' threads out of the guest.
    Call(libc::SYS_getpid, &[]),
    Call(libc::SYS_tgkill, &[&[is(2, KICK)]]),
    // A snapshot: holes in the file that memory came from need no copy. Memory figures are read again from the start.
    Call(libc::SYS_lseek, &[]),
];

/// What running a virtual processor needs besides.
const VCPU: &[Call] = &[
    // KVM_RUN.
    Call(libc::SYS_ioctl, &[&[kvm_plain(0x80)]]),
];

fn compile(lists: &[&[Call]]) -> Result<Filter, FilterError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for Call(number, alternatives) in lists.iter().copied().flatten() {
        let alternatives = alternatives.iter().map(|checks| {
            let conditions: Result<Vec<_>, BackendError> = checks.iter().map(condition).collect();
            SeccompRule::new(conditions?)
        });
        rules.insert(*number, alternatives.collect::<Result<_, _>>()?);
    }
    let filter =
        SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(Filter(filter.try_into()?))
}

fn condition(check: &Check) -> Result<SeccompCondition, BackendError> {
    let operator = match check.mask {
        u32::MAX => SeccompCmpOp::Eq,
        mask => SeccompCmpOp::MaskedEq(u64::from(mask)),
    };
    let length = if check.wide { SeccompCmpArgLen::Qword } else { SeccompCmpArgLen::Dword };
    SeccompCondition::new(check.argument, length, operator, u64::from(check.value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_what_the_kernel_says() {
        // From <linux/kvm.h>, as a C compiler composes them.
        assert_eq!(kvm_plain(0x80).value, 0xae80); // KVM_RUN
        assert_eq!(kvm_read::<kvm_regs>(0x81).value, 0x8090_ae81); // KVM_GET_REGS
        assert_eq!(kvm_exchange::<kvm_irqchip>(0x62).value, 0xc208_ae62); // KVM_GET_IRQCHIP
        assert_eq!(kvm_read::<kvm_xsave>(0xa4).value, 0x9000_aea4); // KVM_GET_XSAVE
        assert_eq!(kvm_exchange::<kvm_msrs>(0x88).value, 0xc008_ae88); // KVM_GET_MSRS
    }

    #[test]
    fn the_kick_is_the_signal_that_processors_are_called_by() {
        assert_eq!(i32::try_from(KICK).unwrap(), vmm_sys_util::signal::SIGRTMIN());
    }

    #[test]
    fn no_call_is_listed_twice_for_a_thread() {
        for lists in [[COMMON, EVENT_LOOP], [COMMON, VCPU]] {
            let mut numbers: Vec<_> = lists.iter().copied().flatten().map(|call| call.0).collect();
            let all = numbers.len();
            numbers.sort_unstable();
            numbers.dedup();
            assert_eq!(numbers.len(), all);
        }
    }

    #[test]
    fn filters_compile_and_stay_small() {
        for filter in [Filter::event_loop().unwrap(), Filter::vcpu().unwrap()] {
            assert!(filter.0.len() < 1000, "{} instructions", filter.0.len()); // the kernel keeps 8 bytes of each
        }
    }
}
