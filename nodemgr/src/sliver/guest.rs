//! The host's side of the conversation with `sliver-init`: see [`commonage_nodemgr_api::guest`].
//!
//! The guest is hostile: its lines are at most [`MAX_GUEST_LINE`] bytes, one connection says at most [`MAX_MESSAGES`] of them, and
//! connections are taken one at a time with a pause between, so a guest that talks without end costs the host next to nothing.

use std::io;
use std::time::Duration;

use commonage_nodemgr_api::guest::{FromGuest, FromHost};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};

/// Longest line taken from a guest, bytes.
const MAX_GUEST_LINE: u64 = 64 * 1024;
/// Most lines of one connection: a well-behaved guest needs four.
const MAX_MESSAGES: usize = 16;
/// Between two connections.
const PAUSE: Duration = Duration::from_millis(50);
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

/// Serves the socket until dropped.
#[derive(Debug)]
pub struct Link {
    /// What the guest says.
    pub said: mpsc::Receiver<Said>,
    server: AbortHandle,
}

impl Link {
    /// Starts serving.
    pub fn start(listener: UnixListener) -> Self {
        let (sender, said) = mpsc::channel(1);
        Self { said, server: tokio::spawn(serve(listener, sender)).abort_handle() }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn serve(listener: UnixListener, sender: mpsc::Sender<Said>) {
    let mut current: Option<AbortOnDrop> = None;
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            // A newer connection takes the place of the older: the guest knows which one it means.
            drop(current.take());
            current = Some(AbortOnDrop(tokio::spawn(converse(stream, sender.clone()))));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
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
    use super::*;

    #[tokio::test]
    async fn a_conversation_and_what_a_hostile_guest_gets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut link = Link::start(UnixListener::bind(&path).unwrap());

        let mut good = BufReader::new(UnixStream::connect(&path).await.unwrap());
        good.get_mut()
            .write_all(b"{\"type\":\"hello\",\"configured\":true,\"boot_script_exit\":3}\n")
            .await
            .unwrap();
        let said = link.said.recv().await.unwrap();
        assert_eq!(said.message, FromGuest::Hello { configured: true, boot_script_exit: Some(3) });
        said.answer.send(FromHost::Welcome).await.unwrap();
        let mut line = String::new();
        good.read_line(&mut line).await.unwrap();
        assert_eq!(line, "{\"type\":\"welcome\"}\n");

        for bad in [&b"nonsense\n"[..], b"{\"type\":\"identity\"}\n", &vec![b'x'; 70_000]] {
            let mut stream = UnixStream::connect(&path).await.unwrap();
            stream.write_all(bad).await.ok();
            // Closed, not answered. Unread bytes make it a reset.
            let mut rest = Vec::new();
            assert!(matches!(stream.read_to_end(&mut rest).await, Ok(0) | Err(_)));
            assert!(link.said.try_recv().is_err());
        }
    }
}
