//! A machine as the node manager sees it: its process, its control socket, its vsock and its ring.

use std::cell::Cell;
use std::fs::File;
use std::io::{BufRead as _, BufReader, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime};

use commonage_net_demux_api::ring::{Endpoint, MAX_FRAME, RingFds};
use commonage_nodemgr_api::Bytes;
use commonage_nodemgr_api::exec::{self, Decoder, Frame};
use commonage_nodemgr_api::guest::{CONTROL_PORT, EXEC_PORT, FromGuest, FromHost, GATEWAY, Identity, Knock};
use commonage_nodemgr_api::http::PortGrant;
use commonage_vmm_api::{
    DiskConfig, ExitReason, MachineConfig, NetConfig, Request, Response, Start, VsockConfig,
};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use tempfile::TempDir;

/// The node's address.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 5);
pub const GATEWAY_MAC: [u8; 6] = GATEWAY.1;
const TEMPLATE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const DISK: u64 = 64 << 20;
const PLACEHOLDER: u64 = 1 << 20;
/// How long anything may take, on a processor that is emulated.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a machine is made of.
pub struct Host {
    directory: TempDir,
    config: MachineConfig,
}

/// A machine that runs; ended with the test.
pub struct Running<'a> {
    host: &'a Host,
    child: Cell<Option<Child>>,
}

fn given(name: &str) -> PathBuf {
    std::env::var_os(name).unwrap_or_else(|| panic!("set {name}")).into()
}

/// The identity of the sliver with this number.
pub fn identity(number: u8, disk_bytes: u64) -> Identity {
    let first = 20_000 + 64 * u16::from(number);
    let mut entropy = vec![0; 32];
    File::open("/dev/urandom").unwrap().read_exact(&mut entropy).unwrap();
    Identity {
        slice: format!("a_sliver{number}").parse().unwrap(),
        node: "3f0e4a52-0000-4000-8000-000000000001".parse().unwrap(),
        mac: [2, 0, 0, 1, 0x86, number],
        disk_bytes,
        address: ADDRESS,
        dns: vec![[10, 0, 2, 3].into()],
        ports: PortGrant { first, last: first + 63, tcp: [8080].into(), udp: [].into() },
        ssh_keys: vec!["ssh-ed25519 AAAA someone".into()],
        boot_script: String::new(),
        files: vec![],
        now: SystemTime::now().try_into().unwrap(),
        entropy: Bytes(entropy),
    }
}

/// The frames that the guest has sent by now.
pub fn frames(ring: &mut Endpoint) -> Vec<Vec<u8>> {
    let mut frame = vec![0; MAX_FRAME];
    let mut all = Vec::new();
    while let Some(len) = ring.recv(&mut frame) {
        all.push(frame[..len].to_vec());
    }
    all
}

impl Host {
    fn with(start: impl FnOnce(&Path) -> Start, mac: [u8; 6], disk: u64, is_template: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        File::create(path("disk")).unwrap().set_len(disk).unwrap();
        if !is_template {
            let options = "lazy_itable_init=1,lazy_journal_init=1";
            let mut mke2fs = Command::new("mke2fs");
            mke2fs.args(["-q", "-F", "-t", "ext4", "-m", "0", "-E", options]).arg(path("disk"));
            assert!(mke2fs.status().unwrap().success());
        }
        let config = MachineConfig {
            start: start(directory.path()),
            // The least that there is.
            memory_mib: 32,
            vcpus: 1,
            base: Some(given("SLIVER_BASE")),
            disk: Some(DiskConfig { path: path("disk"), rate: None }),
            net: Some(NetConfig { mac }),
            vsock: Some(VsockConfig { cid: 3, path: path("vsock") }),
            balloon: true,
            console: Some(path("console.log")),
            control: Some(path("control")),
            jail: None,
        };
        Self { directory, config }
    }

    fn boot(_: &Path) -> Start {
        Start::Boot {
            kernel: given("SLIVER_KERNEL"),
            initrd: Some(given("SLIVER_INITRD")),
            cmdline: "quiet".into(),
        }
    }

    /// A machine that boots.
    pub fn new() -> Self {
        Self::with(Self::boot, [2, 0, 0, 1, 0x86, 1], DISK, false)
    }

    /// A machine to be cloned.
    pub fn template() -> Self {
        Self::with(Self::boot, TEMPLATE_MAC, PLACEHOLDER, true)
    }

    /// A clone of a template that was written to `directory`.
    pub fn clone_of(template: &TempDir) -> Self {
        let path = |name: &str| template.path().join(name);
        let start = Start::Restore { state: path("state"), memory: path("memory"), prefault: None };
        Self::with(|_| start, [2, 0, 0, 1, 0x86, 99], DISK, false)
    }

    /// Boots it, waits until it waits for an identity, and writes it.
    pub fn snapshot(self) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        let running = self.start();
        running.wait_for_knock();
        assert_eq!(running.ask(&Request::Pause), Response::Done);
        let files = ["state", "memory"].map(|name| File::create(directory.path().join(name)).unwrap());
        let control = running.control();
        send(&control, &Request::Snapshot, &files.each_ref().map(|f| f.as_fd()));
        assert_eq!(receive(&control).0, Response::Done);
        let ended = running.wait();
        assert_eq!(running.ask(&Request::Stop { grace_ms: 0 }), Response::Stopping);
        assert_eq!(ended.exited().0, ExitReason::Stopped);
        directory
    }

    pub fn disk_bytes(&self) -> u64 {
        self.directory.path().join("disk").metadata().unwrap().len()
    }

    pub fn start(&self) -> Running<'_> {
        let config = self.directory.path().join("machine.json");
        std::fs::write(&config, serde_json::to_vec(&self.config).unwrap()).unwrap();
        for socket in ["vsock", "control"] {
            let _ = std::fs::remove_file(self.directory.path().join(socket));
        }
        let mut command = Command::new(given("SLIVER_VMM"));
        let child = command.args(["run", "--config"]).arg(config).spawn().unwrap();
        Running { host: self, child: Cell::new(Some(child)) }
    }
}

/// A control connection that waits for the machine's end.
pub struct Waiting(UnixStream);

impl Waiting {
    /// Why it ended, and what its console said last.
    pub fn exited(self) -> (ExitReason, String) {
        match receive(&self.0).0 {
            Response::Exited { reason, console } => (reason, console),
            other => panic!("{other:?}"),
        }
    }
}

impl Running<'_> {
    /// What the console has said.
    pub fn console(&self) -> String {
        let path = self.host.directory.path().join("console.log");
        String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
    }

    /// A connection to the control socket of a machine that lives.
    pub fn control(&self) -> UnixStream {
        let stream = self.reach(self.host.config.control.as_deref().unwrap());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn reach(&self, path: &Path) -> UnixStream {
        let mut child = self.child.take().unwrap();
        let stream = loop {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the machine ended ({status}): {}", self.console());
            }
            if let Ok(stream) = UnixStream::connect(path) {
                break stream;
            }
            std::thread::yield_now();
        };
        self.child.set(Some(child));
        stream
    }

    pub fn ask(&self, request: &Request) -> Response {
        let control = self.control();
        send(&control, request, &[]);
        receive(&control).0
    }

    pub fn wait(&self) -> Waiting {
        let control = self.control();
        send(&control, &Request::Wait, &[]);
        Waiting(control)
    }

    pub fn ring(&self) -> Endpoint {
        let control = self.control();
        send(&control, &Request::Ring, &[]);
        let (response, fds) = receive(&control);
        assert_eq!(response, Response::Ring);
        Endpoint::open(RingFds::from_vec(fds).unwrap()).unwrap()
    }

    /// Waits until the guest says that it waits, and has closed that connection.
    pub fn wait_for_knock(&self) {
        let control = self.control();
        send(&control, &Request::Accept, &[]);
        let (response, mut fds) = receive(&control);
        assert_eq!(response, Response::Connection { port: CONTROL_PORT });
        let mut said = String::new();
        UnixStream::from(fds.remove(0)).read_to_string(&mut said).unwrap();
        assert_eq!(serde_json::from_str::<Knock>(&said).unwrap(), Knock::Waiting);
    }

    /// A connection to a port of the guest. The machine gives a guest some seconds to answer, which may be too few on a processor that is
    /// emulated and busy, so whoever is refused asks again.
    fn connect(&self, port: u32) -> UnixStream {
        let end = Instant::now() + PATIENCE;
        loop {
            let mut stream = self.reach(&self.host.config.vsock.as_ref().unwrap().path);
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
            if greeted(&mut stream) {
                return stream;
            }
            assert!(Instant::now() < end, "port {port} is refused: {}", self.console());
        }
    }

    /// A node manager's connection.
    pub fn converse(&self) -> Conversation {
        Conversation(BufReader::new(self.connect(CONTROL_PORT)))
    }

    pub fn become_sliver(&self, number: u8) {
        if matches!(self.host.config.start, Start::Boot { .. }) {
            self.wait_for_knock();
        }
        let mut guest = self.converse();
        assert_eq!(guest.hear(), FromGuest::Hello { configured: false, boot_script_exit: None });
        guest.say(&FromHost::Identity(Box::new(identity(number, self.host.disk_bytes()))));
        assert_eq!(guest.hear(), FromGuest::Configured);
        assert_eq!(guest.hear(), FromGuest::BootScriptDone { exit: 0 });
    }

    /// What a command says, or why it could not be run.
    pub fn run(&self, line: &str) -> Result<String, String> {
        let mut stream = self.connect(EXEC_PORT);
        let start = exec::Start { command: exec::Command::Line(line.into()), ..exec::Start::default() };
        // A guest that refuses may have closed already.
        let _ = stream.write_all(&Frame::Start(start).encode().unwrap());
        let (mut decoder, mut said, mut bytes) = (Decoder::default(), Vec::new(), [0; 4096]);
        loop {
            match decoder.next_frame().unwrap() {
                Some(Frame::Stdout(more) | Frame::Stderr(more)) => said.extend(more),
                Some(Frame::Exit(_)) => return Ok(String::from_utf8(said).unwrap()),
                Some(Frame::Error(why)) => return Err(why),
                Some(other) => panic!("{other:?}"),
                None => {
                    let read = stream.read(&mut bytes).unwrap();
                    assert!(read > 0, "the command's connection ended: {}", self.console());
                    decoder.push(&bytes[..read]);
                }
            }
        }
    }

    /// Runs a command that ends the machine, and sees how it did.
    pub fn end(&self, command: &str, how: &ExitReason) {
        let waiting = self.wait();
        self.run(&format!("{command} & sleep 0")).unwrap();
        let (reason, console) = waiting.exited();
        assert_eq!(&reason, how, "{console}");
    }
}

/// Whether the machine says that the guest has accepted; it closes the connection otherwise.
fn greeted(stream: &mut UnixStream) -> bool {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        if stream.read(&mut byte).unwrap() == 0 {
            return false;
        }
        line.extend(byte);
    }
    assert!(line.starts_with(b"OK "), "{line:?}");
    true
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The node manager's side of a conversation.
pub struct Conversation(BufReader<UnixStream>);

impl Conversation {
    pub fn say(&mut self, message: &FromHost) {
        let mut line = serde_json::to_vec(message).unwrap();
        line.push(b'\n');
        self.0.get_mut().write_all(&line).unwrap();
    }

    pub fn hear(&mut self) -> FromGuest {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
    }

    pub fn is_closed(&mut self) -> bool {
        let mut line = String::new();
        matches!(self.0.read_line(&mut line), Ok(0) | Err(_))
    }
}

fn send(stream: &UnixStream, request: &Request, fds: &[BorrowedFd<'_>]) {
    let mut line = serde_json::to_vec(request).unwrap();
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL);
    assert_eq!(sent.unwrap(), line.len());
}

fn receive(stream: &UnixStream) -> (Response, Vec<OwnedFd>) {
    let (mut text, mut fds) = (Vec::new(), Vec::new());
    while text.last() != Some(&b'\n') {
        // One at a time: what follows the line is another's.
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, flags);
        assert_eq!(got.unwrap().bytes, 1, "the control connection ended: {}", String::from_utf8_lossy(&text));
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        text.extend(byte);
    }
    (serde_json::from_slice(&text).unwrap(), fds)
}
