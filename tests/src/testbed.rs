//! A testbed put together: PLC, its principals, a network, nodes that booted their CDs, slices.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use commonage_images::Images;
use commonage_plc_api::node::SliverOutcome;
use commonage_plc_api::rest::{Node as NodeInfo, Slice, SliceSliver};

use crate::cli::Cli;
use crate::console::Mark;
use crate::gateway::Gateway;
use crate::node::{FAULTS, Firmware, Machine, Node};
use crate::plc::Plc;
use crate::progress::Steps;
use crate::ssh::{Key, Ssh};

/// What a testbed is made of.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many nodes.
    pub nodes: usize,
    /// Their firmware.
    pub firmware: Firmware,
    /// Memory of each node, MiB.
    pub memory_mib: u32,
    /// Whether nodes take orders to break things: see [`Node::kill`].
    pub faults: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { nodes: 1, firmware: Firmware::Bios, memory_mib: 2048, faults: false }
    }
}

/// A running testbed. Everything it started ends with it; its directory goes too, unless [`Testbed::keep`] was called.
#[derive(Debug)]
pub struct Testbed {
    /// The nodes, in order: `node1`, `node2`, …
    pub nodes: Vec<Node>,
    /// The network.
    pub gateway: Gateway,
    /// PLC.
    pub plc: Plc,
    /// The administrator.
    pub admin: Cli,
    /// The PI of site `demo`.
    pub pi: Cli,
    /// The user `alice` of site `demo`.
    pub user: Cli,
    /// Alice's SSH key.
    pub key: Key,
    /// What it was built from.
    pub images: Images,
    forwards: Vec<(Ipv4Addr, u16, u16)>,
    dir: tempfile::TempDir,
}

/// How a sliver is reached from this machine.
#[derive(Debug)]
pub struct Sliver {
    /// What PLC says of it.
    pub info: SliceSliver,
    /// Its login.
    pub ssh: Ssh,
    /// Its first port.
    pub first_port: u16,
    /// The node's address.
    pub address: Ipv4Addr,
}

/// The site of a testbed, and the name before the underscore of its slices.
pub const SITE: &str = "demo";

impl Testbed {
    /// Puts a testbed together and boots its nodes, up to the first report of each to PLC.
    ///
    /// # Errors
    /// The step that failed, with the last console lines.
    pub fn start(options: &Options, images: Images, steps: &mut Steps) -> Result<Self> {
        let mut testbed = Self::prepare(options, images, steps)?;
        let isos = testbed.isos(options, steps)?;
        testbed.boot(options, &isos, steps)?;
        Ok(testbed)
    }

    /// PLC, principals, release and network, without nodes.
    ///
    /// # Errors
    /// The step that failed.
    pub fn prepare(options: &Options, images: Images, steps: &mut Steps) -> Result<Self> {
        let dir =
            tempfile::Builder::new().prefix("commonage-").tempdir().context("no temporary directory")?;
        let (path, commonage) = (dir.path(), images.binary("commonage"));
        let plc = steps.run("plcd", || Plc::start(&images.binary("plcd"), path, 0))?;
        let admin = Cli::new(&commonage, &plc.admin());
        let (pi, user) = (admin.acting_as(&path.join("pi")), admin.acting_as(&path.join("alice")));
        let key = Key::create(&path.join("id_ed25519"))?;
        steps.run("site, PI and user", || {
            admin.run(&["site", "create", SITE])?;
            let principal = |name: &str, role: &str, out: &Path, more: &[&str]| {
                let out = out.display().to_string();
                let mut args =
                    vec!["principal", "create", name, "--site", SITE, "--role", role, "--profile-out", &out];
                args.extend(more);
                admin.run(&args)
            };
            principal("pi", "pi", &path.join("pi"), &[])?;
            let public = key.public.display().to_string();
            principal("alice", "user", &path.join("alice"), &["--ssh-key", &public])
        })?;
        steps.run("sign and publish the release", || {
            let (offline, release) = (text(&path.join("offline.pem")), text(&path.join("release.json")));
            admin.run(&["offline-key", "create", "--out", &offline])?;
            publish(&admin, &images, &offline, &release, options.faults)
        })?;
        let gateway = steps.run("network", || Gateway::start(path, options.nodes))?;
        let nodes = Vec::new();
        Ok(Self { nodes, gateway, plc, admin, pi, user, key, images, forwards: Vec::new(), dir })
    }

    /// Makes each node at PLC and writes its CD.
    ///
    /// # Errors
    /// PLC refuses, or the CD cannot be written.
    pub fn isos(&self, options: &Options, steps: &mut Steps) -> Result<Vec<PathBuf>> {
        steps.run("nodes' CDs", || (1..=options.nodes).map(|n| self.iso(&format!("node{n}"))).collect())
    }

    /// Makes one node at PLC and writes its CD.
    ///
    /// # Errors
    /// PLC refuses, or the CD cannot be written.
    pub fn iso(&self, hostname: &str) -> Result<PathBuf> {
        let config = self.path().join(format!("{hostname}.json"));
        let (offline, url) = (text(&self.path().join("offline.pem.pub")), self.plc.url_for_nodes());
        let args = [
            "node",
            "create",
            "--site",
            SITE,
            "--hostname",
            hostname,
            "--offline-key",
            &offline,
            "--plc",
            &url,
        ];
        self.pi.run(&[&args[..], &["--config-out", &text(&config)]].concat())?;
        self.iso_of(&config)
    }

    /// Writes the CD of a node configuration.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn iso_of(&self, config: &Path) -> Result<PathBuf> {
        let iso = config.with_extension("iso");
        let (kernel, initramfs) = (text(&self.images.boot_kernel), text(&self.images.boot_initramfs));
        let args = ["node", "iso", "--config", &text(config), "--kernel", &kernel, "--initramfs", &initramfs];
        self.pi.run(&[&args[..], &["--out", &text(&iso)]].concat())?;
        Ok(iso)
    }

    /// Boots a node from each CD, up to its first report to PLC.
    ///
    /// # Errors
    /// The phase that failed, with the last console lines.
    pub fn boot(&mut self, options: &Options, isos: &[PathBuf], steps: &mut Steps) -> Result<()> {
        for iso in isos {
            self.switch_on(options, iso)?;
        }
        let first = |node: &Node, what: &str| node.wait(START, what).map(drop);
        for (phase, line) in BOOT_PHASES {
            steps.run(phase, || self.nodes.iter().try_for_each(|node| first(node, line)))?;
        }
        steps.run("agents report", || {
            self.nodes.iter().try_for_each(|node| self.reported(&node.name).map(drop))
        })
    }

    /// Switches on the next node with a CD; it is called what its CD's file is called.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn switch_on(&mut self, options: &Options, iso: &Path) -> Result<&Node> {
        let number = self.nodes.len();
        let name = iso.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let machine = Machine {
            name: &name,
            iso,
            net: &self.gateway.socket(number),
            number: u8::try_from(number + 1).context("at most 255 nodes")?,
            firmware: options.firmware,
            memory_mib: options.memory_mib,
        };
        self.nodes.push(Node::start(self.dir.path(), &machine)?);
        self.nodes.last().context("a node was just added")
    }

    /// What PLC says of a node once the node's agent has reported.
    ///
    /// # Errors
    /// It has not within five minutes; with the last console lines.
    pub fn reported(&self, name: &str) -> Result<NodeInfo> {
        let answer =
            self.pi.run(&["node", "show", name, "--wait", "--timeout", "240"]).with_context(|| {
                let console = self.nodes.iter().find(|n| n.name == name).map(|n| n.console.tail(40));
                format!("the agent of {name} has not reported\n{}", console.unwrap_or_default())
            })?;
        Ok(serde_json::from_value(answer)?)
    }

    /// Makes a slice for alice: `demo_{name}`, instantiated on `nodes`, its boot script run.
    ///
    /// # Errors
    /// PLC refuses, or a sliver fails.
    pub fn slice(&self, name: &str, base: &str, boot_script: &str, nodes: &[&str]) -> Result<Slice> {
        let slice = format!("{SITE}_{name}");
        let script = self.path().join(format!("{slice}.vinit"));
        std::fs::write(&script, boot_script)?;
        self.pi.run(&["slice", "create", &slice])?;
        self.pi.run(&["slice", "set-owners", &slice, "alice"])?;
        self.user.run(&["slice", "set-state", &slice, "--base", base, "--boot-script", &text(&script)])?;
        self.pi.run(&[
            "slice",
            "set-resources",
            &slice,
            "--share",
            "10",
            "--for",
            "1d",
            "--disk-mib",
            "256",
        ])?;
        self.instantiate(&slice, nodes)
    }

    /// Instantiates a slice and waits for its slivers.
    ///
    /// # Errors
    /// A sliver fails; with what the nodes said.
    pub fn instantiate(&self, slice: &str, nodes: &[&str]) -> Result<Slice> {
        let mut args = vec!["slice", "instantiate", slice, "--wait"];
        nodes.iter().for_each(|node| args.extend(["--node", *node]));
        let answer = self.user.run(&args).with_context(|| {
            let show =
                self.user.run(&["slice", "show", slice]).map_or_else(|e| e.to_string(), |v| v.to_string());
            let consoles: Vec<String> = self.nodes.iter().map(|n| n.console.tail(30)).collect();
            format!("slice {slice} was not instantiated: {show}\n{}", consoles.join("\n"))
        })?;
        let slice: Slice = serde_json::from_value(answer)?;
        for sliver in &slice.slivers {
            if !matches!(sliver.outcome, SliverOutcome::Running { boot_script_exit: 0 }) {
                bail!("the sliver of {} on {} is {:?}", slice.name, sliver.hostname, sliver.outcome);
            }
        }
        Ok(slice)
    }

    /// How to reach one sliver of a slice.
    ///
    /// # Errors
    /// It has no sliver there, or its node has not said where it is.
    pub fn sliver(&mut self, slice: &Slice, node: &str) -> Result<Sliver> {
        let info = slice
            .slivers
            .iter()
            .find(|s| s.hostname == node)
            .with_context(|| format!("no sliver on {node}"))?;
        let address = info.address.with_context(|| format!("{node} has not said its address"))?;
        let host_key =
            info.ssh_host_key.clone().with_context(|| format!("{node} has not said its SSH key"))?;
        let port = self.forward(address, 22)?;
        let ssh = Ssh::new(self.dir.path(), port, slice.name.as_str(), &self.key.private, &host_key)?;
        let first_port = info.ports.as_ref().context("no ports")?.first;
        Ok(Sliver { info: info.clone(), ssh, first_port, address })
    }

    /// A port of a node as this machine reaches it.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn forward(&mut self, address: Ipv4Addr, port: u16) -> Result<u16> {
        if let Some((.., local)) = self.forwards.iter().find(|(a, p, _)| (*a, *p) == (address, port)) {
            return Ok(*local);
        }
        let local = self.gateway.forward(address, port)?;
        self.forwards.push((address, port, local));
        Ok(local)
    }

    /// Reboots a node, by [`Node::reset`] or [`Node::restart`], and waits until its new boot is up.
    ///
    /// # Errors
    /// It does not come back; with the last console lines.
    pub fn reboot(&self, node: usize, how: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
        let node = self.nodes.get(node).context("no such node")?;
        let mark = node.console.mark();
        how(node)?;
        BOOT_PHASES.iter().try_for_each(|(_, line)| node.wait(mark, line).map(drop))
    }

    /// Where everything lies.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Leaves the directory behind when the testbed ends, and says where.
    pub fn keep(&mut self) -> PathBuf {
        self.dir.disable_cleanup(true);
        self.dir.path().to_owned()
    }
}

/// The start of a console.
pub const START: Mark = Mark::START;

/// What a node says on its console, in order, on its way up, and what the step is called.
pub const BOOT_PHASES: [(&str, &str); 4] = [
    ("boot CD starts", "boot-cd: "),
    ("boot script verified", "granted until"),
    ("node image installed, kexec", "node-init: "),
    ("node is up", "node-init: up"),
];

/// Signs the node image with the offline key at `offline` and publishes it.
///
/// # Errors
/// The command's own.
pub fn publish(admin: &Cli, images: &Images, offline: &str, release: &str, faults: bool) -> Result<()> {
    let files = files(images);
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let sign = ["release", "sign", "--offline-key", offline, "--name", "demo", "--out", release];
    let cmdline = format!("console=tty0 console=ttyS0 quiet panic=10 {FAULTS}");
    let cmdline = if faults { vec!["--cmdline", &cmdline] } else { Vec::new() };
    admin.run(&[&sign[..], &cmdline, &files].concat())?;
    publish_signed(admin, images, release)
}

/// Publishes a release that was signed before.
///
/// # Errors
/// The command's own.
pub fn publish_signed(admin: &Cli, images: &Images, release: &str) -> Result<()> {
    let files = files(images);
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    admin.run(&[&["release", "publish", release][..], &files].concat()).map(drop)
}

/// The files of the node image as the command wants them named.
fn files(images: &Images) -> Vec<String> {
    images.node_files.iter().map(|(name, path)| format!("--file={name}={}", path.display())).collect()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
