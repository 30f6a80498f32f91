//! `sliver-vmm`: one process, one sliver's virtual machine. Reads a configuration (a file, or flags for a person who tries one machine by
//! hand), runs the machine, and exits with what became of it: 0 reboot, halt or stopped, 1 host failure, 3 triple fault, 4
//! panic, 2 wrong usage.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use commonage_vmm::jail::inherited;
use commonage_vmm::machine::{Machine, MachineError};
use commonage_vmm_api::{DiskConfig, ExitReason, JailConfig, MachineConfig, NetConfig, Start, VsockConfig};

/// Runs one virtual machine until it ends.
///
/// Exit status: 0 if the guest rebooted or halted or a client of the control socket stopped it, 1 if the host failed, 3 if the guest crashed
/// its processor (triple fault), 4 if its kernel panicked.
#[derive(Parser)]
#[command(
    version,
    after_help = "Example: sliver-vmm --kernel vmlinux --initrd sliver-initrd --memory 64 \
    --base base-mini.erofs --disk disk.img"
)]
struct Arguments {
    /// Machine description in JSON; takes the place of all other flags
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    config: Option<PathBuf>,
    /// Inherited descriptors of an empty mount and an empty network namespace to make the jail in; it makes its own without
    #[arg(long, value_name = "MOUNT,NETWORK")]
    void: Option<inherited::Numbers>,
    /// Uncompressed ELF kernel (vmlinux) with a PVH entry
    #[arg(long, value_name = "FILE", required_unless_present = "config")]
    kernel: Option<PathBuf>,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Appended to the kernel's command line
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    cmdline: String,
    /// Guest memory
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    memory: u32,
    /// Virtual processors
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    vcpus: u8,
    /// Read-only image, /dev/pmem0 in the guest
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,
    /// Raw image, read-write, /dev/vda in the guest
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// Gives the guest a network interface with this address (02:00:00:01:86:a1)
    #[arg(long, value_name = "ADDRESS", value_parser = parse_mac)]
    mac: Option<[u8; 6]>,
    /// Gives the guest a vsock that ends in this Unix socket
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
    /// The guest's vsock context id
    #[arg(long, value_name = "CID", default_value_t = 3, requires = "vsock")]
    cid: u32,
    /// Gives the guest a balloon
    #[arg(long)]
    balloon: bool,
    /// Where the guest's serial port is written [default: standard output]
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// Control socket to create
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// User and group id to become before the guest runs
    #[arg(long, value_name = "UID")]
    uid: Option<u32>,
}

impl Arguments {
    fn machine(self) -> Result<MachineConfig, MachineError> {
        if let Some(path) = self.config {
            let refuse = |what: &dyn std::fmt::Display| {
                MachineError::Config(format!("machine description {}: {what}", path.display()))
            };
            let text = std::fs::read(&path).map_err(|error| refuse(&error))?;
            return serde_json::from_slice(&text).map_err(|error| refuse(&error));
        }
        let Some(kernel) = self.kernel else {
            return Err(MachineError::Config("give --kernel or --config".into()));
        };
        Ok(MachineConfig {
            start: Start::Boot { kernel, initrd: self.initrd, cmdline: self.cmdline },
            memory_mib: self.memory,
            vcpus: self.vcpus,
            base: self.base,
            disk: self.disk.map(|path| DiskConfig { path, rate: None }),
            net: self.mac.map(|mac| NetConfig { mac }),
            vsock: self.vsock.map(|path| VsockConfig { cid: self.cid, path }),
            balloon: self.balloon,
            console: self.console,
            control: self.control,
            jail: self.uid.map(|uid| JailConfig { uid }),
        })
    }
}

/// Six hexadecimal bytes with colons between them.
fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect();
    let bytes = bytes.map_err(|error| error.to_string())?;
    let mac = <[u8; 6]>::try_from(bytes).map_err(|_| "an address has six bytes".to_owned())?;
    if mac[0] & 1 == 1 { Err("a group address cannot be an interface's own".to_owned()) } else { Ok(mac) }
}

fn run() -> Result<ExitReason, MachineError> {
    let arguments = Arguments::parse();
    let void = inherited::take(arguments.void)
        .map_err(|source| MachineError::Host { what: "take over inherited descriptors", source })?;
    Machine::new(&arguments.machine()?)?.run(void)
}

fn main() -> ExitCode {
    let reason = run().unwrap_or_else(|error| ExitReason::Failed { message: error.to_string() });
    match &reason {
        ExitReason::Failed { message } => eprintln!("sliver-vmm: {message}"),
        ExitReason::TripleFault => eprintln!("sliver-vmm: the guest crashed its processor (triple fault)"),
        ExitReason::Panic => eprintln!("sliver-vmm: the guest's kernel panicked"),
        ExitReason::Reboot | ExitReason::Halt | ExitReason::Stopped => {}
    }
    // Ends the process at once, with the threads of processors that still run.
    std::process::exit(reason.code())
}
