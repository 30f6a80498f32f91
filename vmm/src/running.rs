//! A machine that runs: its event loop, and what clients of the control socket ask of it.
//!
//! ```text
//!              pause                   snapshot, touched
//!   running ──────────► paused ───────────────────────────► paused
//!      ▲                  │ resume
//!      └──────────────────┘            from either: stop, or the guest's own end ──► ended
//! ```
//!
//! Invariants:
//! * While the machine is paused no processor runs and no device hears of anything: guest memory does not change.
//! * A command is carried out whole before the next one, and before any event of a device.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;

use commonage_vmm_api::{ExitReason, Response, RunState};

use crate::control::Command;
use crate::entropy;
use crate::machine::{CONSOLE, CONTROL, HALT, HOST, Machine};
use crate::metrics;
use crate::snapshot::{self, Id, State, memory, touched};
use crate::virtio::balloon::Balloon;

/// Why a client's command was not carried out: what happened, and what to do.
type Refused = String;

impl Machine {
    /// Serves everything until the machine ends; tells why.
    pub(crate) fn event_loop(&mut self) -> ExitReason {
        loop {
            let served = if self.processors.paused() { self.serve_host(true) } else { self.serve_all() };
            match served {
                Ok(None) => {}
                Ok(Some(reason)) => return reason,
                Err(error) => return ExitReason::Failed { message: format!("event loop: {error}") },
            }
        }
    }

    /// One round of everything.
    fn serve_all(&mut self) -> io::Result<Option<ExitReason>> {
        let mut host = false;
        for event in self.reactor.wait()? {
            if event.source == HOST {
                host = true;
            } else if let Some(mut transport) = self.bus.virtio(event.source as usize) {
                transport.event(event.token, event.readiness);
            }
        }
        if host { self.serve_host(false) } else { Ok(None) }
    }

    /// One round of what is not the guest's, for which it may `wait`.
    fn serve_host(&mut self, wait: bool) -> io::Result<Option<ExitReason>> {
        let mut look = false;
        for event in self.host.round(wait)? {
            match event.source {
                CONSOLE => self.bus.console().commit(),
                HALT => {
                    self.halt.event(event.token);
                    look = true;
                }
                CONTROL => {
                    if let Some(control) = &mut self.control {
                        control.event(event.token);
                    }
                }
                _ => {} // the machine's end, which is looked at below
            }
        }
        if let Some(reason) = self.exit.get() {
            return Ok(Some(reason));
        }
        if look && self.has_halted() {
            return Ok(Some(ExitReason::Halt));
        }
        Ok(self.execute())
    }

    /// Whether the guest has halted. If not, it is looked at again later.
    fn has_halted(&mut self) -> bool {
        let paused = self.processors.paused();
        if !paused {
            self.processors.pause();
        }
        let halted = self.processors.all_halted();
        if !halted {
            self.halt.again();
        }
        if !paused {
            self.processors.resume();
        }
        halted
    }

    /// Carries out what clients ask of the machine; tells if it ends.
    fn execute(&mut self) -> Option<ExitReason> {
        while let Some((client, command)) = self.control.as_mut().and_then(|control| control.next()) {
            let done = |result: Result<(), Refused>| match result {
                Ok(()) => Response::Done,
                Err(message) => Response::Error { message },
            };
            let response = match command {
                Command::Status => self.status(),
                Command::Pause => {
                    self.processors.pause();
                    Response::Done
                }
                Command::Resume => {
                    self.processors.resume();
                    Response::Done
                }
                Command::Snapshot { state, memory } => done(self.snapshot(&state, &memory)),
                Command::Touched { file } => done(self.touched(&file)),
                Command::Metrics => Response::Metrics(Box::new(metrics::gather(
                    &self.bus,
                    self.vm.memory(),
                    &self.private,
                    self.processors.metrics(),
                ))),
                Command::Balloon { memory_mib } => {
                    match self.bus.with_device(|balloon: &mut Balloon| balloon.leave(memory_mib)) {
                        Some(()) => Response::Done,
                        None => Response::Error {
                            message: "this machine has no balloon: its configuration has no `balloon`".into(),
                        },
                    }
                }
                Command::Stop { grace } => {
                    // A paused guest could not answer.
                    let asked = !grace.is_zero()
                        && !self.processors.paused()
                        && self.control.as_mut().is_some_and(|control| control.ask_guest(grace));
                    if !asked {
                        return Some(ExitReason::Stopped);
                    }
                    continue;
                }
            };
            if let Some(control) = &mut self.control {
                control.answer(client, &response);
            }
        }
        None
    }

    fn status(&self) -> Response {
        Response::Status {
            pid: std::process::id(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            state: if self.processors.paused() { RunState::Paused } else { RunState::Running },
        }
    }

    /// Writes the whole machine to two files.
    fn snapshot(&self, state: &File, memory: &File) -> Result<(), Refused> {
        if !self.processors.paused() {
            return Err("the machine is running; pause it before a snapshot".into());
        }
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: &dyn std::fmt::Display| {
                format!("cannot {what}: {error}; the machine is as it was, paused")
            }
        };
        let mut devices = Vec::new();
        for index in 0.. {
            let Some(mut transport) = self.bus.virtio(index) else { break };
            transport
                .quiesce()
                .map_err(|error| failed(&format!("finish virtio device {index}'s requests"))(&error))?;
        }
        for index in 0.. {
            let Some(mut transport) = self.bus.virtio(index) else { break };
            devices.push(transport.save());
        }
        let mut id = Id::default();
        entropy::fill(&mut id).map_err(|error| failed("name the snapshot")(&error))?;
        let memory_checksum = memory::save(self.vm.memory(), self.pagemap.as_ref(), memory, id)
            .and_then(|checksum| memory.sync_all().map(|()| checksum))
            .map_err(|error| failed("write the memory file")(&error))?;
        let kvm = failed("read the machine's state");
        let msrs = self.vm.msrs_to_save().map_err(|error| kvm(&error))?;
        let (cpuid, tsc_khz) = self.processors.first_cpu().map_err(|error| kvm(&error))?;
        let saved = State {
            id,
            shape: self.shape.clone(),
            memory_checksum,
            cpuid,
            tsc_khz,
            vcpus: self.processors.save(&msrs).map_err(|error| kvm(&error))?,
            vm: self.vm.save().map_err(|error| kvm(&error))?,
            serial: self.bus.save_serial(),
            devices,
        };
        snapshot::write_whole(state, &saved.encode())
            .and_then(|()| state.sync_all())
            .map_err(|error| failed("write the state file")(&error))
    }

    /// Writes which pages a clone has to itself.
    fn touched(&self, file: &File) -> Result<(), Refused> {
        let Some(id) = self.snapshot_of else {
            return Err(
                "the machine did not start from a snapshot: there is nothing that it could share".into()
            );
        };
        let Some(pagemap) = &self.pagemap else {
            return Err(
                "the host does not tell which pages are whose; mount /proc before the machine starts".into(),
            );
        };
        pagemap
            .private_ranges(self.vm.memory())
            .and_then(|ranges| snapshot::write_whole(file, &touched::encode(id, &ranges)))
            .map_err(|error| format!("cannot write the list of pages: {error}"))
    }
}
