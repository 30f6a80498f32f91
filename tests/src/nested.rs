//! One command on a real KVM, on a machine that may have none: run by a bare node's kernel in QEMU, which emulates the virtualisation.
//!
//! The machine has busybox, the KVM and TUN modules, control groups, the files it is given and, when asked for, a disk with an ext4 file
//! system at `/disk` and a network card without a network behind it. It tells how the command ended on its serial console, and ends.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use commonage_images::Images;
use commonage_images::cpio::Tree;

use crate::console::{Console, Mark};
use crate::node::accelerator;
use crate::process::Process;

/// Before the exit status of the command, on the console.
const ENDED: &str = "nested: ended with status ";
/// What the machine does before the command. Modules that are built in are no modules, so a failed `modprobe` is no failure.
const PREPARE: &str = "#!/bin/busybox sh
export PATH=/bin:/sbin
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mkdir -p /dev/pts
mount -t devpts none /dev/pts
mount -t tmpfs none /run
mount -t tmpfs none /tmp
mount -t cgroup2 -o favordynmods none /sys/fs/cgroup
for module in virtio_pci virtio_blk virtio_net crc32c ext4 tun; do modprobe $module 2>/dev/null; done
modprobe kvm-amd || modprobe kvm-intel
ulimit -n 1048576
echo 1048576 > /proc/sys/kernel/pid_max
ip link set lo up
";

/// A machine, and what it is told to do.
pub struct Machine<'a> {
    images: &'a Images,
    files: Vec<(String, PathBuf)>,
    memory_mib: u32,
    disk: Option<Disk>,
    network: bool,
    counts: bool,
    patience: Duration,
    listener: Box<dyn FnMut(&str) + 'a>,
}

#[derive(Debug)]
struct Disk {
    mib: u64,
    files: Vec<(String, PathBuf)>,
}

/// Runs `command`, a line for the shell, with `files` (path in the machine, path here; all executable), and returns what the console said.
///
/// # Errors
/// See [`Machine::run`].
pub fn run(images: &Images, files: &[(&str, &Path)], command: &str) -> Result<String> {
    files.iter().fold(Machine::new(images), |machine, (path, source)| machine.file(path, source)).run(command)
}

impl<'a> Machine<'a> {
    /// A machine of 1 GiB without disk and network, whose command may take ten minutes.
    pub fn new(images: &'a Images) -> Self {
        Self {
            images,
            files: Vec::new(),
            memory_mib: 1024,
            disk: None,
            network: false,
            counts: false,
            patience: Duration::from_secs(600),
            listener: Box::new(|_| ()),
        }
    }

    /// With an executable file, in memory: its path in the machine, and here.
    #[must_use]
    pub fn file(mut self, path: &str, source: &Path) -> Self {
        self.files.push((path.to_owned(), source.to_owned()));
        self
    }

    /// With a dynamically linked program of this machine, its loader and its libraries, each at the path that it has here.
    ///
    /// # Errors
    /// `program` is not dynamically linked, or not there.
    pub fn program(mut self, program: &str) -> Result<Self> {
        let ldd = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
        let said = String::from_utf8_lossy(&ldd.stdout);
        // Lines are `libz.so.1 => /lib/…/libz.so.1 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`, `linux-vdso.so.1 (0x…)`.
        let libraries: Vec<&str> = said
            .lines()
            .filter_map(|l| l.rsplit("=>").next()?.split_whitespace().next().filter(|w| w.starts_with('/')))
            .collect();
        ensure!(!libraries.is_empty(), "{program} has no libraries: ldd says {said:?}");
        for path in libraries.into_iter().chain([program]) {
            self = self.file(path, Path::new(path));
        }
        Ok(self)
    }

    /// With so much memory.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// With a disk of so many MiB, sparse here, mounted at `/disk`, which has `files` (path in it, path here).
    #[must_use]
    pub fn disk(mut self, mib: u64, files: &[(&str, &Path)]) -> Self {
        let files = files.iter().map(|(path, source)| ((*path).to_owned(), (*source).to_owned()));
        self.disk = Some(Disk { mib, files: files.collect() });
        self
    }

    /// With a network card, `eth0`; nobody is at the other end.
    #[must_use]
    pub fn network(mut self) -> Self {
        self.network = true;
        self
    }

    /// If it is emulated, its clocks count instructions while it has work to do, two nanoseconds each: what takes long in there does not depend on
    /// what else this machine is doing.
    #[must_use]
    pub fn counting_instructions(mut self) -> Self {
        self.counts = true;
        self
    }

    /// With so much time for the command.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// With someone who hears each line of the console as it comes.
    #[must_use]
    pub fn on_line(mut self, listener: impl FnMut(&str) + 'a) -> Self {
        self.listener = Box::new(listener);
        self
    }

    /// Runs `command`, a line for the shell, and returns what the console said.
    ///
    /// # Errors
    /// QEMU refuses, time is up, or the command fails; with everything that the console said.
    pub fn run(mut self, command: &str) -> Result<String> {
        let dir =
            tempfile::Builder::new().prefix("commonage-").tempdir().context("no temporary directory")?;
        let at = |name: &str| dir.path().join(name);
        self.initramfs(command)?.write(&at("initramfs"))?;
        if let Some(disk) = &self.disk {
            disk.make(dir.path(), &at("disk"))?;
        }
        let mut qemu = Process::start(
            Path::new("qemu-system-x86_64"),
            &self.arguments(&at("initramfs"), &at("disk")),
            &at("qemu.log"),
            true,
        )?;
        let console = Console::follow(qemu.stdout().context("QEMU's output is gone")?, &at("console"))?;
        let ended = self.listen(&console);
        let said = String::from_utf8_lossy(&std::fs::read(console.path())?).replace('\r', "");
        let ended =
            ended.with_context(|| format!("the console said:\n{said}\nQEMU said:\n{}", qemu.tail(20)))?;
        if !ended.ends_with(&format!("{ENDED}0")) {
            bail!("{command:?}: {ended}; the console said:\n{said}");
        }
        Ok(said)
    }

    /// Waits for the command's end. A panic of the machine's kernel ends the machine; one that is only told of is a guest's.
    fn listen(&mut self, console: &Console) -> Result<String> {
        let end = Instant::now() + self.patience;
        let mut mark = Mark::START;
        loop {
            let line;
            (line, mark) = console.next(mark, end.saturating_duration_since(Instant::now()))?;
            if line.contains(ENDED) {
                return Ok(line);
            }
            (self.listener)(&line);
        }
    }

    fn arguments(&self, initramfs: &Path, disk: &Path) -> Vec<String> {
        let mut args: Vec<String> = Vec::new();
        let mut pair = |a: &str, b: &str| args.extend([a.to_owned(), b.to_owned()]);
        pair("-M", "q35");
        let accelerator = accelerator();
        for (name, value) in accelerator {
            pair(name, value);
        }
        if self.counts && accelerator.contains(&("-accel", "tcg")) {
            pair("-icount", "shift=1");
        }
        pair("-m", &self.memory_mib.to_string());
        pair("-display", "none");
        pair("-serial", "stdio");
        pair("-kernel", &self.images.boot_kernel.display().to_string());
        pair("-initrd", &initramfs.display().to_string());
        // Level 3: KVM logs as errors what guests try on processors that lack it.
        pair("-append", "console=ttyS0 loglevel=3 panic=-1");
        if self.disk.is_some() {
            // Nobody needs what is on it after a power cut here.
            let drive = format!("file={},if=virtio,format=raw,discard=unmap,cache=unsafe", disk.display());
            pair("-drive", &drive);
        }
        if self.network {
            pair("-netdev", "user,id=net,restrict=on");
            pair("-device", "virtio-net-pci,netdev=net,romfile=,mac=52:54:00:c0:00:01");
        }
        args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
        args
    }

    fn initramfs(&self, command: &str) -> Result<Tree> {
        let mut tree = Tree::new();
        for directory in ["/proc", "/sys", "/dev", "/run", "/tmp", "/disk"] {
            tree.directory(directory);
        }
        tree.character_device("/dev/console", 0o600, 5, 1);
        tree.file("/bin/busybox", 0o755, Path::new("/bin/busybox"));
        tree.copy(&format!("/lib/modules/{}", self.images.kernel_release), &self.images.modules)?;
        for (path, source) in &self.files {
            tree.file(path, 0o755, source);
        }
        let mount = if self.disk.is_some() { "mount -t ext4 -o noatime /dev/vda /disk\n" } else { "" };
        let init = format!("{PREPARE}{mount}{command}\necho \"{ENDED}$?\"\npoweroff -f\n");
        tree.bytes("/init", 0o755, init);
        Ok(tree)
    }
}

impl Disk {
    /// Makes the image, by way of a directory beside it.
    fn make(&self, dir: &Path, image: &Path) -> Result<()> {
        let staging = dir.join("staging");
        std::fs::create_dir(&staging).with_context(|| format!("cannot make {}", staging.display()))?;
        for (path, source) in &self.files {
            let to = staging.join(path.trim_start_matches('/'));
            if let Some(parent) = to.parent() {
                std::fs::create_dir_all(parent)
                    .with_context(|| format!("cannot make {}", parent.display()))?;
            }
            // A link costs nothing; between file systems there are none.
            std::fs::hard_link(source, &to)
                .or_else(|_| std::fs::copy(source, &to).map(drop))
                .with_context(|| format!("cannot copy {}", source.display()))?;
        }
        std::fs::File::create(image)?.set_len(self.mib << 20)?;
        let lazy = "lazy_itable_init=1,lazy_journal_init=1,nodiscard";
        let mut mke2fs = Command::new("/sbin/mke2fs");
        mke2fs.args(["-q", "-F", "-t", "ext4", "-m", "0", "-E", lazy, "-d"]).arg(&staging).arg(image);
        let made = mke2fs.output().context("cannot run mke2fs")?;
        ensure!(made.status.success(), "mke2fs: {}", String::from_utf8_lossy(&made.stderr));
        std::fs::remove_dir_all(&staging).context("cannot remove what the disk was made from")
    }
}
