//! Machines started by hand, without a node manager: sliver-vmm and QEMU's `microvm` with the same kernel, initrd, base and disk, both seen
//! through the guest's serial port.

use std::io::{BufRead as _, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use commonage_vmm_api::{DiskConfig, JailConfig, MachineConfig, NetConfig, Start, VsockConfig};

use crate::places::Places;

/// Memory of the guest, MiB.
pub const MEMORY_MIB: u32 = 64;
/// Whom sliver-vmm becomes: nobody else's number.
const UID: u32 = 99_998;
const MAC: &str = "02:00:00:01:86:9e";

/// Which machine program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// sliver-vmm, jailed as a node manager would have it.
    Ours,
    /// QEMU, with its way of doing input and output on the disk.
    Qemu(&'static str),
}

impl Kind {
    /// Its name.
    pub fn name(self) -> String {
        match self {
            Self::Ours => "sliver-vmm".to_owned(),
            Self::Qemu(aio) => format!("QEMU, aio={aio}"),
        }
    }
}

/// What a machine is made of, beside kernel and initrd.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    /// Its disk.
    pub disk: PathBuf,
    /// Its base, with everything else that a sliver has: network, vsock, balloon. Without: a disk and nothing else.
    pub base: Option<PathBuf>,
    /// For the kernel's command line.
    pub cmdline: String,
}

/// A machine that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    console: Lines<BufReader<ChildStdout>>,
    started: Instant,
    log: PathBuf,
}

impl Machine {
    /// Starts one; `dir` is where it may keep what it needs while it runs.
    pub fn start(kind: Kind, places: &Places, parts: &Parts, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let mut command = match kind {
            Kind::Ours => ours(places, parts, dir)?,
            Kind::Qemu(aio) => qemu(places, parts, aio),
        };
        let log = dir.join("log");
        let errors = std::fs::File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
        let started = Instant::now();
        let mut child = command.spawn().with_context(|| format!("cannot run {:?}", command.get_program()))?;
        let console = child.stdout.take().context("the console is gone")?;
        Ok(Self { child, console: BufReader::new(console).lines(), started, log })
    }

    /// Waits for a line of the console that contains `wanted`; returns it, and how long after the process's start it came.
    pub fn wait(&mut self, wanted: &str) -> Result<(String, Duration)> {
        let mut said = Vec::new();
        for line in self.console.by_ref() {
            let line = line.context("cannot read the console")?;
            if line.contains(wanted) {
                return Ok((line, self.started.elapsed()));
            }
            said.push(line);
        }
        let status = self.child.wait()?;
        said.extend(std::fs::read_to_string(&self.log));
        bail!("the machine ended ({status}) before it said {wanted:?}; it said:\n{}", said.join("\n"))
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What QEMU says it is.
pub fn version(qemu: &Path) -> Result<String> {
    let said = Command::new(qemu).arg("--version").output();
    let said = said.with_context(|| format!("cannot run {}", qemu.display()))?.stdout;
    Ok(String::from_utf8_lossy(&said).lines().next().unwrap_or("QEMU").to_owned())
}

fn ours(places: &Places, parts: &Parts, dir: &Path) -> Result<Command> {
    let whole = parts.base.is_some();
    let sockets = dir.join("vsock.sock");
    match std::fs::remove_file(&sockets) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("cannot remove {}", sockets.display()));
        }
        _ => {}
    }
    let config = MachineConfig {
        start: Start::Boot {
            kernel: places.lib.join("vmlinux"),
            initrd: Some(places.lib.join("bench-initrd")),
            cmdline: parts.cmdline.clone(),
        },
        memory_mib: MEMORY_MIB,
        vcpus: 1,
        base: parts.base.clone(),
        disk: Some(DiskConfig { path: parts.disk.clone(), rate: None }),
        net: whole.then_some(NetConfig { mac: [2, 0, 0, 1, 0x86, 0x9e] }),
        vsock: whole.then_some(VsockConfig { cid: 3, path: sockets }),
        balloon: whole,
        console: None,
        control: None,
        jail: Some(JailConfig { uid: UID }),
    };
    let path = dir.join("machine.json");
    std::fs::write(&path, serde_json::to_vec(&config)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    let mut command = Command::new(&places.vmm);
    command.arg("run").arg("--config").arg(path);
    Ok(command)
}

/// As small as `microvm` gets with what a sliver has. It has no persistent memory and no vsock of its own: the base is a disk.
fn qemu(places: &Places, parts: &Parts, aio: &str) -> Command {
    let mut command = Command::new(&places.qemu);
    let mut pair = |a: &str, b: String| {
        command.arg(a).arg(b);
    };
    pair(
        "-M",
        "microvm,accel=kvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,auto-kernel-cmdline=on".into(),
    );
    pair("-cpu", "host".into());
    pair("-m", MEMORY_MIB.to_string());
    pair("-smp", "1".into());
    pair("-display", "none".into());
    pair("-serial", "stdio".into());
    pair("-kernel", places.lib.join("vmlinux").display().to_string());
    pair("-initrd", places.lib.join("bench-initrd").display().to_string());
    // What sliver-vmm says as well, but for the way to reset: there is no keyboard controller here.
    pair("-append", format!("console=ttyS0 8250.nr_uarts=1 reboot=t panic=-1 quiet {}", parts.cmdline));
    let file = |id: &str, path: &Path, options: &str| {
        format!("id={id},file={},if=none,format=raw,{options}", path.display())
    };
    pair("-drive", file("disk", &parts.disk, &format!("cache=writeback,discard=unmap,aio={aio}")));
    pair("-device", "virtio-blk-device,drive=disk,bus=virtio-mmio-bus.0".into());
    if let Some(base) = &parts.base {
        pair("-drive", file("base", base, "readonly=on"));
        pair("-device", "virtio-blk-device,drive=base,bus=virtio-mmio-bus.1".into());
        pair("-netdev", "hubport,id=net,hubid=0".into());
        pair("-device", format!("virtio-net-device,netdev=net,mac={MAC},bus=virtio-mmio-bus.2"));
        pair("-device", "virtio-balloon-device,bus=virtio-mmio-bus.3".into());
        pair("-device", "virtio-rng-device,bus=virtio-mmio-bus.4".into());
        pair("-device", "virtio-serial-device,bus=virtio-mmio-bus.5".into());
        pair("-chardev", "null,id=console".into());
        pair("-device", "virtconsole,chardev=console".into());
    }
    command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
    command
}
