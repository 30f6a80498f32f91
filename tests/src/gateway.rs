//! The network of a testbed: a switch that joins the nodes and a QEMU without a guest, whose user-mode network stack is their way out.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::process::{Process, free_port};
use crate::qmp::Qmp;
use crate::switch::Switch;

/// This machine's loopback interface as the nodes see it.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// The running network.
#[derive(Debug)]
pub struct Gateway {
    dir: PathBuf,
    process: Process,
    _switch: Switch,
}

impl Gateway {
    /// Starts a network with room for `nodes` nodes; its sockets lie in `dir`.
    ///
    /// # Errors
    /// QEMU cannot be started, with its last words.
    pub fn start(dir: &Path, nodes: usize) -> Result<Self> {
        let mut args: Vec<String> = [
            "-M",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-monitor",
            "none",
            "-serial",
            "none",
        ]
        .map(String::from)
        .to_vec();
        let mut pair = |a: &str, b: String| args.extend([a.to_owned(), b]);
        pair("-qmp", format!("unix:{},server=on,wait=off", dir.join("gateway.qmp").display()));
        pair("-netdev", "user,id=up,net=10.0.2.0/24".into());
        pair("-netdev", "hubport,id=hup,hubid=0,netdev=up".into());
        let uplink = dir.join("uplink.sock");
        pair("-netdev", format!("stream,id=down,server=off,addr.type=unix,addr.path={}", uplink.display()));
        pair("-netdev", "hubport,id=hdown,hubid=0,netdev=down".into());
        let sockets = (0..nodes).map(|n| Self::socket_in(dir, n));
        let switch = Switch::start(&sockets.chain([uplink]).collect::<Vec<_>>())?;
        let process =
            Process::start(Path::new("qemu-system-x86_64"), &args, &dir.join("gateway.log"), false)?;
        let mut gateway = Self { dir: dir.to_owned(), process, _switch: switch };
        gateway.wait_until_up()?;
        Ok(gateway)
    }

    /// Where node `n` plugs in.
    pub fn socket(&self, n: usize) -> PathBuf {
        Self::socket_in(&self.dir, n)
    }

    /// Makes `address:port` reachable from this machine; the answer is the port on 127.0.0.1.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn forward(&self, address: Ipv4Addr, port: u16) -> Result<u16> {
        let local = free_port()?;
        let mut qmp = Qmp::connect(&self.dir.join("gateway.qmp"))?;
        qmp.human(&format!("hostfwd_add up tcp:127.0.0.1:{local}-{address}:{port}"))
            .with_context(|| format!("cannot forward to {address}:{port}"))?;
        Ok(local)
    }

    fn socket_in(dir: &Path, n: usize) -> PathBuf {
        dir.join(format!("net{n}.sock"))
    }

    /// QEMU opens its monitor last, so an answer there means that everything is open. There is no event to wait for but the socket itself.
    fn wait_until_up(&mut self) -> Result<()> {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            match Qmp::connect(&self.dir.join("gateway.qmp")) {
                Ok(_) => return Ok(()),
                Err(error) if std::time::Instant::now() > deadline => return Err(error),
                Err(_) => self.process.check()?,
            }
            std::thread::park_timeout(std::time::Duration::from_millis(20));
        }
    }
}
