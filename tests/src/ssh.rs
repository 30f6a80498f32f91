//! The unmodified OpenSSH client.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, bail};

/// A key pair made by `ssh-keygen`.
#[derive(Debug, Clone)]
pub struct Key {
    /// The private key's file.
    pub private: PathBuf,
    /// The public key's file.
    pub public: PathBuf,
}

impl Key {
    /// Makes a new pair at `path`, or takes the one that is there.
    ///
    /// # Errors
    /// `ssh-keygen` fails.
    pub fn create(path: &Path) -> Result<Self> {
        let public = path.with_extension("pub");
        if !path.exists() {
            let status = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-C", "commonage", "-f"])
                .arg(path)
                .status()
                .context("ssh-keygen (package openssh-client) cannot be run")?;
            if !status.success() {
                bail!("ssh-keygen failed: {status}");
            }
        }
        Ok(Self { private: path.to_owned(), public })
    }
}

/// A sliver's login.
#[derive(Debug, Clone)]
pub struct Ssh {
    port: u16,
    user: String,
    key: PathBuf,
    known_hosts: PathBuf,
}

impl Ssh {
    /// A login as `slice` through 127.0.0.1:`port`, where the host must prove `host_key` (an OpenSSH public key).
    ///
    /// # Errors
    /// The file of known hosts cannot be written to `dir`.
    pub fn new(dir: &Path, port: u16, slice: &str, key: &Path, host_key: &str) -> Result<Self> {
        let known_hosts = dir.join(format!("known_hosts.{port}"));
        std::fs::write(&known_hosts, format!("[127.0.0.1]:{port} {host_key}\n"))?;
        Ok(Self { port, user: slice.to_owned(), key: key.to_owned(), known_hosts })
    }

    /// What a person would type.
    pub fn shown(&self) -> String {
        let mut line = "ssh".to_owned();
        for arg in self.args() {
            // Writing to a String cannot fail.
            let _ = write!(line, " {arg}");
        }
        line
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where a test may keep what a terminal showed.
    pub fn terminal_log(&self) -> PathBuf {
        self.known_hosts.with_extension("terminal")
    }

    fn args(&self) -> Vec<String> {
        vec![
            "-p".into(),
            self.port.to_string(),
            "-i".into(),
            self.key.display().to_string(),
            "-o".into(),
            format!("UserKnownHostsFile={}", self.known_hosts.display()),
            format!("{}@127.0.0.1", self.user),
        ]
    }

    /// The client, ready to be given a command line; `flags` come before the host. Never asks anything.
    pub fn command(&self, flags: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        command
            .args([
                "-F",
                "none",
                "-o",
                "BatchMode=yes",
                "-o",
                "IdentitiesOnly=yes",
                "-o",
                "ConnectTimeout=30",
            ])
            .args(["-o", "StrictHostKeyChecking=yes", "-o", "LogLevel=ERROR"])
            .args(flags)
            .args(self.args());
        command
    }

    /// Runs `line` in the sliver, feeding `stdin`.
    ///
    /// # Errors
    /// The client cannot be run. Its exit status is in the answer.
    pub fn output(&self, flags: &[&str], line: &str, stdin: &[u8]) -> Result<Output> {
        let mut child = self
            .command(flags)
            .arg(line)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("ssh (package openssh-client) cannot be run")?;
        let mut input = child.stdin.take().context("no pipe to ssh")?;
        let bytes = stdin.to_vec();
        // In a thread of its own, or both would wait for each other once the pipes are full.
        let writer = std::thread::spawn(move || input.write_all(&bytes));
        let output = child.wait_with_output()?;
        // A client that ended early closed the pipe: its exit status tells why.
        let _ = writer.join();
        Ok(output)
    }

    /// Runs `line` in the sliver and expects it to succeed.
    ///
    /// # Errors
    /// It failed; with what it said.
    pub fn run(&self, line: &str) -> Result<String> {
        let output = self.output(&[], line, b"")?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!(
                "ssh {}@127.0.0.1:{} {line:?} ended with {}: {stderr}{stdout}",
                self.user,
                self.port,
                output.status
            );
        }
        Ok(stdout)
    }
}
