//! Whole machines, run by the real `sliver-vmm` on the real KVM. Needs KVM that can run Linux, a sliver kernel named by the environment
//! variable `SLIVER_KERNEL`, and a static `/bin/busybox` for the guest; `SLIVER_VMM` names the binary if it is not where cargo built it. Run
//! as root to see privileges dropped.
//!
//! The guest's init is a shell script; it answers through its disk, its console and its network.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use commonage_net_demux_api::ring::{Endpoint, MAX_FRAME, RingFds};
use commonage_vmm::control::channel;
use commonage_vmm_api::{
    DiskConfig, ExitReason, JailConfig, MachineConfig, Metrics, NetConfig, Request, Response, Start,
    VsockConfig,
};
use rustix::event::{PollFd, PollFlags};
use tempfile::TempDir;

#[path = "machine/balloon.rs"]
mod balloon;
#[path = "machine/control.rs"]
mod control;
#[path = "machine/disk.rs"]
mod disk;
#[path = "machine/ends.rs"]
mod ends;
#[path = "machine/snapshot.rs"]
mod snapshot;

const UID: u32 = 100_001;
const MAC: [u8; 6] = [2, 0, 0, 1, 0x86, 0xa1];

/// A machine under test, in a directory of its own.
struct Machine {
    directory: TempDir,
    config: MachineConfig,
}

impl Machine {
    /// A machine whose guest runs `script`.
    fn new(script: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("initrd"), initrd(script, &[])).unwrap();
        let config = MachineConfig {
            start: Start::Boot {
                kernel: std::env::var_os("SLIVER_KERNEL")
                    .expect("SLIVER_KERNEL names a sliver kernel")
                    .into(),
                initrd: Some(path("initrd")),
                cmdline: String::new(),
            },
            memory_mib: 64,
            vcpus: 1,
            base: None,
            disk: None,
            net: None,
            vsock: None,
            balloon: false,
            console: Some(path("console.log")),
            control: Some(path("control.sock")),
            // Whatever is tested is tested behind the walls.
            jail: rustix::process::geteuid().is_root().then_some(JailConfig { uid: UID }),
        };
        Self { directory, config }
    }

    /// Adds to its kernel's command line.
    fn append(&mut self, words: &str) {
        if let Start::Boot { cmdline, .. } = &mut self.config.start {
            cmdline.push_str(words);
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn start(&self) -> Child {
        let config = self.path("machine.json");
        std::fs::write(&config, serde_json::to_vec(&self.config).unwrap()).unwrap();
        let binary =
            std::env::var_os("SLIVER_VMM").unwrap_or_else(|| env!("CARGO_BIN_EXE_sliver-vmm").into());
        Command::new(binary).arg("run").arg("--config").arg(config).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn run(&self) -> ExitStatus {
        self.start().wait().unwrap()
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.path("console.log")).unwrap()).into_owned()
    }

    /// Connects to the control socket of a machine that was just started.
    fn connect(&self, child: &mut Child) -> UnixStream {
        loop {
            assert!(child.try_wait().unwrap().is_none(), "the machine ended early: {}", self.console());
            if let Ok(stream) = UnixStream::connect(self.path("control.sock")) {
                return stream;
            }
            std::thread::yield_now();
        }
    }
}

fn ask(mut stream: &UnixStream, request: &Request) {
    let mut line = serde_json::to_vec(request).unwrap();
    line.push(b'\n');
    stream.write_all(&line).unwrap();
}

fn answer(stream: &UnixStream) -> Response {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

/// A cpio archive ("newc") of busybox, `files` (name and content) in /bin, and an init that runs `script`.
fn initrd(script: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    let mut add = |name: &str, mode: u32, content: &[u8]| {
        let fields = [0, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        archive.extend_from_slice(b"070701");
        for field in fields {
            archive.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    };
    let init = format!(
        "#!/bin/busybox sh\nexport PATH=/bin\n/bin/busybox --install -s /bin\nmount -t proc none /proc\n\
         mount -t devtmpfs none /dev 2>/dev/null\n{script}\nreboot -f\n"
    );
    for directory in ["bin", "proc", "dev"] {
        add(directory, 0o040755, &[]);
    }
    add("bin/busybox", 0o100755, &std::fs::read("/bin/busybox").unwrap());
    for (name, content) in files {
        add(&format!("bin/{name}"), 0o100755, content);
    }
    add("init", 0o100755, init.as_bytes());
    add("TRAILER!!!", 0, &[]);
    archive
}

fn region(file: &mut std::fs::File, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.seek(std::io::SeekFrom::Start(at)).unwrap();
    file.read_exact(&mut bytes).unwrap();
    bytes
}

fn disk(path: PathBuf) -> DiskConfig {
    DiskConfig { path, rate: None }
}

fn file(path: &Path, bytes: &[u8]) -> PathBuf {
    std::fs::write(path, bytes).unwrap();
    path.to_owned()
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn a_guest_reads_its_base_writes_its_disk_and_draws_entropy() {
    let mut machine = Machine::new(
        "dd if=/dev/pmem0 of=/dev/vda bs=4096 count=2 2>/dev/null\n\
         dd if=/dev/hwrng of=/dev/vda bs=512 seek=100 count=1 conv=sync 2>/dev/null\n\
         sync\ncat /proc/cpuinfo | grep -c hypervisor\necho DONE",
    );
    let base: Vec<u8> = (0..5000u32).map(|at| (at * 7 % 251) as u8).collect();
    machine.config.base = Some(file(&machine.path("base"), &base));
    machine.config.disk = Some(disk(file(&machine.path("disk"), &[0; 1 << 20])));
    let status = machine.run();
    assert_eq!(status.code(), Some(0), "{}", machine.console());
    assert!(machine.console().contains("DONE"), "{}", machine.console());
    let mut disk = std::fs::File::open(machine.path("disk")).unwrap();
    assert_eq!(region(&mut disk, 0, 5000), base);
    assert_eq!(region(&mut disk, 5000, 3192), vec![0; 3192]);
    assert_ne!(region(&mut disk, 51_200, 64), vec![0; 64]);
    assert_eq!(disk.metadata().unwrap().len(), 1 << 20);
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn control_tells_status_and_end_and_privileges_are_gone() {
    let machine = Machine::new("while :; do sleep 1000; done");
    let root = rustix::process::geteuid().is_root();
    let mut child = machine.start();
    let waiting = machine.connect(&mut child);
    ask(&waiting, &Request::Wait);
    let client = machine.connect(&mut child);
    ask(&client, &Request::Status);
    assert!(matches!(answer(&client), Response::Status { pid, .. } if pid == child.id()));

    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let field = |name: &str| {
        let line =
            status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name}"));
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    if root {
        assert_eq!(field("Uid:"), vec![UID.to_string(); 4]);
        assert_eq!(field("Gid:"), vec![UID.to_string(); 4]);
        assert!(field("Groups:").is_empty());
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(field(set), ["0000000000000000"], "{set}");
        }
        let proc = PathBuf::from(format!("/proc/{}", child.id()));
        assert_eq!(std::fs::read_dir(proc.join("root/")).unwrap().count(), 0, "its root is not empty");
        for namespace in ["user", "mnt", "net", "ipc", "uts"] {
            let of = |process: &Path| std::fs::read_link(process.join("ns").join(namespace)).unwrap();
            assert_ne!(of(&proc), of(Path::new("/proc/self")), "{namespace}");
        }
        for descriptor in std::fs::read_dir(proc.join("fd")).unwrap() {
            let open = std::fs::read_link(descriptor.unwrap().path()).unwrap();
            assert!(!open.is_dir() && !open.starts_with("/proc/self"), "a way out: {}", open.display());
        }
    }
    // The event loop and one processor, each under a filter of its own.
    let threads = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let threads: Vec<_> = threads.map(|thread| thread.unwrap().path().join("status")).collect();
    assert_eq!(threads.len(), 2);
    for thread in threads {
        assert!(std::fs::read_to_string(thread).unwrap().contains("\nSeccomp:\t2\n"));
    }

    ask(&client, &Request::Stop { grace_ms: 0 });
    assert_eq!(answer(&client), Response::Stopping);
    assert!(matches!(answer(&waiting), Response::Exited { reason: ExitReason::Stopped, .. }));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn a_disk_belongs_to_one_machine_at_a_time() {
    let mut first = Machine::new("while :; do sleep 1000; done");
    let image = file(&first.path("disk"), &[0; 4096]);
    first.config.disk = Some(disk(image.clone()));
    let mut child = first.start();
    let client = first.connect(&mut child);
    let mut second = Machine::new("");
    second.config.disk = Some(disk(image));
    let output = second.start().wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("another machine uses it"));
    ask(&client, &Request::Stop { grace_ms: 0 });
    child.wait().unwrap();
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn a_guest_pings_through_the_ring() {
    let mut machine = Machine::new(
        "ifconfig eth0 10.9.9.1 netmask 255.255.255.0 up\n\
         echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6\n\
         ip neigh add 10.9.9.2 lladdr 02:ff:ff:ff:ff:ff dev eth0 2>/dev/null || arp -s 10.9.9.2 02:ff:ff:ff:ff:ff\n\
         cat /sys/class/net/eth0/address 2>/dev/null; ifconfig eth0\n\
         ping -c 3 -s 1400 10.9.9.2",
    );
    machine.config.net = Some(NetConfig { mac: MAC });
    let mut child = machine.start();
    let ending = machine.connect(&mut child);
    ask(&ending, &Request::Wait);
    let client = machine.connect(&mut child);
    ask(&client, &Request::Ring);
    let mut demux = Endpoint::open(receive_ring(&client)).unwrap();
    let mut echoed = 0;
    loop {
        let mut frame = [0; MAX_FRAME];
        while let Some(len) = demux.recv(&mut frame) {
            if let Some(reply) = echo_reply(&frame[..len]) {
                assert_eq!(&frame[6..12], &MAC);
                demux.send(&reply).unwrap();
                echoed += 1;
            }
        }
        let mut fds =
            [PollFd::from_borrowed_fd(demux.event(), PollFlags::IN), PollFd::new(&ending, PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
        if !fds[1].revents().is_empty() {
            break;
        }
        demux.drain_event();
    }
    child.wait().unwrap();
    assert_eq!(echoed, 3, "{}", machine.console());
    assert!(machine.console().contains("3 packets received"), "{}", machine.console());
}

fn receive_ring(client: &UnixStream) -> RingFds {
    RingFds::from_vec(answer_with_descriptors(client).1).expect("three descriptors")
}

/// The next answer, with what came beside it.
fn answer_with_descriptors(client: &UnixStream) -> (Response, Vec<OwnedFd>) {
    let (mut line, mut descriptors) = ([0; 128], Vec::new());
    let count = channel::receive(client, &mut line, &mut descriptors).unwrap();
    (serde_json::from_slice(&line[..count]).unwrap(), descriptors)
}

/// The answer to an IPv4 ICMP echo request; none to anything else.
fn echo_reply(frame: &[u8]) -> Option<Vec<u8>> {
    let is_request = frame.get(12..14)? == [8, 0] && *frame.get(23)? == 1 && *frame.get(34)? == 8;
    if !is_request {
        return None;
    }
    let mut reply = frame.to_vec();
    reply[..6].copy_from_slice(&frame[6..12]);
    reply[6..12].copy_from_slice(&frame[..6]);
    reply[26..30].copy_from_slice(&frame[30..34]);
    reply[30..34].copy_from_slice(&frame[26..30]);
    reply[34] = 0;
    // Type 8 became 0: the ones' complement checksum grows by 0x0800, with end-around carry (RFC 1624).
    let sum = u32::from(u16::from_be_bytes([frame[36], frame[37]])) + 0x0800;
    let sum = (sum & 0xffff) + (sum >> 16);
    reply[36..38].copy_from_slice(&(sum as u16).to_be_bytes());
    Some(reply)
}
