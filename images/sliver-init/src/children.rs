//! The one place where processes are started and reaped.
//!
//! PID 1 inherits every orphan, so it must reap processes it did not start, yet each exit status of one it did start must reach
//! whoever started it. Both happen here, under one lock: [`Children::spawn`] holds it from before the fork until the child is
//! registered, and the reaper sleeps in `waitid(WNOWAIT)`, which takes nothing away, then takes the lock and only then reaps. So no
//! child can be reaped before it is registered, the standard library's own wait for a child whose exec failed finds it, and a
//! process id is signalled only while it cannot have been given to another process.
//!
//! Outside of a machine of its own (in tests) only registered children are waited for, each by a thread.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::num::NonZeroI32;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus};

/// Starts processes and reaps them. Clones are the same.
#[derive(Debug, Clone)]
pub struct Children(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    adopts: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Children that have not been reaped, by process id, and where their status goes.
    running: BTreeMap<NonZeroI32, File>,
    /// The reaper found that there is no child at all.
    childless: bool,
    /// Nothing may be started any more.
    closed: bool,
}

/// A child: its process id (also its group and session, when it leads them) and its end.
#[derive(Debug)]
pub struct Child {
    /// Its process id.
    pub pid: Pid,
    /// Its end.
    pub exit: Exit,
}

/// The read end of a pipe that will carry an exit status: can be polled.
#[derive(Debug)]
pub struct Exit(File);

impl AsFd for Exit {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Exit {
    /// Waits for the exit status; 128 + n when signal n ended the process.
    pub fn wait(mut self) -> i32 {
        self.take()
    }

    /// The exit status; waits unless the pipe is readable.
    pub fn take(&mut self) -> i32 {
        let mut status = [0; 4];
        // The writing end is closed without a status only when the reaper is gone, which ends the machine anyway.
        match self.0.read_exact(&mut status) {
            Ok(()) => i32::from_ne_bytes(status),
            Err(_) => 255,
        }
    }
}

impl Children {
    /// For PID 1: reaps every child, own or adopted, from a thread that never ends.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn adopting() -> io::Result<Self> {
        let children = Self::new(true);
        let reaper = children.clone();
        crate::thread("reaper", move || reaper.reap_all())?;
        Ok(children)
    }

    /// For any other process: reaps only what [`Children::spawn`] started.
    pub fn own() -> Self {
        Self::new(false)
    }

    fn new(adopts: bool) -> Self {
        Self(Arc::new(Shared { adopts, state: Mutex::default(), changed: Condvar::new() }))
    }

    /// Starts a process.
    ///
    /// # Errors
    /// It cannot be started; or the machine is ending.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let mut state = self.lock();
        if state.closed {
            return Err(io::Error::other("the sliver is being shut down"));
        }
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        state.running.insert(pid.as_raw_nonzero(), write.into());
        state.childless = false;
        drop(state);
        if self.0.adopts {
            self.0.changed.notify_all();
        } else {
            let waiter = self.clone();
            crate::thread("waiter", move || {
                let _ =
                    rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
                waiter.reap(|| rustix::process::waitpid(Some(pid), WaitOptions::NOHANG));
            })?;
        }
        Ok(Child { pid, exit: Exit(read.into()) })
    }

    /// Sends a signal to the process group that `leader`, one of ours, leads; nothing if it has ended.
    pub fn signal_group(&self, leader: Pid, signal: Signal) {
        if self.lock().running.contains_key(&leader.as_raw_nonzero()) {
            // The only error left is that every process of the group ended meanwhile.
            let _ = rustix::process::kill_process_group(leader, signal);
        }
    }

    /// From now on nothing is started.
    pub fn close(&self) {
        self.lock().closed = true;
    }

    /// Waits until there is no child, own or adopted. Returns whether that is so.
    pub fn wait_childless(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut state = self.lock();
        while !state.childless {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // State is consistent after every statement, so a panic elsewhere while it was held does no harm.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reap_all(&self) {
        loop {
            let peeked = rustix::process::waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
            if matches!(peeked, Err(rustix::io::Errno::CHILD)) {
                // Orphans descend from children: while there are none, none can come but by a spawn.
                let mut state = self.lock();
                while state.running.is_empty() {
                    state.childless = true;
                    self.0.changed.notify_all();
                    state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                continue;
            }
            self.reap(|| rustix::process::wait(WaitOptions::NOHANG));
        }
    }

    fn reap(&self, wait: impl Fn() -> rustix::io::Result<Option<(Pid, WaitStatus)>>) {
        let mut state = self.lock();
        while let Ok(Some((pid, status))) = wait() {
            if let Some(mut to) = state.running.remove(&pid.as_raw_nonzero()) {
                // Nobody may be left who wants to know.
                let _ = to.write_all(&exit_status(status).to_ne_bytes());
            }
        }
    }
}

/// The exit status as shells tell it.
fn exit_status(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128_i32.saturating_add(signal),
        (None, None) => 255,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(line: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", line]);
        command
    }

    #[test]
    fn statuses_arrive() {
        let children = Children::own();
        let one = children.spawn(&mut shell("exit 42")).unwrap();
        let two = children.spawn(&mut shell("kill -TERM $$")).unwrap();
        assert_eq!(two.exit.wait(), 128 + 15);
        assert_eq!(one.exit.wait(), 42);
    }

    #[test]
    fn what_cannot_be_started_is_an_error_and_leaves_nothing() {
        let children = Children::own();
        assert!(children.spawn(&mut Command::new("/nonexistent")).is_err());
        assert!(children.lock().running.is_empty());
        children.close();
        assert!(children.spawn(&mut shell("true")).is_err());
    }
}
