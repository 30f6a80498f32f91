//! The host's side of the conversation with `sliver-init`: see [`commonage_nodemgr_api::guest`].
//!
//! The guest is hostile: its lines are at most [`MAX_GUEST_LINE`] bytes, one connection says at most [`MAX_MESSAGES`] of them, and there is one
//! connection at a time with a growing pause between, so a guest that talks without end, or hangs up at once, costs the host next to nothing.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use commonage_nodemgr_api::guest::{CONTROL_PORT, FromGuest, FromHost};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::exec::{CONNECT_TIMEOUT, connect_guest};

/// Longest line taken from a guest, bytes.
const MAX_GUEST_LINE: u64 = 64 * 1024;
/// Most lines of one connection: a well-behaved guest needs four.
const MAX_MESSAGES: usize = 16;
/// Between two connections: at first, at last, and how long one must have lasted for the next to come soon.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(2);
const LASTED_WELL: Duration = Duration::from_secs(10);
/// A guest that booted is not called before it knocks, or before so long.
const NO_KNOCK: Duration = Duration::from_secs(10);
/// How long the guest may take to receive a line.
const SEND_WAIT: Duration = Duration::from_secs(30);

/// What a guest said, and where to answer.
#[derive(Debug)]
pub struct Said {
    /// What.
    pub message: FromGuest,
    /// Of this connection.
    pub answer: mpsc::Sender<FromHost>,
}

/// Keeps connected to the guest until dropped.
#[derive(Debug)]
pub struct Link {
    /// What the guest says.
    pub said: mpsc::Receiver<Said>,
    caller: AbortHandle,
}

impl Link {
    /// Starts calling the guest whose machine's vsock is `vsock`; not before `knock`, if there will be one.
    pub fn start(vsock: PathBuf, knock: Option<oneshot::Receiver<()>>) -> Self {
        let (sender, said) = mpsc::channel(1);
        Self { said, caller: tokio::spawn(call(vsock, knock, sender)).abort_handle() }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.caller.abort();
    }
}

async fn call(vsock: PathBuf, knock: Option<oneshot::Receiver<()>>, sender: mpsc::Sender<Said>) {
    if let Some(knock) = knock {
        tokio::time::timeout(NO_KNOCK, knock).await.ok();
    }
    let mut pause = FIRST_PAUSE;
    while !sender.is_closed() {
        let since = Instant::now();
        if let Ok(Ok(stream)) =
            tokio::time::timeout(CONNECT_TIMEOUT, connect_guest(&vsock, CONTROL_PORT)).await
        {
            converse(stream, sender.clone()).await;
        }
        if since.elapsed() >= LASTED_WELL {
            pause = FIRST_PAUSE;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

async fn converse(stream: UnixStream, sender: mpsc::Sender<Said>) {
    let (read, mut write) = stream.into_split();
    let (answer, mut answers) = mpsc::channel::<FromHost>(4);
    let listen = async {
        let mut read = BufReader::new(read);
        for _ in 0..MAX_MESSAGES {
            let Ok(Some(message)) = next(&mut read).await else { return };
            if sender.send(Said { message, answer: answer.clone() }).await.is_err() {
                return;
            }
        }
        tracing::warn!("a guest says more than it has to say; closing its connection");
    };
    let speak = async {
        while let Some(message) = answers.recv().await {
            let Ok(mut line) = serde_json::to_vec(&message) else { return };
            line.push(b'\n');
            if !matches!(tokio::time::timeout(SEND_WAIT, write.write_all(&line)).await, Ok(Ok(()))) {
                return;
            }
        }
    };
    tokio::select! {
        () = listen => {}
        () = speak => {}
    }
}

async fn next(read: &mut (impl tokio::io::AsyncBufRead + Unpin)) -> io::Result<Option<FromGuest>> {
    let mut line = Vec::new();
    if read.take(MAX_GUEST_LINE).read_until(b'\n', &mut line).await? == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    /// The machine's end of one call.
    async fn accept(listener: &UnixListener) -> BufReader<UnixStream> {
        let mut stream = BufReader::new(listener.accept().await.unwrap().0);
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        assert_eq!(line, "CONNECT 807\n");
        stream.get_mut().write_all(b"OK 807\n").await.unwrap();
        stream
    }

    #[tokio::test]
    async fn a_conversation_and_what_a_hostile_guest_gets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let mut link = Link::start(path, None);

        for bad in [&b"nonsense\n"[..], b"{\"type\":\"identity\"}\n", &vec![b'x'; 70_000]] {
            let mut stream = accept(&listener).await;
            stream.get_mut().write_all(bad).await.ok();
            // Closed, not answered. Unread bytes make it a reset.
            let mut rest = Vec::new();
            assert!(matches!(stream.read_to_end(&mut rest).await, Ok(0) | Err(_)));
            assert!(link.said.try_recv().is_err());
        }

        let mut good = accept(&listener).await;
        let hello = b"{\"type\":\"hello\",\"configured\":true,\"boot_script_exit\":3}\n";
        good.get_mut().write_all(hello).await.unwrap();
        let said = link.said.recv().await.unwrap();
        assert_eq!(said.message, FromGuest::Hello { configured: true, boot_script_exit: Some(3) });
        said.answer.send(FromHost::Welcome).await.unwrap();
        let mut line = String::new();
        good.read_line(&mut line).await.unwrap();
        assert_eq!(line, "{\"type\":\"welcome\"}\n");
    }

    #[tokio::test]
    async fn a_guest_that_booted_is_called_when_it_knocks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (knock, knocked) = oneshot::channel();
        let _link = Link::start(path, Some(knocked));
        let early = tokio::time::timeout(Duration::from_millis(20), listener.accept()).await;
        assert!(early.is_err());
        knock.send(()).unwrap();
        accept(&listener).await;
    }
}
