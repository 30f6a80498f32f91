//! All processors of a machine: one thread each, stopped and started together.
//!
//! ```text
//!            start()                 pause()                     resume()
//!  created ──────────► running ─────────────────► parked ─────────────────► running
//!                         │     gate closed, each          gate opened
//!                         │     thread signalled until
//!                         ▼     it has parked
//!                       ended  (the first reason is the machine's)
//! ```
//!
//! Invariants:
//! * A thread holds its processor's lock exactly while it is not parked, so whoever has paused the machine may use all processors.
//! * A signal only interrupts: that the machine pauses is said by the gate, so a signal that comes between the look at the gate
//!   and the guest is not missed for good: it is sent again until the thread has parked.
#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use commonage_vmm_api::{ExitReason, VcpuMetrics};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::devices::bus::Bus;
use crate::seccomp::Filter;
use crate::vcpu::{self, Left, Surroundings};
use crate::vcpu_state::{self, VcpuState};
use crate::virtio::Memory;
use crate::vm::{VmError, refused};

/// Stack of a processor's thread, bytes. Far more than it needs, and too little for the host to back with a huge page that is the machine's alone.
const STACK: usize = 512 << 10;

/// How long a signalled thread may take to park before it is signalled again. Only one that was signalled just before it entered the guest
/// needs that.
const SIGNAL_AGAIN: Duration = Duration::from_millis(1);

/// How a processor's thread tells the event loop that the machine ends. The first reason counts.
pub struct Exit {
    reason: Mutex<Option<ExitReason>>,
    event: EventFd,
}

impl Exit {
    /// No reason yet; `event` is written when there is one.
    pub fn new(event: EventFd) -> Self {
        Self { reason: Mutex::new(None), event }
    }

    /// The machine ends for `reason`, unless it does for another already.
    pub fn set(&self, reason: ExitReason) {
        lock(&self.reason).get_or_insert(reason);
        let _ = self.event.write(1); // fails only if the counter is full: told already
    }

    /// Why the machine ends, if it does.
    pub fn get(&self) -> Option<ExitReason> {
        lock(&self.reason).clone()
    }

    /// Readable when the machine ends.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// Locks, also after another thread panicked: nothing behind these locks can be left half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Processor {
    id: u8,
    fd: Mutex<VcpuFd>,
    exits: AtomicU64,
}

/// Where threads wait while the machine is paused.
#[derive(Default)]
struct Gate {
    /// The same as `Inside::closed`, to be looked at without the lock.
    closed: AtomicBool,
    inside: Mutex<Inside>,
    changed: Condvar,
}

#[derive(Default)]
struct Inside {
    closed: bool,
    parked: usize,
    /// Threads that are gone because the machine ends.
    ended: usize,
}

impl Gate {
    fn set_closed(&self, closed: bool) {
        lock(&self.inside).closed = closed;
        self.closed.store(closed, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// A thread comes by: waits until the gate is open.
    fn pass(&self) {
        let mut inside = lock(&self.inside);
        inside.parked += 1;
        self.changed.notify_all();
        while inside.closed {
            inside = self.changed.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
        inside.parked -= 1;
    }

    /// A thread comes by for the last time.
    fn leave(&self) {
        lock(&self.inside).ended += 1;
        self.changed.notify_all();
    }

    /// Waits a while for `count` threads to have parked or ended. True if they have.
    fn all_in(&self, count: usize, patience: Duration) -> bool {
        let inside = lock(&self.inside);
        let missing = |inside: &mut Inside| inside.parked + inside.ended < count;
        let (inside, _) = self
            .changed
            .wait_timeout_while(inside, patience, missing)
            .unwrap_or_else(PoisonError::into_inner);
        inside.parked + inside.ended >= count
    }
}

/// What one thread works with.
#[derive(Clone)]
struct Shared {
    bus: Arc<Bus>,
    memory: Memory,
    gate: Arc<Gate>,
    exit: Arc<Exit>,
}

/// The processors of one machine.
pub struct Processors {
    all: Vec<Arc<Processor>>,
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
    paused: bool,
}

/// Nothing: the signal is sent only to interrupt KVM_RUN.
extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Processors {
    /// Processors that do not run yet.
    pub fn new(fds: Vec<VcpuFd>) -> Self {
        let all = (0..)
            .zip(fds)
            .map(|(id, fd)| Arc::new(Processor { id, fd: Mutex::new(fd), exits: AtomicU64::new(0) }));
        Self { all: all.collect(), threads: Vec::new(), gate: Arc::default(), paused: false }
    }

    /// Lets them run, each in a thread of its own under `filter`.
    pub fn start(
        &mut self,
        bus: &Arc<Bus>,
        memory: &Memory,
        exit: &Arc<Exit>,
        filter: &Filter,
    ) -> io::Result<()> {
        register_signal_handler(SIGRTMIN(), ignore)?;
        for processor in &self.all {
            let shared = Shared {
                bus: Arc::clone(bus),
                memory: memory.clone(),
                gate: Arc::clone(&self.gate),
                exit: Arc::clone(exit),
            };
            let (processor, filter) = (Arc::clone(processor), filter.clone());
            let thread = std::thread::Builder::new().name(format!("vcpu{}", processor.id)).stack_size(STACK);
            self.threads.push(thread.spawn(move || processor.run(&shared, filter))?);
        }
        Ok(())
    }

    /// Stops all between two instructions; returns when they have.
    pub fn pause(&mut self) {
        self.paused = true;
        self.gate.set_closed(true);
        loop {
            for thread in &self.threads {
                let _ = thread.kill(SIGRTMIN()); // fails only if the thread has ended
            }
            if self.gate.all_in(self.threads.len(), SIGNAL_AGAIN) {
                return;
            }
        }
    }

    /// Lets paused processors go on.
    pub fn resume(&mut self) {
        if !self.paused {
            return; // their threads hold their locks
        }
        for processor in &self.all {
            // Tells the guest's watchdogs that they missed nothing; refused if the guest does not use kvm-clock.
            let _ = lock(&processor.fd).kvmclock_ctrl();
        }
        self.paused = false;
        self.gate.set_closed(false);
    }

    /// Whether they are paused.
    pub fn paused(&self) -> bool {
        self.paused
    }

    /// CPUID of the first, and the frequency of its time-stamp counter, kHz; the others' differ only in what a number tells them apart.
    pub fn first_cpu(&self) -> Result<(Vec<kvm_cpuid_entry2>, u32), VmError> {
        let Some(first) = self.all.first() else { return Ok((Vec::new(), 0)) };
        let fd = lock(&first.fd);
        let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(refused("to tell a processor's CPUID"))?;
        Ok((cpuid.as_slice().to_vec(), fd.get_tsc_khz().map_err(refused("to tell the TSC's frequency"))?))
    }

    /// The state of each. They must be paused.
    pub fn save(&self, msrs: &[u32]) -> Result<Vec<VcpuState>, VmError> {
        self.all.iter().map(|processor| VcpuState::of(&lock(&processor.fd), msrs)).collect()
    }

    /// Whether nothing can wake any of them: all are halted with interrupts off. They must be paused.
    pub fn all_halted(&self) -> bool {
        self.all.iter().all(|processor| vcpu_state::is_halted_for_good(&lock(&processor.fd)))
    }

    /// What each has done.
    pub fn metrics(&self) -> Vec<VcpuMetrics> {
        let exits = |processor: &Arc<Processor>| processor.exits.load(Ordering::Relaxed);
        self.all.iter().map(|processor| VcpuMetrics { exits: exits(processor) }).collect()
    }
}

impl Processor {
    fn run(&self, shared: &Shared, filter: Filter) {
        let installed = filter.install();
        drop(filter); // the kernel has its own copy
        if let Err(error) = installed {
            shared.exit.set(ExitReason::Failed { message: error.to_string() });
            return shared.gate.leave();
        }
        let around = Surroundings {
            bus: &shared.bus,
            memory: &shared.memory,
            closed: &shared.gate.closed,
            exits: &self.exits,
        };
        loop {
            let left = vcpu::run(&mut lock(&self.fd), self.id, &around);
            match left {
                Left::Parked => shared.gate.pass(),
                Left::Ended(reason) => {
                    shared.exit.set(reason);
                    return shared.gate.leave();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_that_is_closed_holds_all_and_one_that_is_opened_lets_all_go_on() {
        let gate = Arc::new(Gate::default());
        let passed = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (gate, passed) = (Arc::clone(&gate), Arc::clone(&passed));
                std::thread::spawn(move || {
                    for _ in 0..100 {
                        gate.pass();
                        passed.fetch_add(1, Ordering::SeqCst);
                    }
                    gate.leave();
                })
            })
            .collect();
        for _ in 0..20 {
            gate.set_closed(true);
            while !gate.all_in(3, Duration::from_millis(10)) {}
            let before = passed.load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(passed.load(Ordering::SeqCst), before);
            gate.set_closed(false);
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(passed.load(Ordering::SeqCst), 300);
        assert!(gate.all_in(3, Duration::ZERO));
        assert!(!gate.all_in(4, Duration::ZERO));
    }
}
