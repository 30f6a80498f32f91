//! A node: a QEMU machine that boots its CD.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::console::{Console, Mark};
use crate::process::Process;
use crate::qmp::Qmp;

/// Which firmware the machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// OVMF.
    Uefi,
}

/// What a machine is made of.
#[derive(Debug)]
pub struct Machine<'a> {
    /// Its host name.
    pub name: &'a str,
    /// Its CD.
    pub iso: &'a Path,
    /// The network socket it plugs into.
    pub net: &'a Path,
    /// Distinguishes its MAC address: below 256.
    pub number: u8,
    /// Its firmware.
    pub firmware: Firmware,
    /// Its memory, MiB.
    pub memory_mib: u32,
}

/// A running machine.
#[derive(Debug)]
pub struct Node {
    /// Its host name.
    pub name: String,
    /// Its serial console.
    pub console: Console,
    process: Process,
    qmp: PathBuf,
    faults: PathBuf,
}

/// What a release's kernel command line says so that node-init takes orders to break things on the second serial port.
pub const FAULTS: &str = "commonage.faults=/dev/ttyS1";
/// How long a phase of a boot may take before the test gives up. Emulated machines on a busy host are slow.
const PATIENCE: Duration = Duration::from_secs(240);
/// What boot-cd, node-init or a kernel says when a boot went wrong.
const FATAL: &[&str] = &["boot-cd: failed", "node-init: failed", "Kernel panic", "panicked at"];

impl Node {
    /// Switches the machine on, with an empty 8 GiB disk unless `dir` has one from before.
    ///
    /// # Errors
    /// QEMU is missing or refuses.
    pub fn start(dir: &Path, machine: &Machine<'_>) -> Result<Self> {
        let disk = dir.join(format!("{}.disk", machine.name));
        if !disk.exists() {
            // Sparse: it holds what was written and no more.
            std::fs::File::create(&disk)?
                .set_len(8 << 30)
                .with_context(|| format!("cannot make {}", disk.display()))?;
        }
        let qmp = dir.join(format!("{}.qmp", machine.name));
        let mut args: Vec<String> = Vec::new();
        let mut pair = |a: &str, b: &str| args.extend([a.to_owned(), b.to_owned()]);
        pair("-M", "q35");
        for word in accelerator() {
            pair(word.0, word.1);
        }
        pair("-m", &machine.memory_mib.to_string());
        pair("-display", "none");
        pair("-serial", "stdio");
        let faults = dir.join(format!("{}.faults", machine.name));
        pair("-serial", &format!("unix:{},server=on,wait=off", faults.display()));
        pair("-qmp", &format!("unix:{},server=on,wait=off", qmp.display()));
        pair(
            "-netdev",
            &format!("stream,id=net,server=off,addr.type=unix,addr.path={}", machine.net.display()),
        );
        pair(
            "-device",
            &format!("virtio-net-pci,netdev=net,romfile=,mac=52:54:00:c0:00:{:02x}", machine.number),
        );
        // What the guest flushes need not reach this machine's disk: nobody needs it after a power cut here.
        let drive = format!("file={},if=virtio,format=raw,discard=unmap,cache=unsafe", disk.display());
        pair("-drive", &drive);
        pair("-drive", &format!("file={},media=cdrom,format=raw,readonly=on", machine.iso.display()));
        pair("-device", "virtio-rng-pci");
        if machine.firmware == Firmware::Uefi {
            let vars = dir.join(format!("{}.vars", machine.name));
            if !vars.exists() {
                std::fs::copy("/usr/share/OVMF/OVMF_VARS.fd", &vars)
                    .context("OVMF's variables cannot be copied")?;
            }
            pair("-drive", "if=pflash,format=raw,unit=0,readonly=on,file=/usr/share/OVMF/OVMF_CODE.fd");
            pair("-drive", &format!("if=pflash,format=raw,unit=1,file={}", vars.display()));
        }
        args.extend([
            "-nodefaults".to_owned(),
            "-no-user-config".to_owned(),
            "-boot".to_owned(),
            "d".to_owned(),
        ]);
        let log = dir.join(format!("{}.qemu.log", machine.name));
        let mut process = Process::start(Path::new("qemu-system-x86_64"), &args, &log, true)?;
        let output = process.stdout().context("QEMU's output is gone")?;
        let console = Console::follow(output, &dir.join(format!("{}.console", machine.name)))?;
        Ok(Self { name: machine.name.to_owned(), console, process, qmp, faults })
    }

    /// Waits for a line on the console after `from`.
    ///
    /// # Errors
    /// The machine ended, or said that it failed, or time is up; with the last console lines.
    pub fn wait(&self, from: Mark, wanted: &str) -> Result<String> {
        self.console.wait(from, &[wanted], FATAL, PATIENCE).with_context(|| format!("node {}", self.name))
    }

    /// The same, but a failure that is expected is not fatal.
    ///
    /// # Errors
    /// The machine ended, or time is up.
    pub fn wait_any(&self, from: Mark, wanted: &[&str]) -> Result<String> {
        self.console.wait(from, wanted, &[], PATIENCE).with_context(|| format!("node {}", self.name))
    }

    /// Presses the reset button.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn reset(&self) -> Result<()> {
        Qmp::connect(&self.qmp)?.execute("system_reset", serde_json::json!({})).map(drop)
    }

    /// Kills a service of the node (`nodemgr` or `net-demux`) with SIGKILL, through the node's second serial port, and waits until it is running again.
    /// The release must have been signed with [`FAULTS`] on its command line.
    ///
    /// # Errors
    /// The node does not say that it did.
    pub fn kill(&self, service: &str) -> Result<()> {
        let mark = self.console.mark();
        self.order(&format!("kill {service}"), &format!("node-init: killed {service}"))?;
        self.wait(mark, &format!("node-init: started {service}")).map(drop)
    }

    /// Has the node end everything in order and start again, as by ctrl-alt-del; by the same port.
    ///
    /// # Errors
    /// The node does not say that it does.
    pub fn restart(&self) -> Result<()> {
        self.order("restart", "node-init: restarting, as ordered")
    }

    /// Gives an order and waits for the answer on the console. The port stays open until then: what QEMU has not read when it closes is lost.
    fn order(&self, order: &str, answer: &str) -> Result<()> {
        let mark = self.console.mark();
        let mut port = UnixStream::connect(&self.faults).context("the node's second serial port")?;
        port.write_all(format!("{order}\n").as_bytes()).context("the node's second serial port")?;
        self.wait(mark, answer).map(drop)
    }

    /// Fails when the machine no longer runs.
    ///
    /// # Errors
    /// It ended; with QEMU's last words.
    pub fn check(&mut self) -> Result<()> {
        if let Err(error) = self.process.check() {
            bail!("node {}: {error:#}\n{}", self.name, self.console.tail(30));
        }
        Ok(())
    }
}

/// Hardware virtualisation where it is real and nests, else emulation with AMD-V inside. Emulated nodes have one processor: with more, nested guests are unreliable.
pub(crate) fn accelerator() -> [(&'static str, &'static str); 3] {
    let nested = ["kvm_amd", "kvm_intel"].iter().any(|module| {
        std::fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|s| matches!(s.trim(), "1" | "Y"))
    });
    let usable = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if nested && usable {
        [("-accel", "kvm"), ("-cpu", "host"), ("-smp", "2")]
    } else {
        [("-accel", "tcg"), ("-cpu", "max,-erms,-fsrm,-xsave,-avx,-avx2,-fma,-f16c"), ("-smp", "1")]
    }
}
