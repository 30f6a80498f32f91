//! The only place that puts a machine together, and the event loop that keeps it running.
//!
//! ```text
//!  Machine::new   opens every file, maps memory, loads the kernel, creates KVM's machine, devices, processors and sockets
//!  Machine::run   locks the process in ─► starts one thread a processor ─► event loop ─► tells waiting clients why it ended
//! ```
//!
//! Invariant: nothing is opened by path after `new`; there is nothing to open then.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use commonage_isolation::void::Void;
use commonage_net_demux_api::ring::{Ring, RingFds};
use commonage_vmm_api::{ExitReason, MachineConfig, NetConfig, Response, RunState, Start};
use kvm_ioctls::VcpuFd;
use rustix::fs::FlockOperation;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::{self, BootError, Image};
use crate::control::{Command, Control};
use crate::devices::bus::Bus;
use crate::devices::console::Console;
use crate::devices::serial::{Line, SerialPort};
use crate::event;
use crate::jail::{Jail, JailError};
use crate::layout;
use crate::mapping::ReadOnlyMapping;
use crate::reactor::{Reactor, Readiness};
use crate::seccomp::{Filter, FilterError};
use crate::vcpu;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::console::VirtioConsole;
use crate::virtio::mmio::{self, Transport};
use crate::virtio::net::Net;
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockError};
use crate::virtio::{Memory, VirtioDevice};
use crate::vm::{Vm, VmError};

/// Event sources: virtio devices are `0..`, these come after all of them.
const CONTROL: u32 = 0x1000;
const CONSOLE: u32 = 0x1001;
const EXIT: u32 = 0x1002;

/// What the kernel needs to hear whatever the guest is. `reboot=k`: a reboot pulses the keyboard controller's reset line, so that it can be told
/// from a crash.
const COMMAND_LINE: &str = "console=ttyS0 8250.nr_uarts=1 reboot=k panic=-1 quiet";

/// Why a machine could not be put together or kept running.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(String),
    /// A file or socket could not be opened.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// What was to be done with it.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The host lacks something.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The operating system could not be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// KVM refused.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The vsock device could not be made.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// Privileges could not be given up.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// System calls could not be restricted.
    #[error(transparent)]
    Filter(#[from] FilterError),
}

fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MachineError {
    let path = path.to_owned();
    move |source| MachineError::File { what, path, source }
}

fn host_error(what: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Host { what, source }
}

/// A machine that is ready to run.
pub struct Machine {
    // Dropped first: the processors' and devices' use of guest memory ends before KVM's machine does.
    vcpus: Vec<VcpuFd>,
    bus: Arc<Bus>,
    reactor: Reactor,
    control: Option<Control>,
    exit: Arc<Exit>,
    jail: Jail,
    started: Instant,
    _vm: Vm,
}

/// How a processor's thread tells the event loop that the machine ends. The first reason counts.
struct Exit {
    reason: Mutex<Option<ExitReason>>,
    event: EventFd,
}

impl Exit {
    fn set(&self, reason: ExitReason) {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        let _ = self.event.write(1); // fails only if the counter is full: told already
    }

    fn get(&self) -> Option<ExitReason> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Refuses what no machine can be.
fn check(config: &MachineConfig) -> Result<(), MachineError> {
    let memory = layout::MIN_MEMORY_MIB..=layout::MAX_MEMORY_MIB;
    if !memory.contains(&config.memory_mib) {
        return Err(MachineError::Config(format!(
            "{} MiB of memory asked for; give {} to {}",
            config.memory_mib,
            memory.start(),
            memory.end()
        )));
    }
    if config.vcpus == 0 || config.vcpus > layout::MAX_VCPUS {
        return Err(MachineError::Config(format!(
            "{} virtual processors asked for; give 1 to {}",
            config.vcpus,
            layout::MAX_VCPUS
        )));
    }
    Ok(())
}

impl Machine {
    /// Opens and builds everything; the guest does not run yet.
    pub fn new(config: &MachineConfig) -> Result<Self, MachineError> {
        check(config)?;
        let Start::Boot { kernel, initrd, cmdline } = &config.start else {
            return Err(MachineError::Config("this sliver-vmm cannot restore".into()));
        };
        let mut kernel = Image::open(kernel).map_err(file_error("open the kernel", kernel))?;
        let mut initrd = match initrd {
            Some(path) => Some(Image::open(path).map_err(file_error("open the initrd", path))?),
            None => None,
        };
        let mut vm = Vm::new(guest_memory(config.memory_mib)?)?;
        let reactor = Reactor::new().map_err(host_error("create the event loop"))?;

        let console = match &config.console {
            Some(path) => Console::file(path).map_err(file_error("open the console file", path))?,
            None => Console::stdout().map_err(host_error("create a timer"))?,
        };
        reactor
            .poller(CONSOLE)
            .add(console.timer(), 0, Readiness::READ)
            .map_err(host_error("watch the console's timer"))?;
        let (devices, ring) = devices(config, &mut vm, &console)?;
        let transports = connect(&vm, &reactor, devices)?;
        let line = new_event()?;
        vm.connect_interrupt(&line, layout::COM1_IRQ)?;
        let bus = Bus::new(SerialPort::new(Line::new(line), console), transports.pages);

        let command_line = [COMMAND_LINE, &transports.parameters, cmdline].map(str::trim).join(" ");
        let entry = boot::load(
            vm.memory(),
            config.memory_mib,
            config.vcpus,
            &mut kernel,
            initrd.as_mut(),
            command_line.trim(),
        )?;
        let vcpus = vm.create_vcpus(config.vcpus, entry)?;

        let control = match &config.control {
            Some(path) => Some(
                Control::new(path, ring, Arc::clone(&bus), reactor.poller(CONTROL))
                    .map_err(file_error("listen on the control socket", path))?,
            ),
            None => None,
        };
        let exit = Arc::new(Exit { reason: Mutex::new(None), event: new_event()? });
        reactor
            .poller(EXIT)
            .add(event::borrow(&exit.event), 0, Readiness::READ)
            .map_err(host_error("watch the exit event"))?;
        Ok(Self {
            vcpus,
            bus,
            reactor,
            control,
            exit,
            jail: Jail::new(config).map_err(host_error("look at the disk"))?,
            started: Instant::now(),
            _vm: vm,
        })
    }

    /// Locks the process in, in the `void` if there is one, and runs the guest until the machine ends. The caller must then exit the process:
    /// processors that were not the reason for the end are still running.
    pub fn run(mut self, void: Option<Void>) -> Result<ExitReason, MachineError> {
        self.jail.enter(void.as_ref())?;
        drop(void);
        let (event_loop, vcpu_filter) = (Filter::event_loop()?, Filter::vcpu()?);
        for (id, vcpu) in std::mem::take(&mut self.vcpus).into_iter().enumerate() {
            let (bus, exit, filter) = (Arc::clone(&self.bus), Arc::clone(&self.exit), vcpu_filter.clone());
            let run = move || match filter.install() {
                Ok(()) => vcpu::run(vcpu, id as u8, &bus),
                Err(error) => ExitReason::Failed { message: error.to_string() },
            };
            std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || exit.set(run()))
                .map_err(host_error("start a processor's thread"))?;
        }
        // The last thread was started. What the guest does is served from here on only.
        event_loop.install()?;
        let reason = self.event_loop();
        self.bus.console().commit();
        if let Some(control) = &mut self.control {
            control.finish(&reason);
        }
        // The processes' other threads still use guest memory: it must not be unmapped now.
        std::mem::forget(self);
        Ok(reason)
    }

    fn event_loop(&mut self) -> ExitReason {
        loop {
            let events = match self.reactor.wait() {
                Ok(events) => events,
                Err(error) => return ExitReason::Failed { message: format!("event loop: {error}") },
            };
            let mut end = None;
            for event in events {
                match event.source {
                    EXIT => {
                        if let Some(reason) = self.exit.get() {
                            return reason;
                        }
                    }
                    CONSOLE => self.bus.console().commit(),
                    CONTROL => {
                        if let Some(control) = &mut self.control {
                            control.event(event.token);
                            end = execute(control, self.started);
                        }
                    }
                    device => {
                        if let Some(mut transport) = self.bus.virtio(device as usize) {
                            transport.event(event.token, event.readiness);
                        }
                    }
                }
                if let Some(reason) = end {
                    return reason;
                }
            }
        }
    }
}

/// Carries out what clients ask of the machine; tells if it ends.
fn execute(control: &mut Control, started: Instant) -> Option<ExitReason> {
    while let Some((client, command)) = control.next() {
        let response = match command {
            Command::Status => Response::Status {
                pid: std::process::id(),
                uptime_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
                state: RunState::Running,
            },
            Command::Stop { grace } => {
                if grace.is_zero() || !control.ask_guest(grace) {
                    return Some(ExitReason::Stopped);
                }
                continue;
            }
            _ => Response::Error { message: "this machine cannot do that yet".into() },
        };
        control.answer(client, &response);
    }
    None
}

fn new_event() -> Result<EventFd, MachineError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host_error("create an event"))
}

fn guest_memory(memory_mib: u32) -> Result<Memory, MachineError> {
    let ranges: Result<Vec<_>, _> = layout::ram_ranges(memory_mib)
        .into_iter()
        .map(|(start, size)| usize::try_from(size).map(|size| (start, size)))
        .collect();
    let ranges = ranges.map_err(|error| MachineError::Config(error.to_string()))?;
    Memory::from_ranges(&ranges)
        .map_err(|error| MachineError::Host { what: "map guest memory", source: io::Error::other(error) })
}

type Devices = Vec<Box<dyn VirtioDevice>>;

/// The devices that `config` asks for, in the order of their register pages, and net-demux's side of the network ring.
fn devices(
    config: &MachineConfig,
    vm: &mut Vm,
    console: &Console,
) -> Result<(Devices, Option<RingFds>), MachineError> {
    let mut devices: Devices = vec![Box::new(Rng::default())];
    if let Some(path) = &config.base {
        let file = File::open(path).map_err(file_error("open the base image", path))?;
        let mapping = ReadOnlyMapping::new(&file).map_err(file_error("map the base image", path))?;
        let start = layout::pmem_start(config.memory_mib);
        devices.push(Box::new(Pmem::new(start, mapping.len() as u64)));
        vm.add_read_only(start, mapping)?;
    }
    if let Some(disk) = &config.disk {
        let path = &disk.path;
        let file = open_disk(path).map_err(file_error("open the disk", path))?;
        devices.push(Box::new(Blk::new(file, disk.rate).map_err(file_error("use the disk", path))?));
    }
    let mut ring = None;
    if let Some(NetConfig { mac }) = config.net {
        let (endpoint, fds) = Ring::create().map_err(host_error("create the network ring"))?;
        devices.push(Box::new(Net::new(mac, endpoint)));
        ring = Some(fds);
    }
    if let Some(vsock) = &config.vsock {
        devices.push(Box::new(Vsock::new(vsock)?));
    }
    if config.balloon {
        devices.push(Box::new(Balloon::new(config.memory_mib)));
    }
    devices.push(Box::new(VirtioConsole::new(console.clone())));
    Ok((devices, ring))
}

/// Opens a disk for one machine alone: two writers would destroy its file system.
fn open_disk(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|errno| match errno {
        rustix::io::Errno::WOULDBLOCK => {
            io::Error::new(io::ErrorKind::ResourceBusy, "another machine uses it; stop that one first")
        }
        errno => errno.into(),
    })?;
    Ok(file)
}

struct Transports {
    pages: Vec<Transport>,
    /// What the kernel needs to hear of them.
    parameters: String,
}

/// Puts each device behind a register page and connects its notifications and its interrupt.
fn connect(vm: &Vm, reactor: &Reactor, devices: Devices) -> Result<Transports, MachineError> {
    let mut pages = Vec::new();
    let mut parameters = Vec::new();
    for (index, device) in devices.into_iter().enumerate() {
        let (address, line) = (layout::virtio_mmio(index), layout::virtio_irq(index));
        let transport = Transport::new(device, vm.memory().clone(), reactor.poller(index as u32))
            .map_err(host_error("create a virtio device"))?;
        vm.connect_interrupt(transport.interrupt().line(), line)?;
        for (queue, kick) in transport.kicks().iter().enumerate() {
            vm.connect_write(kick, address + mmio::QUEUE_NOTIFY, queue as u32)?;
        }
        parameters.push(format!("virtio_mmio.device=4K@{address:#x}:{line}"));
        pages.push(transport);
    }
    Ok(Transports { pages, parameters: parameters.join(" ") })
}
