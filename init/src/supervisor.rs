//! Keeps services running and buries every dead process that was left to PID 1.
//!
//! A service that dies is started again after a pause that doubles from 200 ms to 30 s; having lived for a minute it
//! starts over with the shortest. All dead processes are reaped in one place, which knows the services by their process
//! id, so no exit status is lost to the burial of orphans. Whoever runs a program and waits for it by itself must not
//! come back here before it has ended.

use std::{
    os::unix::process::ExitStatusExt as _,
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    process::{Pid, Signal, WaitOptions, kill_process, wait},
};

use crate::{
    error::{Context as _, Error, Result},
    signals,
};

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const LIVED: Duration = Duration::from_secs(60);

/// The pause before a service is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(FIRST_PAUSE)
    }
}

impl Backoff {
    /// The pause after a life of this length.
    pub fn after(&mut self, life: Duration) -> Duration {
        if life >= LIVED {
            self.0 = FIRST_PAUSE;
        }
        let pause = self.0;
        self.0 = (pause * 2).min(LONGEST_PAUSE);
        pause
    }
}

/// What happened to a service.
#[derive(Debug)]
pub struct Death {
    /// Its name.
    pub name: String,
    /// How it ended.
    pub status: ExitStatus,
    /// It is started again after this; nothing if it was told to end.
    pub again_in: Option<Duration>,
}

enum State {
    Running { pid: Pid, since: Instant },
    Waiting { until: Instant },
    Ended,
}

struct Service {
    name: String,
    command: Command,
    state: State,
    backoff: Backoff,
    wanted: bool,
}

/// The services of PID 1. Its owner waits for SIGCHLD and [`Supervisor::deadline`].
#[derive(Default)]
pub struct Supervisor(Vec<Service>);

impl Supervisor {
    /// Starts a service and keeps it running from now on.
    ///
    /// # Errors
    /// When its program cannot be started at all.
    pub fn start(&mut self, name: &str, mut command: Command, now: Instant) -> Result<()> {
        signals::receive_in(&mut command);
        let state = State::Running { pid: spawn(name, &mut command)?, since: now };
        let (name, backoff) = (name.to_owned(), Backoff::default());
        self.0.push(Service { name, command, state, backoff, wanted: true });
        Ok(())
    }

    /// Reaps everything that is dead; tells which services were among it.
    pub fn reap(&mut self, now: Instant) -> Vec<Death> {
        let mut deaths = Vec::new();
        loop {
            let (dead, status) = match wait(WaitOptions::NOHANG) {
                Ok(Some(it)) => it,
                Err(Errno::INTR) => continue,
                Ok(None) | Err(_) => return deaths,
            };
            for service in &mut self.0 {
                let State::Running { pid, since } = service.state else { continue };
                if pid != dead {
                    continue;
                }
                let life = now.saturating_duration_since(since);
                let again_in = service.wanted.then(|| service.backoff.after(life));
                service.state = again_in.map_or(State::Ended, |p| State::Waiting { until: now + p });
                let status = ExitStatus::from_raw(status.as_raw());
                deaths.push(Death { name: service.name.clone(), status, again_in });
            }
        }
    }

    /// When a service is to be started again.
    pub fn deadline(&self) -> Option<Instant> {
        let waiting = self.0.iter().filter_map(|s| match s.state {
            State::Waiting { until } if s.wanted => Some(until),
            _ => None,
        });
        waiting.min()
    }

    /// Starts again the services whose pause is over; tells which, and how it went. What could not be started is tried again.
    pub fn restart_due(&mut self, now: Instant) -> Vec<(String, Result<()>)> {
        let mut told = Vec::new();
        for service in &mut self.0 {
            if !matches!(service.state, State::Waiting { until } if service.wanted && until <= now) {
                continue;
            }
            let started = match spawn(&service.name, &mut service.command) {
                Ok(pid) => {
                    service.state = State::Running { pid, since: now };
                    Ok(())
                }
                Err(e) => {
                    service.state = State::Waiting { until: now + service.backoff.after(Duration::ZERO) };
                    Err(e)
                }
            };
            told.push((service.name.clone(), started));
        }
        told
    }

    /// Kills a service's process, which is then started again. Says whether it ran.
    pub fn kill(&mut self, name: &str) -> bool {
        let running = self.0.iter().find_map(|s| match s.state {
            State::Running { pid, .. } if s.name == name => Some(pid),
            _ => None,
        });
        running.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok())
    }

    /// Sends a service a signal and does not start it again when it ends.
    pub fn stop(&mut self, name: &str, signal: Signal) {
        for service in self.0.iter_mut().filter(|s| s.name == name) {
            service.wanted = false;
            match &service.state {
                // Not reaped yet, so the pid is still its own.
                State::Running { pid, .. } => drop(kill_process(*pid, signal)),
                _ => service.state = State::Ended,
            }
        }
    }

    /// Whether a service's process lives.
    pub fn runs(&self, name: &str) -> bool {
        self.0.iter().any(|s| s.name == name && matches!(s.state, State::Running { .. }))
    }
}

fn spawn(name: &str, command: &mut Command) -> Result<Pid> {
    // Dropping the child's handle neither ends nor reaps it; its streams are the console.
    let child = command.spawn().what(|| format!("start {name}"))?;
    Pid::from_raw(child.id().cast_signed())
        .ok_or_else(|| Error::TimedOut(format!("{name} got no process id")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{poll, signals::Signals};
    use std::os::fd::AsFd as _;

    #[test]
    fn pauses_double_and_start_over() {
        let mut backoff = Backoff::default();
        let pauses: Vec<_> = (0..10).map(|_| backoff.after(Duration::ZERO).as_millis()).collect();
        assert_eq!(pauses, [200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000]);
        assert_eq!(backoff.after(LIVED), FIRST_PAUSE);
    }

    /// One test for all that waits for children, since waiting is for every child of the process.
    #[test]
    #[ignore = "needs a process of its own (reaps every child): cargo test -p commonage-init supervis -- --ignored"]
    fn restarts_stops_and_buries() {
        let signals = Signals::open(&[libc::SIGCHLD]).unwrap();
        let mut supervisor = Supervisor::default();
        let mut false_command = Command::new("/bin/false");
        false_command.env_clear();
        let start = Instant::now();
        supervisor.start("false", false_command, start).unwrap();
        let mut sleep = Command::new("/bin/sleep");
        sleep.arg("1000");
        supervisor.start("sleep", sleep, start).unwrap();
        #[expect(clippy::zombie_processes, reason = "whether it is buried is what is tested")]
        let orphan = Command::new("/bin/true").spawn().unwrap();
        // The signal may go to a thread of the test runner that ignores it: look again soon.
        let soon = || Some(Instant::now() + Duration::from_millis(20));
        let mut deaths = Vec::new();
        while deaths.is_empty() {
            poll::wait(&[signals.as_fd()], soon()).unwrap();
            signals.read();
            deaths.extend(supervisor.reap(start));
        }
        assert_eq!((deaths[0].name.as_str(), deaths[0].status.code()), ("false", Some(1)));
        assert_eq!(deaths[0].again_in, Some(FIRST_PAUSE));
        assert_eq!(supervisor.deadline(), Some(start + FIRST_PAUSE));
        assert!(supervisor.restart_due(start).is_empty() && !supervisor.runs("false"));
        assert!(supervisor.restart_due(start + FIRST_PAUSE)[0].1.is_ok());
        assert!(supervisor.runs("false") && supervisor.runs("sleep"));
        supervisor.stop("sleep", Signal::TERM);
        supervisor.stop("false", Signal::KILL);
        while supervisor.runs("sleep") || supervisor.runs("false") {
            poll::wait(&[signals.as_fd()], soon()).unwrap();
            signals.read();
            supervisor.reap(start);
        }
        assert_eq!(supervisor.deadline(), None);
        while std::path::Path::new(&format!("/proc/{}", orphan.id())).exists() {
            poll::wait(&[signals.as_fd()], soon()).unwrap();
            supervisor.reap(start);
        }
    }
}
