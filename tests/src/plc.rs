//! A running PLC.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::gateway;
use crate::process::Process;

/// A `plcd` on a free port of the loopback interface.
#[derive(Debug)]
pub struct Plc {
    process: Process,
    port: u16,
    state: PathBuf,
}

#[derive(Deserialize)]
struct Ready {
    listening: std::net::SocketAddr,
}

impl Plc {
    /// Starts `plcd` on `port` (0: any) with its state in `dir/plc`, which it makes when it is not there.
    ///
    /// # Errors
    /// It does not get ready, with its last words.
    pub fn start(binary: &Path, dir: &Path, port: u16) -> Result<Self> {
        let state = dir.join("plc");
        let args = [
            "--state".to_owned(),
            state.display().to_string(),
            "--listen".to_owned(),
            format!("127.0.0.1:{port}"),
            // The first one is this machine's own way there.
            "--name".to_owned(),
            "127.0.0.1".to_owned(),
            "--name".to_owned(),
            gateway::HOST.to_string(),
        ];
        let mut process = Process::start(binary, &args, &dir.join("plcd.log"), true)?;
        let output = process.stdout().context("plcd's output is gone")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let ready: Ready = serde_json::from_str(&line).map_err(|e| {
            anyhow::anyhow!("plcd did not get ready ({e}, {line:?}); its last lines:\n{}", process.tail(20))
        })?;
        Ok(Self { process, port: ready.listening.port(), state })
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// As this machine reaches it.
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// As nodes reach it.
    pub fn url_for_nodes(&self) -> String {
        format!("https://{}:{}", gateway::HOST, self.port)
    }

    /// The administrator's profile: certificate, key and CA.
    pub fn admin(&self) -> PathBuf {
        self.state.join("admin")
    }

    /// The last lines of its log.
    pub fn tail(&self, lines: usize) -> String {
        self.process.tail(lines)
    }
}
