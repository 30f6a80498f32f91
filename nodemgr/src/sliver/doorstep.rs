//! Waiting for a socket that another process is about to make, without asking again and again.
//!
//! The kernel tells (inotify) when something is made or changed in the socket's directory. A socket has its name a moment before it takes
//! connections; should nothing be told after that moment, a look now and then finds it.

use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::net::unix::pipe;

/// Between looks that nothing caused.
const LOOK: Duration = Duration::from_millis(10);

/// A directory that is watched.
#[derive(Debug)]
pub struct Doorstep(pipe::Receiver);

impl Doorstep {
    /// Starts watching. To be called before the process that makes the socket is started.
    pub fn watch(directory: &Path) -> io::Result<Self> {
        let watcher = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        inotify::add_watch(&watcher, directory, WatchFlags::CREATE | WatchFlags::ATTRIB)?;
        // To tokio an inotify descriptor is what the reading end of a pipe is: readable, then read without waiting.
        Ok(Self(pipe::Receiver::from_owned_fd_unchecked(watcher)?))
    }

    /// Tries until it works.
    pub async fn open<T, F: Future<Output = io::Result<T>>>(
        self,
        mut attempt: impl FnMut() -> F,
    ) -> io::Result<T> {
        loop {
            match attempt().await {
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
                done => return done,
            }
            if let Ok(told) = tokio::time::timeout(LOOK, self.0.readable()).await {
                told?;
                while self.0.try_read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{UnixListener, UnixStream};

    use super::*;

    #[tokio::test]
    async fn a_socket_is_found_when_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let doorstep = Doorstep::watch(dir.path()).unwrap();
        let later = async {
            tokio::task::yield_now().await;
            std::fs::write(dir.path().join("another"), "").unwrap();
            tokio::task::yield_now().await;
            UnixListener::bind(&path).unwrap()
        };
        let (stream, _listener) = tokio::join!(doorstep.open(|| UnixStream::connect(&path)), later);
        stream.unwrap();
        Doorstep::watch(&dir.path().join("absent")).unwrap_err();
    }
}
