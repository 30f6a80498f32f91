//! `sliver-vmm ctl`: asks and tells a running machine through its control socket, by hand. It opens the files and passes their descriptors, so
//! the machine need not reach them.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use commonage_vmm::control::channel;
use commonage_vmm_api::{Request, Response};

use super::client::{Client, ClientError};
use super::{show, terminal};

/// Names of a snapshot's files in its directory.
pub const STATE: &str = "state";
/// See [`STATE`].
pub const MEMORY: &str = "memory";
/// The hint of which pages to copy at once: written by `touched`, used if it is there.
pub const TOUCHED: &str = "touched";

/// Asks and tells a running machine.
///
/// Exit status: 0 done, 1 refused or failed, 2 used wrongly; of `wait` and `stop` the machine's own (see `sliver-vmm run --help`).
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sliver-vmm ctl /tmp/vm.sock status\n  \
    sliver-vmm ctl /tmp/vm.sock pause && sliver-vmm ctl /tmp/vm.sock snapshot /tmp/snapshot\n  \
    sliver-vmm ctl /tmp/vm.sock stop --grace 10")]
pub struct Arguments {
    /// The machine's control socket
    socket: PathBuf,
    /// Prints answers as the machine gives them, in JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// How is it?
    Status,
    /// What has it done, and what does it take?
    Metrics,
    /// Stops all processors between two instructions
    Pause,
    /// Lets a paused machine go on
    Resume,
    /// Writes the whole paused machine to files `state` and `memory` in a directory, for `sliver-vmm run --restore`
    Snapshot {
        /// The directory; made if there is none
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Writes which pages of memory a restored machine has to itself: as `touched` beside the snapshot it saves the next one page faults
    Touched {
        /// The file
        file: PathBuf,
    },
    /// Asks the guest to leave itself this much memory
    Balloon {
        /// Memory for the guest
        #[arg(value_name = "MIB")]
        memory_mib: u32,
    },
    /// Ends the machine, and waits for its end
    Stop {
        /// Asks the guest to shut down first, and gives it this long
        #[arg(long, value_name = "SECONDS", default_value_t = 0)]
        grace: u32,
    },
    /// Makes this terminal the machine's console; Ctrl-] detaches
    Console,
    /// Accepts the guest's vsock connections to the host in the place of who does so now, and prints what they say
    Accept,
    /// Waits for the machine's end, and tells why
    Wait,
}

/// Does it.
pub fn run(arguments: Arguments) -> ExitCode {
    let Arguments { socket, json, command } = arguments;
    match execute(&socket, command) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(response)) => {
            match serde_json::to_string(&response) {
                Ok(text) if json => show::print(&text),
                _ => show::print(&show::response(&response)),
            }
            match response {
                Response::Exited { reason, .. } => ExitCode::from(reason.code() as u8),
                _ => ExitCode::SUCCESS,
            }
        }
        Err(error) => {
            match serde_json::to_string(&Response::Error { message: error.to_string() }) {
                Ok(text) if json => show::print(&text),
                _ => eprintln!("sliver-vmm: {error}"),
            }
            ExitCode::FAILURE
        }
    }
}

/// The last answer, if there is one to be shown.
fn execute(socket: &Path, command: Command) -> Result<Option<Response>, ClientError> {
    let mut client = Client::connect(socket)?;
    let response = match command {
        Command::Status => client.ask(&Request::Status, &[])?,
        Command::Metrics => client.ask(&Request::Metrics, &[])?,
        Command::Pause => client.ask(&Request::Pause, &[])?,
        Command::Resume => client.ask(&Request::Resume, &[])?,
        Command::Balloon { memory_mib } => client.ask(&Request::Balloon { memory_mib }, &[])?,
        Command::Wait => client.ask(&Request::Wait, &[])?,
        Command::Snapshot { directory } => snapshot(&mut client, &directory)?,
        Command::Touched { file } => {
            let unfinished = Unfinished::create(&file)?;
            let response = client.ask(&Request::Touched, &[unfinished.file.as_fd()])?;
            unfinished.finish()?;
            response
        }
        Command::Stop { grace } => {
            client.send(&Request::Wait, &[])?;
            let grace_ms = grace.saturating_mul(1000);
            match client.ask(&Request::Stop { grace_ms }, &[])? {
                Response::Stopping => client.answer()?,
                other => return Err(ClientError::Unexpected(format!("{other:?}"))),
            }
        }
        Command::Accept => {
            client.send(&Request::Accept, &[])?;
            return accept(client.into_parts().1);
        }
        Command::Console => {
            match client.ask(&Request::Console, &[])? {
                Response::Console => {}
                other => return Err(ClientError::Unexpected(format!("{other:?}"))),
            }
            let (first, stream) = client.into_parts();
            terminal::attach(&first, stream).map_err(ClientError::Terminal)?;
            return Ok(None);
        }
    };
    Ok(Some(response))
}

fn snapshot(client: &mut Client, directory: &Path) -> Result<Response, ClientError> {
    let failed =
        |source| ClientError::File { what: "make the directory", path: directory.to_owned(), source };
    std::fs::create_dir_all(directory).map_err(failed)?;
    let (state, memory) =
        (Unfinished::create(&directory.join(STATE))?, Unfinished::create(&directory.join(MEMORY))?);
    let response = client.ask(&Request::Snapshot, &[state.file.as_fd(), memory.file.as_fd()])?;
    memory.finish()?;
    state.finish()?;
    Ok(response)
}

/// Prints what the guest's connections say, each with its port before its lines, until the machine ends or another client accepts.
fn accept(stream: UnixStream) -> Result<Option<Response>, ClientError> {
    loop {
        let (mut line, mut descriptors) = (vec![0; 4096], Vec::new());
        let count = channel::receive(&stream, &mut line, &mut descriptors).map_err(ClientError::Broken)?;
        if count == 0 {
            return Ok(None);
        }
        match serde_json::from_slice(line.get(..count).unwrap_or_default()) {
            Ok(Response::Connection { port }) => {
                show::print(&format!("{port}: connected"));
                for connection in descriptors {
                    std::thread::spawn(move || print_lines(port, connection.into()));
                }
            }
            Ok(Response::Error { message }) => return Err(ClientError::Refused(message)),
            _ => return Err(ClientError::Unexpected(String::from_utf8_lossy(&line).into_owned())),
        }
    }
}

fn print_lines(port: u32, connection: UnixStream) {
    let mut reader = BufReader::new(connection);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        show::print(&format!("{port}: {}", String::from_utf8_lossy(&line).trim_end()));
        line.clear();
    }
    show::print(&format!("{port}: ended"));
}

/// A file that has its name only once it is whole: machines that run from an old snapshot of the same name keep theirs.
struct Unfinished {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    finished: bool,
}

impl Unfinished {
    fn create(path: &Path) -> Result<Self, ClientError> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}", std::process::id()));
        let temporary = PathBuf::from(temporary);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&temporary);
        let failed = |source| ClientError::File { what: "create", path: temporary.clone(), source };
        Ok(Self { file: file.map_err(failed)?, temporary, path: path.to_owned(), finished: false })
    }

    fn finish(mut self) -> Result<(), ClientError> {
        let failed = |source| ClientError::File { what: "name", path: self.path.clone(), source };
        std::fs::rename(&self.temporary, &self.path).map_err(failed)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished {
            let _ = std::fs::remove_file(&self.temporary); // it is of no use; if it stays, it harms nobody
        }
    }
}

#[cfg(test)]
#[path = "ctl_test.rs"]
mod tests;
