//! The conversation with the node manager, as in [`commonage_nodemgr_api::guest`].
//!
//! What has happened outlives each connection: after the node manager restarted, the next hello tells it all. A report is
//! either written to the connection that is up or part of the next hello; the lock around both makes sure that none falls between.
//! One thread waits for connections and for lines; whatever it is told to do, it does before it listens again.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use commonage_init::error::Context as _;
use commonage_init::poll;
use commonage_nodemgr_api::guest::{CONTROL_PORT, FromGuest, FromHost, Identity, Knock, MAX_LINE};
use jiff::Timestamp;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

use crate::log;

/// A host that takes nothing for so long is not there.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes read at once. An identity without files is about one of these.
const CHUNK: usize = 2048;
/// Room for a line that is kept from one to the next, bytes.
const KEPT: usize = 64 * 1024;

/// What the node manager can make a sliver do.
pub trait Actions {
    /// Applies the identity; commands may be run from then on.
    ///
    /// # Errors
    /// What could not be applied.
    fn apply(&mut self, identity: &Identity) -> Result<(), String>;
    /// Starts the boot script, whose end is told to `progress`.
    fn start_boot_script(&mut self, script: &str, progress: &Progress);
    /// The machine was saved and goes on.
    fn resume(&mut self, now: Timestamp, entropy: &[u8]);
}

/// What has happened so far. Clones are the same.
#[derive(Clone, Default)]
pub struct Progress(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    configured: bool,
    boot_script_exit: Option<i32>,
    /// The connection that is up.
    host: Option<Box<dyn Write + Send>>,
}

impl Progress {
    /// The boot script has ended.
    pub fn boot_script_done(&self, exit: i32) {
        let mut state = self.lock();
        state.boot_script_exit = Some(exit);
        state.report(&FromGuest::BootScriptDone { exit });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn report(&mut self, message: &FromGuest) {
        if let Some(host) = &mut self.host
            && let Err(e) = send(host, message)
        {
            log(format_args!("the node manager went away: {e}"));
            self.host = None;
        }
    }
}

/// Where the node manager will connect.
///
/// # Errors
/// The kernel has no vsock, or the port is taken.
pub fn listen() -> commonage_init::Result<VsockListener> {
    VsockListener::bind_with_cid_port(VMADDR_CID_ANY, CONTROL_PORT)
        .what(|| format!("listen on vsock port {CONTROL_PORT}"))
}

/// Tells the host, if it listens, that the machine can be talked to. A host that does not listen knows already.
pub fn knock() {
    let knock = || -> io::Result<()> {
        let mut host = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, CONTROL_PORT)?;
        let mut line = serde_json::to_vec(&Knock::Waiting)?;
        line.push(b'\n');
        host.write_all(&line)
    };
    // Nobody accepts where a person runs the machine by hand.
    let _ = knock();
}

/// Serves the node manager. Never returns.
pub fn serve(listener: &VsockListener, actions: &mut impl Actions, progress: &Progress) -> ! {
    let mut connection: Option<Connection<VsockStream>> = None;
    loop {
        let mut fds = vec![listener.as_fd()];
        fds.extend(connection.as_ref().map(|c| c.stream.as_fd()));
        match poll::wait(&fds, None).as_deref() {
            // A new connection takes the place of the old: the node manager knows which one it means.
            Ok([true, ..]) => match accept(listener, progress) {
                Ok(Some(new)) => connection = Some(new),
                Ok(None) => {}
                Err(e) => {
                    log(format_args!("cannot take a connection of the node manager's: {e}"));
                    // Out of descriptors or memory: going on at once would only burn the processor.
                    std::thread::sleep(Duration::from_millis(100));
                }
            },
            Ok(_) => {
                let Some(current) = &mut connection else { continue };
                match current.advance(actions, progress) {
                    Ok(true) => continue,
                    Ok(false) => {}
                    Err(e) => log(format_args!("the connection to the node manager broke: {e}")),
                }
                (connection, progress.lock().host) = (None, None);
            }
            Err(e) => {
                log(e);
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn accept(listener: &VsockListener, progress: &Progress) -> io::Result<Option<Connection<VsockStream>>> {
    let (stream, peer) = listener.accept()?;
    // A process of the sliver itself, by loopback, has no say here.
    if peer.cid() != VMADDR_CID_HOST {
        return Ok(None);
    }
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    let write = stream.try_clone()?;
    Connection::open(stream, write, progress).map(Some)
}

/// One connection, and the part of a line that has come.
struct Connection<S> {
    stream: S,
    line: Vec<u8>,
}

impl<S: Read> Connection<S> {
    /// Says hello; what is reported from now on goes to `write`, the same stream.
    fn open(stream: S, write: impl Write + Send + 'static, progress: &Progress) -> io::Result<Self> {
        let mut state = progress.lock();
        let hello =
            FromGuest::Hello { configured: state.configured, boot_script_exit: state.boot_script_exit };
        let mut host: Box<dyn Write + Send> = Box::new(write);
        send(&mut host, &hello)?;
        state.host = Some(host);
        Ok(Self { stream, line: Vec::new() })
    }

    /// Reads once and does what the lines that are complete say; whether the host is still there.
    fn advance(&mut self, actions: &mut impl Actions, progress: &Progress) -> io::Result<bool> {
        let mut chunk = [0; CHUNK];
        let read = match self.stream.read(&mut chunk) {
            Ok(0) if self.line.is_empty() => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(e) => return Err(e),
        };
        for piece in chunk.get(..read).unwrap_or_default().split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(piece);
            if self.line.len() > MAX_LINE {
                return Err(io::Error::other(format!("a line is longer than {MAX_LINE} bytes")));
            }
            if self.line.last() == Some(&b'\n') {
                let message = serde_json::from_slice(&self.line)?;
                self.line.clear();
                self.line.shrink_to(KEPT);
                obey(message, actions, progress);
            }
        }
        Ok(true)
    }
}

fn obey(message: FromHost, actions: &mut impl Actions, progress: &Progress) {
    let identity = match message {
        FromHost::Welcome => return,
        FromHost::Resumed { now, entropy } => return actions.resume(now, &entropy.0),
        FromHost::Identity(identity) => identity,
    };
    {
        let mut state = progress.lock();
        if state.configured {
            // It forgot. A sliver never changes its identity, so it is the same.
            state.report(&FromGuest::Configured);
            if let Some(exit) = state.boot_script_exit {
                state.report(&FromGuest::BootScriptDone { exit });
            }
            return;
        }
    }
    match actions.apply(&identity) {
        Ok(()) => {
            {
                let mut state = progress.lock();
                state.configured = true;
                state.report(&FromGuest::Configured);
            }
            actions.start_boot_script(&identity.boot_script, progress);
        }
        Err(message) => {
            log(format_args!("the identity cannot be applied: {message}"));
            progress.lock().report(&FromGuest::Failed { message });
        }
    }
}

fn send(to: &mut Box<dyn Write + Send>, message: &FromGuest) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[derive(Default)]
    struct Told {
        refuse: bool,
        applied: u32,
        scripts: Vec<String>,
        resumed: Vec<(Timestamp, Vec<u8>)>,
    }

    impl Actions for Told {
        fn apply(&mut self, _: &Identity) -> Result<(), String> {
            self.applied += 1;
            if self.refuse { Err("no eth0".into()) } else { Ok(()) }
        }
        fn start_boot_script(&mut self, script: &str, progress: &Progress) {
            self.scripts.push(script.to_owned());
            progress.boot_script_done(5);
        }
        fn resume(&mut self, now: Timestamp, entropy: &[u8]) {
            self.resumed.push((now, entropy.to_owned()));
        }
    }

    const IDENTITY: &str = concat!(
        r#"{"type":"identity","slice":"a_b","node":"3f0e4a52-0000-4000-8000-000000000001","mac":[2,0,0,1,134,161],"#,
        r#""disk_bytes":1073741824,"address":"192.0.2.5","dns":[],"ports":{"first":20000,"last":20063},"ssh_keys":[],"#,
        r#""boot_script":"true","files":[],"now":"2024-01-01T00:00:00Z","entropy":""}"#,
        "\n"
    );

    /// A connection and the host's end of it.
    fn connect(progress: &Progress) -> (Connection<UnixStream>, UnixStream) {
        let (host, guest) = UnixStream::pair().unwrap();
        (Connection::open(guest.try_clone().unwrap(), guest, progress).unwrap(), host)
    }

    /// What the guest says when the host says `lines` and closes.
    fn talk(lines: &str, told: &mut Told, progress: &Progress) -> (String, io::Result<()>) {
        let (mut connection, mut host) = connect(progress);
        let mut writer = host.try_clone().unwrap();
        let lines = lines.to_owned();
        let writer = std::thread::spawn(move || {
            // The guest may stop listening in the middle.
            let _ = writer.write_all(lines.as_bytes());
            let _ = writer.shutdown(std::net::Shutdown::Write);
        });
        let done = loop {
            match connection.advance(told, progress) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        drop(connection);
        progress.lock().host = None;
        writer.join().unwrap();
        let mut said = String::new();
        // Unread bytes make its end a reset.
        let _ = host.read_to_string(&mut said);
        (said, done)
    }

    #[test]
    fn first_start_then_a_node_manager_that_restarts() {
        let (mut told, progress) = (Told::default(), Progress::default());
        let (said, done) = talk(IDENTITY, &mut told, &progress);
        done.unwrap();
        let wanted = concat!(
            r#"{"type":"hello","configured":false,"boot_script_exit":null}"#,
            "\n",
            r#"{"type":"configured"}"#,
            "\n",
            r#"{"type":"boot-script-done","exit":5}"#,
            "\n",
        );
        assert_eq!(said, wanted);
        let resumed = r#"{"type":"resumed","now":"2024-02-01T00:00:00Z","entropy":"AQID"}"#;
        let (said, _) = talk(&format!("{{\"type\":\"welcome\"}}\n{resumed}\n"), &mut told, &progress);
        assert_eq!(said, "{\"type\":\"hello\",\"configured\":true,\"boot_script_exit\":5}\n");
        assert_eq!(told.resumed, [("2024-02-01T00:00:00Z".parse().unwrap(), vec![1, 2, 3])]);
        // It is never applied twice, even when the node manager lost its memory.
        let (said, _) = talk(IDENTITY, &mut told, &progress);
        assert!(
            said.ends_with("{\"type\":\"configured\"}\n{\"type\":\"boot-script-done\",\"exit\":5}\n"),
            "{said}"
        );
        assert_eq!((told.applied, told.scripts.len()), (1, 1));
    }

    #[test]
    fn a_new_connection_gets_what_is_reported_from_then_on() {
        let progress = Progress::default();
        let (_old, mut old_host) = connect(&progress);
        let (_new, mut new_host) = connect(&progress);
        progress.boot_script_done(7);
        drop((_old, _new));
        progress.lock().host = None;
        let mut said = [String::new(), String::new()];
        old_host.read_to_string(&mut said[0]).unwrap();
        new_host.read_to_string(&mut said[1]).unwrap();
        let hello = "{\"type\":\"hello\",\"configured\":false,\"boot_script_exit\":null}\n";
        assert_eq!(
            said,
            [hello.to_owned(), format!("{hello}{{\"type\":\"boot-script-done\",\"exit\":7}}\n")]
        );
    }

    #[test]
    fn what_fails_is_told_and_may_be_tried_again() {
        let (mut told, progress) = (Told { refuse: true, ..Told::default() }, Progress::default());
        let (said, _) = talk(IDENTITY, &mut told, &progress);
        assert!(said.ends_with("{\"type\":\"failed\",\"message\":\"no eth0\"}\n"), "{said}");
        told.refuse = false;
        let (said, _) = talk(IDENTITY, &mut told, &progress);
        assert!(said.contains("\"configured\":false") && said.contains("boot-script-done"), "{said}");
    }

    #[test]
    fn nonsense_ends_the_connection() {
        let (mut told, progress) = (Told::default(), Progress::default());
        for nonsense in
            ["what?\n", "{\"type\":\"welcome\"", "{\"type\":\"shutdown\"}\n", &"x".repeat(MAX_LINE + 1)]
        {
            assert!(talk(nonsense, &mut told, &progress).1.is_err(), "{:.40}", nonsense);
        }
        assert_eq!(told.applied, 0);
    }

    #[test]
    fn lines_may_come_in_any_pieces() {
        let (mut told, progress) = (Told::default(), Progress::default());
        let (mut connection, mut host) = connect(&progress);
        for byte in IDENTITY.as_bytes().chunks(7) {
            host.write_all(byte).unwrap();
            assert!(connection.advance(&mut told, &progress).unwrap());
        }
        assert_eq!(told.applied, 1);
    }
}
