//! `sliver-vmm run`: a configuration (a file, or flags for a person who tries one machine by hand) becomes a machine, which runs until it
//! ends; the process exits with what became of it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use commonage_vmm::jail::allocator;
use commonage_vmm::jail::birth::{self, Place, VoidFiles};
use commonage_vmm::machine::{Machine, MachineError};
use commonage_vmm_api::{
    DiskConfig, ExitReason, JailConfig, MachineConfig, NetConfig, RateLimit, Start, VsockConfig,
};

use super::show;

/// Runs a virtual machine until it ends.
///
/// Exit status: 0 if the guest rebooted or halted or a client of the control socket stopped it, 1 if the host failed, 2 if used wrongly, 3 if
/// the guest crashed its processor (triple fault), 4 if its kernel panicked.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sliver-vmm run --kernel vmlinux --initrd sliver-initrd --memory 64 --base base-mini.erofs --disk disk.img\n  \
    sliver-vmm run --restore /tmp/snapshot --memory 64 --base base-mini.erofs --disk other.img\n  \
    sliver-vmm run --config machine.json")]
pub struct Arguments {
    /// Machine description in JSON; takes the place of all flags below
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "restore"])]
    config: Option<PathBuf>,
    /// Uncompressed ELF kernel (vmlinux) with a PVH entry
    #[arg(long, value_name = "FILE", required_unless_present_any = ["config", "restore"])]
    kernel: Option<PathBuf>,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Appended to the kernel's command line
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    cmdline: String,
    /// Goes on where a snapshot (`ctl SOCKET snapshot DIR`) left off. Memory size, processors, base and kinds of devices must be those of the
    /// machine it was taken of
    #[arg(long, value_name = "DIR", conflicts_with = "kernel")]
    restore: Option<PathBuf>,
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
    /// How many bytes of the disk may be read and written a second
    #[arg(long, value_name = "BYTES", default_value_t = 0, requires = "disk", hide_default_value = true)]
    disk_bytes_per_second: u64,
    /// How many requests the disk may get a second
    #[arg(long, value_name = "COUNT", default_value_t = 0, requires = "disk", hide_default_value = true)]
    disk_requests_per_second: u64,
    /// Gives the guest a network interface with this address (02:00:00:01:86:a1)
    #[arg(long, value_name = "ADDRESS", value_parser = parse_mac)]
    mac: Option<[u8; 6]>,
    /// Gives the guest a vsock; host programs reach the guest's ports through this Unix socket
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
    /// The guest's vsock context id
    #[arg(long, value_name = "CID", default_value_t = 3, requires = "vsock")]
    cid: u32,
    /// Gives the guest a balloon
    #[arg(long)]
    balloon: bool,
    /// Where the guest's console is logged [default: standard output]
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// Control socket to create, for `sliver-vmm ctl`
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// User and group id to become, in a jail, before the guest runs
    #[arg(long, value_name = "UID")]
    uid: Option<u32>,
    /// Files of an empty mount and an empty network namespace to make the jail in; it makes its own without
    #[arg(long, value_name = "MOUNT,NETWORK")]
    void: Option<VoidFiles>,
    /// The file cgroup.procs of a control group to join
    #[arg(long, value_name = "FILE", requires = "void")]
    group: Option<PathBuf>,
}

/// Runs the machine, and ends the process.
pub fn run(arguments: Arguments) -> ExitCode {
    let place = arguments.void.clone().map(|void| Place { void, group: arguments.group.clone() });
    end(machine(place.as_ref(), || arguments.config()))
}

/// What a node manager types, in these words and this order: `run --config FILE [--void MOUNT,NETWORK [--group FILE]]`.
pub struct Plain {
    config: PathBuf,
    place: Option<Place>,
}

impl Plain {
    /// Recognises `words` without the command line's parser: to build that takes as long as to start a clone. `None` if it is anything else,
    /// also if it is wrong: then the parser tells how.
    pub fn recognise(mut words: impl Iterator<Item = OsString>) -> Option<Self> {
        let mut next_is = |word: &str| words.next().is_some_and(|next| next == word).then_some(());
        next_is("run")?;
        next_is("--config")?;
        let config = words.next()?.into();
        let mut value_of = |flag: &str| match words.next() {
            None => Some(None),
            Some(word) if word == flag => Some(Some(words.next()?)),
            Some(_) => None,
        };
        let place = match value_of("--void")? {
            None => None,
            Some(void) => {
                let void = void.to_str()?.parse().ok()?;
                Some(Place { void, group: value_of("--group")?.map(PathBuf::from) })
            }
        };
        words.next().is_none().then_some(Self { config, place })
    }

    /// Runs the machine, and ends the process.
    pub fn run(self) -> ExitCode {
        end(machine(self.place.as_ref(), || read_config(&self.config)))
    }
}

fn end(result: Result<ExitReason, MachineError>) -> ExitCode {
    let reason = result.unwrap_or_else(|error| ExitReason::Failed { message: error.to_string() });
    match &reason {
        ExitReason::Reboot | ExitReason::Halt | ExitReason::Stopped => {}
        bad => eprintln!("sliver-vmm: {}", show::reason(bad)),
    }
    // Ends the process at once, with the threads of processors that still run.
    std::process::exit(reason.code())
}

fn machine(
    place: Option<&Place>,
    config: impl FnOnce() -> Result<MachineConfig, MachineError>,
) -> Result<ExitReason, MachineError> {
    allocator::one_arena();
    let void = birth::settle(place)
        .map_err(|source| MachineError::Host { what: "take the place it was given", source })?;
    Machine::new(&config()?, void)?.run()
}

impl Arguments {
    fn config(self) -> Result<MachineConfig, MachineError> {
        if let Some(path) = &self.config {
            return read_config(path);
        }
        let start = match (self.kernel, self.restore) {
            (Some(kernel), _) => Start::Boot { kernel, initrd: self.initrd, cmdline: self.cmdline },
            (None, Some(directory)) => restore(&directory),
            (None, None) => {
                return Err(MachineError::Config("give --kernel, --restore or --config".into()));
            }
        };
        let rate = RateLimit {
            bytes_per_second: self.disk_bytes_per_second,
            requests_per_second: self.disk_requests_per_second,
        };
        let limited = rate.bytes_per_second > 0 || rate.requests_per_second > 0;
        Ok(MachineConfig {
            start,
            memory_mib: self.memory,
            vcpus: self.vcpus,
            base: self.base,
            disk: self.disk.map(|path| DiskConfig { path, rate: limited.then_some(rate) }),
            net: self.mac.map(|mac| NetConfig { mac }),
            vsock: self.vsock.map(|path| VsockConfig { cid: self.cid, path }),
            balloon: self.balloon,
            console: self.console,
            control: self.control,
            jail: self.uid.map(|uid| JailConfig { uid }),
        })
    }
}

fn read_config(path: &Path) -> Result<MachineConfig, MachineError> {
    let refuse = |what: &dyn std::fmt::Display| {
        MachineError::Config(format!("machine description {}: {what}", path.display()))
    };
    let text = std::fs::read(path).map_err(|error| refuse(&error))?;
    serde_json::from_slice(&text).map_err(|error| refuse(&error))
}

/// A snapshot in `directory`, as `ctl SOCKET snapshot` lays it out; with the hint of `ctl SOCKET touched`, if it is there.
fn restore(directory: &Path) -> Start {
    let prefault = directory.join(super::ctl::TOUCHED);
    Start::Restore {
        state: directory.join(super::ctl::STATE),
        memory: directory.join(super::ctl::MEMORY),
        prefault: prefault.exists().then_some(prefault),
    }
}

/// Six hexadecimal bytes with colons between them.
fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect();
    let bytes = bytes.map_err(|error| error.to_string())?;
    let mac = <[u8; 6]>::try_from(bytes).map_err(|_| "an address has six bytes".to_owned())?;
    if mac[0] & 1 == 1 { Err("a group address cannot be an interface's own".to_owned()) } else { Ok(mac) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Run {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn config(line: &str) -> Result<MachineConfig, String> {
        let words = std::iter::once("run").chain(line.split_whitespace());
        let run = Run::try_parse_from(words).map_err(|error| error.to_string())?;
        run.arguments.config().map_err(|error| error.to_string())
    }

    #[test]
    fn flags_describe_a_machine() {
        let machine = config(
            "--kernel k --initrd i --cmdline -x --memory 128 --vcpus 2 --base b --disk d --disk-requests-per-second 5 \
             --mac 02:00:00:01:86:a1 --vsock v --balloon --console c --control s --uid 7",
        )
        .unwrap();
        assert_eq!(
            machine.start,
            Start::Boot { kernel: "k".into(), initrd: Some("i".into()), cmdline: "-x".into() }
        );
        assert_eq!((machine.memory_mib, machine.vcpus), (128, 2));
        let rate = machine.disk.unwrap().rate.unwrap();
        assert_eq!((rate.bytes_per_second, rate.requests_per_second), (0, 5));
        assert_eq!(machine.net.unwrap().mac, [2, 0, 0, 1, 0x86, 0xa1]);
        assert_eq!(machine.vsock.unwrap().cid, 3);
        assert_eq!(machine.jail.unwrap().uid, 7);
    }

    #[test]
    fn a_snapshot_is_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let line = format!("--restore {}", directory.path().display());
        let Start::Restore { state, memory, prefault } = config(&line).unwrap().start else { panic!() };
        assert_eq!((state, memory), (directory.path().join("state"), directory.path().join("memory")));
        assert_eq!(prefault, None);
        std::fs::write(directory.path().join("touched"), "").unwrap();
        let Start::Restore { prefault, .. } = config(&line).unwrap().start else { panic!() };
        assert_eq!(prefault, Some(directory.path().join("touched")));
    }

    #[test]
    fn a_node_managers_words_are_recognised_and_no_others() {
        let recognise = |line: &str| Plain::recognise(line.split_whitespace().map(OsString::from));
        let plain = recognise("run --config machine.json").unwrap();
        assert_eq!((plain.config, plain.place), ("machine.json".into(), None));
        let place = |group: Option<&str>| {
            Some(Place { void: "m,n".parse().unwrap(), group: group.map(PathBuf::from) })
        };
        assert_eq!(recognise("run --config m --void m,n").unwrap().place, place(None));
        assert_eq!(recognise("run --config m --void m,n --group g").unwrap().place, place(Some("g")));
        for line in [
            "",
            "run",
            "run --config",
            "run --config m --void",
            "run --config m --void m",
            "run --config m --void m,n --uid 5",
            "run --config m --void m,n --group",
            "run --config m --void m,n --group g --uid 5",
            "run --config m --group g",
            "run --config m --uid 5",
            "run --void m,n --config m",
            "ctl --config m",
        ] {
            assert!(recognise(line).is_none(), "{line:?}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        for line in [
            "",
            "--kernel k --restore d",
            "--config c --kernel k",
            "--initrd i",
            "--kernel k --mac 01:00:00:00:00:00",
        ] {
            assert!(config(line).is_err(), "{line:?}");
        }
    }
}
