//! A living machine: its process seen through its control socket, so one that an earlier node manager spawned is no different.
//!
//! The machine's own word is used to know that it lives and why it ended, never to decide whom to kill: that is its control group.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use commonage_vmm_api::{ExitReason, Request, Response};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::demux::Ring;
use crate::exec::connect_no_follow;

/// Longest answer, bytes.
const MAX_LINE: u64 = 64 * 1024;
/// How long a machine may take to answer.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// How long a spawned machine may take to open its control socket.
const SPAWN_WAIT: Duration = Duration::from_secs(60);

/// A machine that lives, or ended a moment ago.
#[derive(Debug)]
pub struct Machine {
    control: PathBuf,
    ended: oneshot::Receiver<String>,
}

impl Machine {
    /// Takes over the machine that answers at `control`.
    ///
    /// # Errors
    /// None answers.
    pub async fn adopt(control: &Path) -> io::Result<Self> {
        match ask(control, &Request::Status).await? {
            Response::Status { .. } => Self::watch(control, None).await,
            other => Err(unexpected(&other)),
        }
    }

    /// Waits until a spawned machine answers.
    ///
    /// # Errors
    /// It ended before, or takes too long.
    pub async fn await_spawned(control: &Path, mut child: Child) -> io::Result<Self> {
        let deadline = Instant::now() + SPAWN_WAIT;
        let mut pause = Duration::from_millis(2);
        loop {
            match connect_no_follow(control).await {
                Ok(_) => return Self::watch(control, Some(child)).await,
                Err(e) if Instant::now() >= deadline => return Err(e),
                Err(_) => {}
            }
            tokio::select! {
                status = child.wait() => return Err(io::Error::other(format!("it ended at once: {}", status?))),
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_millis(50)),
            }
        }
    }

    async fn watch(control: &Path, child: Option<Child>) -> io::Result<Self> {
        let mut stream = connect_no_follow(control).await?;
        stream.write_all(&line(&Request::Wait)?).await?;
        let (sender, ended) = oneshot::channel();
        tokio::spawn(async move {
            let said = read_line(&mut BufReader::new(stream)).await;
            let status = match child {
                // Waited for in any case, so that no zombie is left.
                Some(mut child) => child.wait().await.ok(),
                None => None,
            };
            sender.send(describe(said, status)).ok();
        });
        Ok(Self { control: control.to_owned(), ended })
    }

    /// Why it ended, when it has.
    pub async fn ended(&mut self) -> String {
        (&mut self.ended).await.unwrap_or_else(|_| "it ended".to_owned())
    }

    /// Asks it to end at once.
    pub async fn stop(&self) {
        ask(&self.control, &Request::Stop).await.ok();
    }

    /// Its network ring.
    ///
    /// # Errors
    /// It does not answer with a ring.
    pub async fn ring(&self) -> io::Result<Ring> {
        let exchange = async {
            let mut stream = connect_no_follow(&self.control).await?;
            stream.write_all(&line(&Request::Ring)?).await?;
            receive_ring(&stream).await
        };
        within(exchange).await
    }
}

async fn receive_ring(stream: &UnixStream) -> io::Result<Ring> {
    let mut text = Vec::new();
    let mut fds: Vec<OwnedFd> = Vec::new();
    // The descriptors come with the line's first byte.
    while text.last() != Some(&b'\n') {
        let (bytes, more) = stream.async_io(Interest::READABLE, || receive(stream)).await?;
        if bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        text.extend(bytes);
        fds.extend(more);
        if text.len() as u64 > MAX_LINE || fds.len() > 3 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it answers more than a ring"));
        }
    }
    match serde_json::from_slice(&text)? {
        Response::Ring => {}
        other => return Err(unexpected(&other)),
    }
    let three: [OwnedFd; 3] = fds
        .try_into()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a ring has three descriptors"))?;
    Ok(Arc::new(three))
}

fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut buffer = [0u8; 1024];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut buffer)], &mut control, flags)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it sends more than three descriptors"));
    }
    Ok((buffer.get(..got.bytes).unwrap_or_default().to_vec(), fds))
}

async fn ask(control: &Path, request: &Request) -> io::Result<Response> {
    let exchange = async {
        let mut stream = connect_no_follow(control).await?;
        stream.write_all(&line(request)?).await?;
        read_line(&mut BufReader::new(stream)).await
    };
    within(exchange).await
}

async fn within<T>(exchange: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the machine does not answer");
    tokio::time::timeout(ANSWER_WAIT, exchange).await.map_err(late)?
}

async fn read_line(stream: &mut BufReader<UnixStream>) -> io::Result<Response> {
    let mut text = Vec::new();
    if stream.take(MAX_LINE).read_until(b'\n', &mut text).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&text)?)
}

fn line(request: &Request) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    Ok(line)
}

fn unexpected(answer: &Response) -> io::Error {
    match answer {
        Response::Error { message } => io::Error::other(message.chars().take(400).collect::<String>()),
        _ => io::Error::new(io::ErrorKind::InvalidData, "the machine answers something else than was asked"),
    }
}

fn describe(said: io::Result<Response>, status: Option<ExitStatus>) -> String {
    match (said, status) {
        (Ok(Response::Exited { reason }), _) => match reason {
            ExitReason::Reset => "the guest reset or powered off its machine".to_owned(),
            ExitReason::TripleFault => "the guest crashed its processor (triple fault)".to_owned(),
            ExitReason::Stopped => "it was stopped".to_owned(),
            ExitReason::Failed { message } => {
                format!("the host failed: {}", message.chars().take(400).collect::<String>())
            }
        },
        (_, Some(status)) => format!("its process was ended ({status}), perhaps for want of memory"),
        (_, None) => "its process was ended, perhaps for want of memory".to_owned(),
    }
}

#[cfg(test)]
#[path = "machine_test.rs"]
mod tests;
