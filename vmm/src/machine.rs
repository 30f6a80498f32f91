//! The only place that puts a machine together, and the event loop that keeps it running.
//!
//! ```text
//!  Machine::new   opens every file and socket ([`Opened`]) ─► locks the process in
//!                 ─► maps memory, creates KVM's machine, devices and processors, loads the kernel (or reads a snapshot into them)
//!  Machine::run   starts one thread a processor ─► event loop ─► tells waiting clients why it ended
//! ```
//!
//! Invariant: what files contain, also a snapshot that a tenant may have written, is looked at from inside the jail only.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use commonage_isolation::void::Void;
use commonage_net_demux_api::ring::{Ring, RingFds};
use commonage_vmm_api::{ExitReason, MachineConfig, NetConfig};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::BootError;
use crate::control::Control;
use crate::devices::bus::Bus;
use crate::devices::console::Console;
use crate::devices::serial::{Line, SerialPort};
use crate::event;
use crate::halt::HaltWatch;
use crate::jail::{JailError, allocator};
use crate::layout;
use crate::mapping::ReadOnlyMapping;
use crate::metrics::PrivateMemory;
use crate::opened::Opened;
use crate::processors::{Exit, Processors};
use crate::reactor::{Reactor, Readiness};
use crate::seccomp::{Filter, FilterError};
use crate::snapshot::pages::Pagemap;
use crate::snapshot::{Id, Shape, SnapshotError};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::console::VirtioConsole;
use crate::virtio::mmio::{self, Transport, TransportState};
use crate::virtio::net::Net;
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockError};
use crate::vm::{Vm, VmError};

/// Event sources: virtio devices are `0..`, these come after all of them.
pub(crate) const CONTROL: u32 = 0x1000;
pub(crate) const CONSOLE: u32 = 0x1001;
pub(crate) const EXIT: u32 = 0x1002;
pub(crate) const HALT: u32 = 0x1003;
/// All those above, in a reactor of their own.
pub(crate) const HOST: u32 = 0x1004;

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
    /// The snapshot is not one of this machine.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Privileges could not be given up.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// System calls could not be restricted.
    #[error(transparent)]
    Filter(#[from] FilterError),
}

pub(crate) fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MachineError {
    let path = path.to_owned();
    move |source| MachineError::File { what, path, source }
}

pub(crate) fn host_error(what: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Host { what, source }
}

/// A machine that is ready to run.
pub struct Machine {
    // Dropped first: the processors' and devices' use of guest memory ends before KVM's machine does.
    pub(crate) processors: Processors,
    pub(crate) bus: Arc<Bus>,
    /// What the guest drives: queues and what devices wait for; and `host`.
    pub(crate) reactor: Reactor,
    /// What is served also while the machine is paused: clients, the log, the machine's end.
    pub(crate) host: Reactor,
    pub(crate) control: Option<Control>,
    pub(crate) exit: Arc<Exit>,
    pub(crate) shape: Shape,
    /// The snapshot that it started from.
    pub(crate) snapshot_of: Option<Id>,
    pub(crate) halt: HaltWatch,
    pub(crate) private: PrivateMemory,
    pub(crate) pagemap: Option<Pagemap>,
    pub(crate) started: Instant,
    pub(crate) vm: Vm,
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
    /// Opens everything, locks the process in (in the `void` if there is one) and builds the machine; the guest does not run yet. The
    /// process must have one thread, and must end if this fails.
    pub fn new(config: &MachineConfig, void: Option<Void>) -> Result<Self, MachineError> {
        check(config)?;
        let opened = Opened::open(config)?;
        opened.jail(config).enter(void.as_ref())?;
        drop(void);

        let Opened { kvm, origin, base, disk, console, vsock, control, pagemap, private, .. } = opened;
        let shape = Shape::of(config, base.as_ref()).map_err(host_error("look at the base image"))?;
        let origin = origin.read(&shape)?;
        let mut vm = Vm::new(kvm, origin.memory(config.memory_mib)?)?;
        let reactor = Reactor::new().map_err(host_error("create the event loop"))?;
        let host = Reactor::new().map_err(host_error("create the event loop"))?;
        reactor
            .poller(HOST)
            .add(&host, 0, Readiness::READ)
            .map_err(host_error("watch what is not the guest's"))?;
        host.poller(CONSOLE)
            .add(console.timer(), 0, Readiness::READ)
            .map_err(host_error("watch the console's timer"))?;
        let halting = new_event()?;
        console.on_halt(halting.try_clone().map_err(host_error("watch for a halt"))?);
        let halt = HaltWatch::new(halting, &host.poller(HALT)).map_err(host_error("watch for a halt"))?;
        let (devices, ring) = devices(config, Parts { base, disk, vsock }, &mut vm, &console)?;
        let transports = connect(&vm, &reactor, devices)?;
        let line = new_event()?;
        vm.connect_interrupt(&line, layout::COM1_IRQ)?;
        let bus = Bus::new(SerialPort::new(Line::new(line), console), transports.pages);

        let snapshot_of = origin.snapshot();
        let (vcpus, saved) = origin.begin(config, &vm, &transports.parameters, &bus)?;
        for (index, state) in saved.iter().enumerate() {
            restore_device(&bus, index, state)?;
        }

        let control = match control {
            Some(listener) => Some(
                Control::new(listener, ring, Arc::clone(&bus), host.poller(CONTROL))
                    .map_err(host_error("watch the control socket"))?,
            ),
            None => None,
        };
        let exit = Arc::new(Exit::new(new_event()?));
        host.poller(EXIT)
            .add(event::borrow(exit.event()), 0, Readiness::READ)
            .map_err(host_error("watch the exit event"))?;
        Ok(Self {
            processors: Processors::new(vcpus),
            bus,
            reactor,
            host,
            control,
            exit,
            shape,
            snapshot_of,
            halt,
            pagemap,
            private,
            started: Instant::now(),
            vm,
        })
    }

    /// Runs the guest until the machine ends. The caller must then exit the process: processors that were not the reason for the end are
    /// still running.
    pub fn run(mut self) -> Result<ExitReason, MachineError> {
        let (event_loop, vcpu) = (Filter::event_loop()?, Filter::vcpu()?);
        self.processors
            .start(&self.bus, self.vm.memory(), &self.exit, &vcpu)
            .map_err(host_error("start a processor's thread"))?;
        // The last thread was started. What the guest does is served from here on only.
        event_loop.install()?;
        drop((event_loop, vcpu));
        allocator::trim();
        let reason = self.event_loop();
        self.bus.console().commit();
        if let Some(control) = &mut self.control {
            control.finish(&reason);
        }
        // The processes' other threads still use guest memory: it must not be unmapped now.
        std::mem::forget(self);
        Ok(reason)
    }
}

fn restore_device(bus: &Bus, index: usize, state: &TransportState) -> Result<(), MachineError> {
    let refuse = |message| SnapshotError::Device { index, message };
    let mut transport =
        bus.virtio(index).ok_or_else(|| refuse("this machine has no such device".to_owned()))?;
    Ok(transport.restore(state).map_err(|error| refuse(error.to_string()))?)
}

pub(crate) fn new_event() -> Result<EventFd, MachineError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host_error("create an event"))
}

type Devices = Vec<Box<dyn VirtioDevice>>;

/// What devices are made of.
struct Parts {
    base: Option<File>,
    disk: Option<Blk>,
    vsock: Option<Vsock>,
}

/// The devices that `config` asks for, in the order of their register pages, and net-demux's side of the network ring.
fn devices(
    config: &MachineConfig,
    parts: Parts,
    vm: &mut Vm,
    console: &Console,
) -> Result<(Devices, Option<RingFds>), MachineError> {
    let mut devices: Devices = vec![Box::new(Rng::default())];
    if let (Some(path), Some(file)) = (&config.base, parts.base) {
        let mapping = ReadOnlyMapping::new(&file).map_err(file_error("map the base image", path))?;
        let start = layout::pmem_start(config.memory_mib);
        devices.push(Box::new(Pmem::new(start, mapping.len() as u64)));
        vm.add_read_only(start, mapping)?;
    }
    if let Some(disk) = parts.disk {
        devices.push(Box::new(disk));
    }
    let mut ring = None;
    if let Some(NetConfig { mac }) = config.net {
        let (endpoint, fds) = Ring::create().map_err(host_error("create the network ring"))?;
        devices.push(Box::new(Net::new(mac, endpoint)));
        ring = Some(fds);
    }
    if let Some(vsock) = parts.vsock {
        devices.push(Box::new(vsock));
    }
    if config.balloon {
        devices.push(Box::new(Balloon::new(config.memory_mib)));
    }
    devices.push(Box::new(VirtioConsole::new(console.clone())));
    Ok((devices, ring))
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
