//! `sliver-vmm connect`: standard input and output become a connection to a port of the guest.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::client::ClientError;
use super::terminal;

/// Connects standard input and output to a vsock port of a guest.
#[derive(Args)]
#[command(after_help = "Example: sliver-vmm connect /tmp/vm.vsock 807")]
pub struct Arguments {
    /// The machine's vsock (`run --vsock`)
    socket: PathBuf,
    /// The guest's port
    port: u32,
}

/// Does it.
pub fn run(Arguments { socket, port }: Arguments) -> ExitCode {
    let connected = connect(&socket, port).and_then(|stream| {
        terminal::copy(&[], stream, None, |stream| stream.shutdown(Shutdown::Write))
            .map_err(ClientError::Broken)
    });
    match connected {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sliver-vmm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn connect(path: &Path, port: u32) -> Result<UnixStream, ClientError> {
    let mut stream =
        UnixStream::connect(path).map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).map_err(ClientError::Broken)?;
    // Byte by byte: what follows the line is the guest's.
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        match stream.read_exact(&mut byte) {
            Ok(()) => line.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(ClientError::Refused(format!("nobody in the guest listens on port {port}")));
            }
            Err(error) => return Err(ClientError::Broken(error)),
        }
        if line.len() > 64 {
            return Err(ClientError::Unexpected(String::from_utf8_lossy(&line).into_owned()));
        }
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_guest_that_answers_is_connected_and_one_that_does_not_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let machine = std::thread::spawn(move || {
            for answer in [&b"OK 7\nhello"[..], b""] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                assert_eq!(line, "CONNECT 7\n");
                stream.write_all(answer).unwrap();
            }
        });
        let mut said = String::new();
        connect(&path, 7).unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(said, "hello");
        let error = connect(&path, 7).unwrap_err().to_string();
        assert!(error.contains("port 7"), "{error}");
        machine.join().unwrap();
    }
}
