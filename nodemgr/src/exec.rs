//! The host's side of one command in a sliver: connects to the sliver's vsock, asks for guest port 808 and speaks [`Frame`]s.
//!
//! What comes back is the guest's word and is bounded: a frame is at most 64 KiB, connecting takes at most [`CONNECT_TIMEOUT`].
//! Dropping both halves closes the connection, which hangs the command up.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use commonage_nodemgr_api::exec::{Frame, FrameError, HEADER, Start};
use commonage_nodemgr_api::guest::EXEC_PORT;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// How long connecting to the guest may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest line the machine answers `CONNECT` with, bytes.
const MAX_ANSWER: usize = 64;

/// Why a command could not be run or followed.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The sliver's machine could not be reached.
    #[error("cannot reach the sliver's machine through {}: {source}; it may be booting or just have ended: try again", path.display())]
    Connect {
        /// Its vsock.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The machine runs but nothing in it listens for commands.
    #[error(
        "the sliver's init does not take commands yet (its machine answered {0:?}); try again when it has started"
    )]
    Refused(String),
    /// Nothing answered in time.
    #[error("the sliver did not take the command within {} s; it may be overloaded", CONNECT_TIMEOUT.as_secs())]
    Timeout,
    /// The connection broke.
    #[error("the connection to the sliver broke: {0}; its machine may have ended")]
    Io(#[from] io::Error),
    /// The guest does not speak the protocol.
    #[error("the sliver's init broke the exec protocol: {0}")]
    Frame(#[from] FrameError),
}

/// Starts commands.
#[derive(Debug)]
pub struct ExecClient;

impl ExecClient {
    /// Starts a command in the sliver whose vsock is `vsock_path`.
    ///
    /// # Errors
    /// The sliver cannot be reached, or does not take commands yet.
    pub async fn start(vsock_path: &Path, start: Start) -> Result<(ExecWriter, ExecReader), ExecError> {
        let connect = async {
            let mut stream = connect_guest(vsock_path, EXEC_PORT).await?;
            stream.write_all(&Frame::Start(start).encode()?).await?;
            let (read, write) = stream.into_split();
            Ok((ExecWriter { write }, ExecReader { read, partial: Vec::new() }))
        };
        tokio::time::timeout(CONNECT_TIMEOUT, connect).await.map_err(|_| ExecError::Timeout)?
    }
}

/// The half that sends input, window sizes and signals.
#[derive(Debug)]
pub struct ExecWriter {
    write: OwnedWriteHalf,
}

impl ExecWriter {
    /// Sends one frame; waits while the guest takes nothing. Split [`Frame::Stdin`] at 64 KiB.
    ///
    /// # Errors
    /// The connection broke, or the frame is too long.
    pub async fn send(&mut self, frame: Frame) -> Result<(), ExecError> {
        Ok(self.write.write_all(&frame.encode()?).await?)
    }
}

/// The half that yields output and the end.
#[derive(Debug)]
pub struct ExecReader {
    read: OwnedReadHalf,
    /// Bytes of the frame that is not complete yet: kept here so that dropping a `next` future loses nothing.
    partial: Vec<u8>,
}

impl ExecReader {
    /// The next frame; `None` when the guest closed the connection (without [`Frame::Exit`] before: its machine ended).
    /// Cancel safe: may be used in `tokio::select!`.
    ///
    /// # Errors
    /// The connection broke in the middle of a frame, or the guest does not speak the protocol.
    pub async fn next(&mut self) -> Result<Option<Frame>, ExecError> {
        loop {
            let mut wanted = HEADER;
            if let Some(header) = self.partial.first_chunk::<HEADER>() {
                let (kind, len) = Frame::parse_header(*header)?;
                wanted = HEADER + len;
                if self.partial.len() >= wanted {
                    let payload = self.partial.split_off(HEADER);
                    self.partial.clear();
                    return Ok(Some(Frame::parse(kind, payload)?));
                }
            }
            let missing = wanted.saturating_sub(self.partial.len()) as u64;
            if (&mut self.read).take(missing).read_buf(&mut self.partial).await? == 0 {
                return if self.partial.is_empty() {
                    Ok(None)
                } else {
                    Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
                };
            }
        }
    }
}

/// Connects to a guest's vsock port through the machine's Unix socket.
pub(crate) async fn connect_guest(path: &Path, port: u32) -> Result<UnixStream, ExecError> {
    let failed = |source| ExecError::Connect { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).await.map_err(failed)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.map_err(failed)?;
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    // One byte at a time: what follows the line belongs to the frames.
    while answer.last() != Some(&b'\n') && answer.len() < MAX_ANSWER {
        match stream.read_u8().await {
            Ok(byte) => answer.push(byte),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(e) => return Err(failed(e)),
        }
    }
    if answer.starts_with(b"OK ") && answer.ends_with(b"\n") {
        Ok(stream)
    } else {
        Err(ExecError::Refused(String::from_utf8_lossy(&answer).trim_end().to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use commonage_nodemgr_api::exec::Command;
    use tokio::io::{AsyncBufReadExt as _, BufReader};
    use tokio::net::UnixListener;

    async fn accept(listener: &UnixListener) -> BufReader<UnixStream> {
        let mut stream = BufReader::new(listener.accept().await.unwrap().0);
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        assert_eq!(line, "CONNECT 808\n");
        stream
    }

    #[tokio::test]
    async fn frames_arrive_whole_however_they_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = async {
            let mut stream = accept(&listener).await;
            let mut bytes = b"OK 808\n".to_vec();
            bytes.extend(Frame::Stdout(vec![7; 1000]).encode().unwrap());
            bytes.extend(Frame::Exit(3).encode().unwrap());
            for chunk in bytes.chunks(6) {
                stream.get_mut().write_all(chunk).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let start = Start { command: Command::Argv(vec!["true".into()]), ..Start::default() };
        let host = async {
            let (_writer, mut reader) = ExecClient::start(&path, start).await.unwrap();
            assert_eq!(reader.next().await.unwrap(), Some(Frame::Stdout(vec![7; 1000])));
            assert_eq!(reader.next().await.unwrap(), Some(Frame::Exit(3)));
        };
        tokio::join!(guest, host);
    }

    #[tokio::test]
    async fn what_a_hostile_guest_says_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        for (said, wanted) in [
            (&b"OK 808\n\x05\xff\xff\xff\xff"[..], "longer than"),
            (b"OK 808\n\x05\0\0", "broke"),
            (b"OK 808\n\x63\0\0\0\0", "no frame"),
        ] {
            let guest = async {
                let mut stream = accept(&listener).await;
                stream.get_mut().write_all(said).await.unwrap();
                stream.get_mut().shutdown().await.unwrap();
                stream
            };
            let host = async {
                let (_writer, mut reader) = ExecClient::start(&path, Start::default()).await.unwrap();
                reader.next().await.unwrap_err().to_string()
            };
            let (_stream, error) = tokio::join!(guest, host);
            assert!(error.contains(wanted), "{error}");
        }
        let refuse = async { drop(accept(&listener).await) };
        let (_, refused) = tokio::join!(refuse, ExecClient::start(&path, Start::default()));
        assert!(matches!(refused, Err(ExecError::Refused(_))), "{refused:?}");
    }
}
