//! A node around the node managers under test: a network card with the real net-demux on it, the machine program, a base. Set up once; the tests run
//! one after the other.

use std::io::{BufRead as _, BufReader};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use commonage_init::{netlink::Netlink, tap};
use commonage_isolation::cgroup::Cgroups;
use commonage_isolation::{Capacity, PortRange};
use commonage_isolation_api::{Interval, Rspec, SliceName};
use commonage_nodemgr::book::AGENT;
use commonage_nodemgr::exec::ExecClient;
use commonage_nodemgr::manager::{Manager, Settings};
use commonage_nodemgr::{capacity, host};
use commonage_nodemgr_api::exec::{Command as Argv, Frame, MAX_PAYLOAD, Start as Exec};
use commonage_nodemgr_api::http::{Acquire, Bind, SliverConfig, SliverState};
use commonage_vmm_api::{MachineConfig, Start};
use jiff::{SignedDuration, Timestamp};
use tokio::runtime::Runtime;

/// How long anything may take; an emulated processor is slow.
const PATIENCE: Duration = Duration::from_secs(120);
const HOST_JSON: &str = r#"{"address":"10.0.2.15","prefix_len":24,"gateway":"10.0.2.2","dns":["10.0.2.3"]}"#;

/// Where the machine that runs the tests has its files.
pub const RUN: &str = "/run/commonage";
const STATE: &str = "/disk/state";
const IMAGES: &str = "/disk/images";
const LIB: &str = "/disk/lib";

/// A node manager in this process, with a runtime of its own so that it can be ended like a process.
pub struct Node {
    runtime: Runtime,
    pub manager: Arc<Manager>,
}

impl Node {
    /// Opens it as a node manager that has just started does.
    pub fn start() -> Self {
        static NETWORK: Once = Once::new();
        NETWORK.call_once(network);
        std::fs::create_dir_all(STATE).unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let settings = Settings {
            node: "3f0e4a52-0000-4000-8000-000000000001".parse().unwrap(),
            state: STATE.into(),
            images: IMAGES.into(),
            run: RUN.into(),
            lib: LIB.into(),
            node_config: Path::new(RUN).join("host.json"),
            vmm: "/bin/sliver-vmm".into(),
            mke2fs: "/sbin/mke2fs".into(),
            ssh_host_key: String::new(),
            templates: true,
            prefault: true,
        };
        let capacity = Capacity {
            memory_mib: 4096,
            disk_mib: 1 << 20,
            link_bps: 1 << 30,
            pids: 10_000,
            ports: PortRange::DEFAULT,
        };
        let manager = runtime.block_on(async {
            let host = host::follow(Path::new(RUN)).unwrap();
            let groups = Cgroups::prepare(Path::new("/sys/fs/cgroup")).unwrap();
            let manager = Manager::open(settings, capacity, Some(groups), host).unwrap();
            manager.start().await;
            manager
        });
        Self { runtime, manager }
    }

    /// Ends it as SIGKILL would: its machines go on.
    pub fn die(self) {
        drop(self.manager);
        self.runtime.shutdown_timeout(PATIENCE);
    }

    /// Ends it as a planned end of the node does.
    pub fn power_off(self) {
        self.runtime.block_on(self.manager.power_off());
        self.die();
    }

    /// Binds a sliver of 64 MiB.
    pub fn bind(&self, name: &str, config: SliverConfig) {
        let (agent, slice) = (slice(AGENT), slice(name));
        let start = Timestamp::now() - SignedDuration::from_hours(1);
        let interval = Interval { start, end: start + SignedDuration::from_hours(24) };
        let rspec = Rspec { memory_mib: 64, ..Rspec::modest(interval) };
        self.runtime.block_on(async {
            let right = self.manager.acquire(&agent, Acquire { rspec }).await.unwrap();
            let bind = Bind { slice, rcap: right.rcap, config };
            self.manager.bind(&agent, bind).await.unwrap();
        });
    }

    /// Waits until the sliver is as wanted.
    pub fn until(&self, name: &str, wanted: impl Fn(&SliverState) -> bool) -> SliverState {
        let mut states = self.manager.follow(&slice(name)).unwrap();
        let found = async { tokio::time::timeout(PATIENCE, states.wait_for(|state| wanted(state))).await };
        match self.runtime.block_on(found) {
            Ok(state) => state.unwrap().clone(),
            Err(_) => panic!("{name} is {:?}", self.manager.status(&slice(name))),
        }
    }

    pub fn until_running(&self, name: &str) {
        self.until(name, |state| *state == SliverState::Running { boot_script_exit: 0 });
    }

    /// Binds a sliver and waits until it runs.
    pub fn run(&self, name: &str) {
        self.bind(name, mini());
        self.until_running(name);
    }

    /// Runs a line for the shell in a sliver; what it said and its status.
    pub fn shell(&self, name: &str, line: &str) -> (String, i32) {
        let vsock = self.manager.paths(&slice(name)).vsock();
        let exec = Exec { command: Argv::Line(line.to_owned()), ..Exec::default() };
        let run = async {
            let (_writer, mut reader) = ExecClient::start(&vsock, exec).await.unwrap();
            let mut said = Vec::new();
            loop {
                match reader.next().await.unwrap() {
                    Some(Frame::Stdout(bytes) | Frame::Stderr(bytes)) => said.extend(bytes),
                    Some(Frame::Exit(status)) => return (String::from_utf8(said).unwrap(), status),
                    other => panic!("{line:?} in {name}: {other:?}"),
                }
            }
        };
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, run).await.unwrap() })
    }

    /// [`Node::shell`] of what must work.
    pub fn ask(&self, name: &str, line: &str) -> String {
        let (said, status) = self.shell(name, line);
        assert_eq!(status, 0, "{line:?} in {name} said {said:?}");
        said.trim_end().to_owned()
    }

    /// Copies a program into a sliver.
    pub fn put(&self, name: &str, path: &str, contents: &[u8]) {
        let vsock = self.manager.paths(&slice(name)).vsock();
        let line = format!("cat > {path} && chmod 755 {path}");
        let exec = Exec { command: Argv::Line(line), ..Exec::default() };
        let run = async {
            let (mut writer, mut reader) = ExecClient::start(&vsock, exec).await.unwrap();
            for chunk in contents.chunks(MAX_PAYLOAD) {
                writer.send(Frame::Stdin(chunk.to_vec())).await.unwrap();
            }
            writer.send(Frame::StdinEof).await.unwrap();
            assert_eq!(reader.next().await.unwrap(), Some(Frame::Exit(0)));
        };
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, run).await.unwrap() });
    }

    /// Has a sliver do what ends it: no answer is waited for.
    pub fn tell(&self, name: &str, line: &str) {
        let vsock = self.manager.paths(&slice(name)).vsock();
        let exec = Exec { command: Argv::Line(line.to_owned()), ..Exec::default() };
        let run = async {
            let (_writer, mut reader) = ExecClient::start(&vsock, exec).await.unwrap();
            while let Ok(Some(_)) = reader.next().await {}
        };
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, run).await.unwrap() });
    }

    pub fn configure(&self, name: &str, config: SliverConfig) {
        self.runtime.block_on(self.manager.configure(&slice(AGENT), slice(name), config)).unwrap();
    }

    pub fn delete(&self, name: &str) {
        self.runtime.block_on(self.manager.delete(&slice(AGENT), slice(name))).unwrap();
        assert!(!self.manager.paths(&slice(name)).dir.exists());
        assert!(!self.manager.paths(&slice(name)).state.exists());
    }

    /// How the sliver's machine was started.
    pub fn start_of(&self, name: &str) -> Start {
        let text = std::fs::read(self.manager.paths(&slice(name)).machine()).unwrap();
        serde_json::from_slice::<MachineConfig>(&text).unwrap().start
    }

    pub fn is_clone(&self, name: &str) -> bool {
        matches!(self.start_of(name), Start::Restore { memory, .. } if memory.starts_with(templates()))
    }

    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }
}

pub fn slice(name: &str) -> SliceName {
    name.parse().unwrap()
}

pub fn mini() -> SliverConfig {
    SliverConfig { base: "mini".into(), ..SliverConfig::default() }
}

pub fn templates() -> PathBuf {
    Path::new(RUN).join("templates")
}

/// The card and the host's TAP, with net-demux between them, ready.
fn network() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    capacity::raise_descriptors();
    std::fs::create_dir_all(RUN).unwrap();
    std::fs::write(Path::new(RUN).join("host.json"), HOST_JSON).unwrap();
    let mut netlink = Netlink::open().unwrap();
    let links = netlink.links().unwrap();
    let nic = links.iter().find(|link| link.name == "eth0").unwrap();
    netlink.set_up(nic.index).unwrap();
    netlink.set_promiscuous(nic.index).unwrap();
    tap::create_persistent("host0").unwrap();
    let host = netlink.link_index("host0").unwrap();
    netlink.set_mac(host, nic.mac.unwrap()).unwrap();
    netlink.set_up(host).unwrap();
    assert!(netlink.wait_running(nic.index, Instant::now() + PATIENCE).unwrap());
    let mut demux = Command::new("/bin/net-demux");
    demux.args(["--nic", "eth0", "--tap", "host0", "--control", "/run/commonage/net-demux.sock"]);
    let mut demux = demux.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(demux.stderr.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("ready: ")), "net-demux ended");
    // It must never wait for somebody to read what it says. It ends with the machine.
    std::thread::spawn(move || {
        said.map_while(Result::ok).for_each(drop);
        demux.wait()
    });
    netlink.add_address(host, Ipv4Addr::new(10, 0, 2, 15), 24).unwrap();
}
