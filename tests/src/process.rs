//! A child process that ends with its owner, even when the owner is killed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};

/// A running child. Dropping it kills it (by its own process id) and waits for it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `program` with `args`; standard error, and standard output unless `capture`, go to `log`.
    ///
    /// # Errors
    /// The program cannot be started or the log not written.
    pub fn start(program: &Path, args: &[String], log: &Path, capture: bool) -> Result<Self> {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let out = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        // setpriv (util-linux) makes the kernel kill the child when this process dies, however it dies.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(if capture { Stdio::piped() } else { Stdio::from(out.try_clone()?) })
            .stderr(Stdio::from(out))
            .spawn()
            .with_context(|| format!("cannot start {} (through setpriv)", program.display()))?;
        Ok(Self { child, name, log: log.to_owned() })
    }

    /// Its standard output, when it was captured and not taken yet.
    pub fn stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails with the end of its log when it is no longer running.
    ///
    /// # Errors
    /// It ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                anyhow::bail!("{} ended with {status}; its last lines:\n{}", self.name, self.tail(20))
            }
        }
    }

    /// The last lines of its log.
    pub fn tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when it has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a file; empty when it cannot be read.
pub fn tail(path: &Path, lines: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A TCP port of the loopback interface that is free now.
///
/// # Errors
/// No port is free.
pub fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0").context("no free port on 127.0.0.1")?.local_addr()?.port())
}
