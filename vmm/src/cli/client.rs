//! The control socket's other side, one request after the other.

use std::io::{self, BufRead, BufReader};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use commonage_vmm::control::channel::{self, Patience};
use commonage_vmm_api::{Request, Response};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "cannot connect to {path}: {source}; is the machine running, was it given this socket, and are you root?"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the machine does not answer: {0}; its process was ended, or dropped this client")]
    Broken(io::Error),
    /// The machine refuses.
    #[error("{0}")]
    Refused(String),
    /// Something here failed.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The terminal failed.
    #[error("terminal: {0}")]
    Terminal(io::Error),
    /// It answers something else.
    #[error("unexpected answer {0}; this sliver-vmm and the machine's are of different versions")]
    Unexpected(String),
}

/// A connection to a machine.
pub struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// Sends `request` with `descriptors` beside it.
    pub fn send(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        channel::send(self.reader.get_ref(), request, descriptors, Patience::Yes).map_err(ClientError::Broken)
    }

    /// The next answer; a refusal is an error.
    pub fn answer(&mut self) -> Result<Response, ClientError> {
        let mut line = String::new();
        let count = self.reader.read_line(&mut line).map_err(ClientError::Broken)?;
        if count == 0 {
            return Err(ClientError::Broken(io::ErrorKind::UnexpectedEof.into()));
        }
        match serde_json::from_str(&line) {
            Ok(Response::Error { message }) => Err(ClientError::Refused(message)),
            Ok(response) => Ok(response),
            Err(_) => Err(ClientError::Unexpected(line.trim_end().to_owned())),
        }
    }

    /// Asks and is answered.
    pub fn ask(
        &mut self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Response, ClientError> {
        self.send(request, descriptors)?;
        self.answer()
    }

    /// What was read beyond the last answer, and the connection.
    pub fn into_parts(self) -> (Vec<u8>, UnixStream) {
        (self.reader.buffer().to_vec(), self.reader.into_inner())
    }
}
