//! Where a bench measures: on this machine, if it has hardware virtualisation and the bench is root; otherwise in a node that QEMU emulates.
//!
//! Both run the same `bench-node` with the same files; what it says is passed on while it runs.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use commonage_images::cpio::Tree;
use commonage_images::{Images, packages};
use commonage_testbed::nested::Machine;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use commonage_bench::figures::{PROGRESS, RESULT};
use commonage_bench::options::On;
use commonage_bench::program;

/// The large program: 50 MiB.
const PROGRAM_PAGES: u32 = 12_800;
/// What the device that a base is mapped through wants its length to be a multiple of, bytes.
const BASE_ALIGNMENT: u64 = 2 << 20;
/// QEMU, and what its `microvm` reads to start.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const FIRMWARE: [&str; 3] =
    ["/usr/share/qemu/qboot.rom", "/usr/share/qemu/linuxboot_dma.bin", "/usr/share/qemu/pvh.bin"];
/// The disk of an emulated node: sparse, so what slivers do not take is not there.
const DISK_MIB: u64 = 32 * 1024;

/// The programs that a bench was built with.
#[derive(Debug, Clone, Copy)]
pub struct Programs {
    /// Runs on the node.
    pub node: &'static str,
    /// Runs in guests.
    pub guest: &'static str,
}

/// A place to measure at.
#[derive(Debug)]
pub struct Place {
    emulated: bool,
    counts: bool,
    images: Images,
    node: PathBuf,
    /// What is made for this run only.
    made: TempDir,
}

impl Place {
    /// Builds what is not built yet, and decides where to measure.
    ///
    /// # Errors
    /// An image cannot be built, or this machine was asked for and can't.
    pub fn prepare(on: On, programs: Programs) -> Result<Self> {
        let context = commonage_images::Context::from_env()?;
        packages::ensure(&context, &[packages::BUILD, packages::MACHINES])?;
        let images = commonage_images::build(&context)?;
        let hardware = ["kvm_intel", "kvm_amd"].iter().any(|m| Path::new("/sys/module").join(m).exists());
        let emulated = match on {
            On::Emulated => true,
            On::Here => {
                ensure!(
                    hardware,
                    "this machine has no hardware virtualisation (neither kvm_intel nor kvm_amd)"
                );
                ensure!(rustix::process::geteuid().is_root(), "measuring on this machine needs root");
                false
            }
            On::Auto => !(hardware && rustix::process::geteuid().is_root()),
        };
        let made = tempfile::Builder::new().prefix("commonage-bench-").tempdir()?;
        let place = Self { emulated, counts: false, images, node: programs.node.into(), made };
        place.make_initrd(Path::new(programs.guest))?;
        place.make_base(Path::new(programs.guest))?;
        Ok(place)
    }

    /// Whether an emulated node's clocks count instructions from now on. For what waits for a disk that would be wrong.
    #[allow(dead_code, reason = "each bench and test has its own copy of this module")]
    pub fn count_instructions(&mut self, counts: bool) {
        self.counts = counts;
    }

    /// What to tell whoever reads the figures.
    #[allow(dead_code, reason = "each bench and test has its own copy of this module")]
    pub fn describe(&self) -> String {
        let processors = std::thread::available_parallelism().map_or(0, usize::from);
        if self.emulated {
            format!(
                "in a node emulated by QEMU (TCG, one processor) on a machine of {processors} processors: \
                 sizes are as on hardware, of times only ratios mean anything"
            )
        } else {
            format!("on this machine, hardware virtualisation, {processors} processors")
        }
    }

    /// Whether the node is emulated.
    #[allow(dead_code, reason = "each bench and test has its own copy of this module")]
    pub fn is_emulated(&self) -> bool {
        self.emulated
    }

    /// Runs `bench-node` with `arguments`, passing its progress on, and returns its result.
    ///
    /// # Errors
    /// It fails, with what it said.
    pub fn run<T: DeserializeOwned>(
        &self,
        arguments: &[String],
        memory_mib: u32,
        patience: Duration,
    ) -> Result<T> {
        let result = if self.emulated {
            self.run_emulated(arguments, memory_mib, patience)?
        } else {
            self.run_here(arguments)?
        };
        serde_json::from_str(&result).context("bench-node's result is not what this bench expects")
    }

    /// Files for the node's disk or directory: its path there, and here.
    fn files(&self) -> Vec<(String, PathBuf)> {
        let made = |name: &str| self.made.path().join(name);
        let mut files = vec![
            ("lib/vmlinux".to_owned(), self.images.sliver_kernel.clone()),
            ("lib/sliver-initrd".to_owned(), self.images.sliver_initrd.clone()),
            ("lib/bench-initrd".to_owned(), made("bench-initrd")),
            ("images/base-bench.erofs".to_owned(), made("base-bench.erofs")),
            ("images/large".to_owned(), made("large")),
        ];
        let mini = self.images.node_files.get("base-mini.erofs");
        files.extend(mini.map(|path| ("images/base-mini.erofs".to_owned(), path.clone())));
        files
    }

    fn run_emulated(&self, arguments: &[String], memory_mib: u32, patience: Duration) -> Result<String> {
        let files = self.files();
        let files: Vec<(&str, &Path)> =
            files.iter().map(|(to, from)| (to.as_str(), from.as_path())).collect();
        let (vmm, demux) = (self.images.binary("sliver-vmm"), self.images.binary("net-demux"));
        let machine = Machine::new(&self.images);
        let machine = if self.counts { machine.counting_instructions() } else { machine };
        let mut machine = machine
            .memory_mib(memory_mib)
            .disk(DISK_MIB, &files)
            .network()
            .patience(patience)
            .file("/bin/bench-node", &self.node)
            .file("/bin/sliver-vmm", &vmm)
            .file("/bin/net-demux", &demux)
            .program("/sbin/mke2fs")?
            .program(QEMU)?
            .on_line(pass_on);
        for firmware in FIRMWARE {
            machine = machine.file(firmware, Path::new(firmware));
        }
        // Of a failure the kernel may know more: it is at its end that messages about killed processes are.
        let command = format!("bench-node {} || {{ dmesg | tail -n 25; false; }}", arguments.join(" "));
        let said = machine.run(&command)?;
        let result = said.lines().find_map(|l| Some(l.split_once(RESULT)?.1.to_owned()));
        result.with_context(|| format!("bench-node gave no result; it said:\n{said}"))
    }

    /// In a network namespace and a control group of its own, with a card that leads nowhere.
    fn run_here(&self, arguments: &[String]) -> Result<String> {
        let root = self.made.path().join("node");
        for (to, from) in self.files() {
            let to = root.join(to);
            std::fs::create_dir_all(to.parent().unwrap_or(&to))?;
            std::os::unix::fs::symlink(from, to)?;
        }
        let at = |name: &str| root.join(name).display().to_string();
        let group = format!("/sys/fs/cgroup/commonage-bench-{}", std::process::id());
        let vmm = self.images.binary("sliver-vmm").display().to_string();
        let demux = self.images.binary("net-demux").display().to_string();
        let places = [
            ("--images", at("images")),
            ("--lib", at("lib")),
            ("--state", at("state")),
            ("--run", format!("/run/commonage-bench-{}", std::process::id())),
            ("--vmm", vmm),
            ("--net-demux", demux),
            ("--cgroups", group.clone()),
            ("--nic", "nic0".to_owned()),
        ];
        let script = "ip link set lo up && ip link add nic0 type dummy && exec \"$0\" \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", script]).arg(&self.node).args(arguments);
        if arguments.first().is_some_and(|verb| verb == "density") {
            command.arg("--clean");
        }
        for (flag, value) in &places {
            command.args([flag, value.as_str()]);
        }
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot run unshare")?;
        let output = BufReader::new(child.stdout.take().context("bench-node's output is gone")?);
        let mut result = None;
        for line in output.lines() {
            let line = line?;
            match line.split_once(RESULT) {
                Some((_, json)) => result = Some(json.to_owned()),
                None => pass_on(&line),
            }
        }
        let status = child.wait()?;
        for (flag, path) in &places {
            // Groups are removed by rmdir, the innermost first; what is left after a failure is for a person to look at.
            if *flag == "--cgroups" {
                let _ = std::fs::remove_dir(Path::new(path).join("slivers"));
                let _ = std::fs::remove_dir(path);
            } else if *flag == "--run" {
                let _ = std::fs::remove_dir_all(path);
            }
        }
        if !status.success() {
            bail!("bench-node: {status}");
        }
        result.context("bench-node gave no result")
    }

    /// The initrd of guests without a node manager: bench-guest, which becomes sliver-init.
    fn make_initrd(&self, guest: &Path) -> Result<()> {
        let mut tree = Tree::new();
        tree.directory("/proc").directory("/sys").directory("/dev");
        tree.character_device("/dev/console", 0o600, 5, 1).character_device("/dev/null", 0o666, 1, 3);
        tree.file("/init", 0o755, guest).file("/sliver-init", 0o755, &self.images.binary("sliver-init"));
        tree.write(&self.made.path().join("bench-initrd"))?;
        Ok(())
    }

    /// The base `bench`: `mini` with bench-guest and the large program.
    fn make_base(&self, guest: &Path) -> Result<()> {
        let (root, image) = (self.made.path().join("root"), self.made.path().join("base-bench.erofs"));
        let large = self.made.path().join("large");
        std::fs::write(&large, program::image(PROGRAM_PAGES)).context("cannot write the large program")?;
        let mini = self.images.node_files.get("base-mini.erofs").context("there is no base mini")?;
        let extract = format!("--extract={}", root.display());
        run(Command::new("fsck.erofs").arg(extract).arg(mini))?;
        for (name, source) in [("bench-guest", guest), ("large", &large)] {
            let to = root.join("bin").join(name);
            std::fs::copy(source, &to).with_context(|| format!("cannot copy {}", source.display()))?;
            std::fs::set_permissions(&to, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        }
        let options = ["-T0", "-Enoinline_data", "--quiet", "--all-root"];
        run(Command::new("mkfs.erofs").args(options).arg(&image).arg(&root))?;
        std::fs::remove_dir_all(&root)?;
        let file = std::fs::File::options().write(true).open(&image)?;
        Ok(file.set_len(file.metadata()?.len().next_multiple_of(BASE_ALIGNMENT))?)
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    let said = || String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{command:?}: {}: {}", output.status, said());
    Ok(())
}

/// Progress, and what else a person should see, goes to standard error.
fn pass_on(line: &str) {
    if let Some((_, progress)) = line.split_once(PROGRESS) {
        eprintln!("  {progress}");
    } else if !line.contains(RESULT) && !line.trim().is_empty() {
        eprintln!("  | {}", line.trim_end());
    }
}
