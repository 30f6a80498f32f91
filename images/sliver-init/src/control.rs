//! The conversation with the node manager, as in [`commonage_nodemgr_api::guest`].
//!
//! What has happened outlives each connection: after the node manager restarted, the next hello tells it all. A report is
//! either written to the connection that is up or part of the next hello; the lock around both makes sure that none falls between.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use commonage_nodemgr_api::guest::{CONTROL_PORT, FromGuest, FromHost, Identity, MAX_LINE};
use vsock::{VMADDR_CID_HOST, VsockStream};

use crate::log;

/// First and longest wait between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// A host that takes nothing for so long is not there.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// What the node manager can make a sliver do.
pub trait Actions {
    /// Applies the identity; commands may be run from then on.
    ///
    /// # Errors
    /// What could not be applied.
    fn apply(&self, identity: &Identity) -> Result<(), String>;
    /// Starts the boot script, whose end is told to `progress`.
    fn start_boot_script(&self, script: &str, progress: &Progress);
    /// Ends the machine.
    fn shut_down(&self);
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

/// Connects to the node manager, again and again, and does what it says. Never returns.
pub fn run(actions: &impl Actions, progress: &Progress) -> ! {
    let mut wait = BACKOFF.0;
    loop {
        match connect() {
            Ok((read, write)) => {
                wait = BACKOFF.0;
                match converse(read, write, actions, progress) {
                    Ok(()) => log("the node manager closed the connection"),
                    Err(e) => log(format_args!("the connection to the node manager broke: {e}")),
                }
            }
            Err(e) if wait == BACKOFF.0 => {
                log(format_args!("the node manager does not answer ({e}); trying again"))
            }
            Err(_) => {}
        }
        std::thread::sleep(wait);
        wait = (wait * 2).min(BACKOFF.1);
    }
}

fn connect() -> io::Result<(VsockStream, VsockStream)> {
    let stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, CONTROL_PORT)?;
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    Ok((stream.try_clone()?, stream))
}

/// One connection, until it ends.
fn converse(
    read: impl Read,
    write: impl Write + Send + 'static,
    actions: &impl Actions,
    progress: &Progress,
) -> io::Result<()> {
    {
        let mut state = progress.lock();
        let hello =
            FromGuest::Hello { configured: state.configured, boot_script_exit: state.boot_script_exit };
        let mut host: Box<dyn Write + Send> = Box::new(write);
        send(&mut host, &hello)?;
        state.host = Some(host);
    }
    let done = listen(read, actions, progress);
    progress.lock().host = None;
    done
}

fn listen(read: impl Read, actions: &impl Actions, progress: &Progress) -> io::Result<()> {
    let mut read = BufReader::new(read);
    while let Some(message) = next_message(&mut read)? {
        match message {
            FromHost::Welcome => {}
            FromHost::Shutdown => actions.shut_down(),
            FromHost::Identity(identity) => {
                if progress.lock().configured {
                    // It forgot. A sliver never changes its identity, so it is the same.
                    let mut state = progress.lock();
                    state.report(&FromGuest::Configured);
                    if let Some(exit) = state.boot_script_exit {
                        state.report(&FromGuest::BootScriptDone { exit });
                    }
                    continue;
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
        }
    }
    Ok(())
}

fn next_message(read: &mut impl BufRead) -> io::Result<Option<FromHost>> {
    let mut line = Vec::new();
    let longest = MAX_LINE as u64 + 1;
    read.by_ref().take(longest).read_until(b'\n', &mut line)?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => serde_json::from_slice(&line).map(Some).map_err(io::Error::other),
        Some(_) if line.len() as u64 == longest => {
            Err(io::Error::other(format!("a line is longer than {MAX_LINE} bytes")))
        }
        Some(_) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn send(to: &mut Box<dyn Write + Send>, message: &FromGuest) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[derive(Default)]
    struct Told {
        refuse: Cell<bool>,
        applied: Cell<u32>,
        scripts: RefCell<Vec<String>>,
        shut_down: Cell<bool>,
    }

    impl Actions for Told {
        fn apply(&self, _: &Identity) -> Result<(), String> {
            self.applied.set(self.applied.get() + 1);
            if self.refuse.get() { Err("no eth0".into()) } else { Ok(()) }
        }
        fn start_boot_script(&self, script: &str, progress: &Progress) {
            self.scripts.borrow_mut().push(script.to_owned());
            progress.boot_script_done(5);
        }
        fn shut_down(&self) {
            self.shut_down.set(true);
        }
    }

    const IDENTITY: &str = concat!(
        r#"{"type":"identity","slice":"a_b","node":"3f0e4a52-0000-4000-8000-000000000001","address":"192.0.2.5","dns":[],"#,
        r#""ports":{"first":20000,"last":20063},"ssh_keys":[],"boot_script":"true","files":[],"now":"2024-01-01T00:00:00Z","entropy":""}"#,
        "\n"
    );

    /// What the guest says when the host says `lines` and closes.
    fn talk(lines: &str, told: &Told, progress: &Progress) -> (String, io::Result<()>) {
        let (mut host, guest) = UnixStream::pair().unwrap();
        host.write_all(lines.as_bytes()).unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        let done = converse(guest.try_clone().unwrap(), guest, told, progress);
        let mut said = String::new();
        host.read_to_string(&mut said).unwrap();
        (said, done)
    }

    #[test]
    fn first_start_then_a_node_manager_that_restarts() {
        let (told, progress) = (Told::default(), Progress::default());
        let (said, done) = talk(IDENTITY, &told, &progress);
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
        let (said, _) = talk("{\"type\":\"welcome\"}\n{\"type\":\"shutdown\"}\n", &told, &progress);
        assert_eq!(said, "{\"type\":\"hello\",\"configured\":true,\"boot_script_exit\":5}\n");
        assert!(told.shut_down.get());
        // It is never applied twice, even when the node manager lost its memory.
        let (said, _) = talk(IDENTITY, &told, &progress);
        assert!(
            said.ends_with("{\"type\":\"configured\"}\n{\"type\":\"boot-script-done\",\"exit\":5}\n"),
            "{said}"
        );
        assert_eq!((told.applied.get(), told.scripts.borrow().len()), (1, 1));
    }

    #[test]
    fn what_fails_is_told_and_may_be_tried_again() {
        let (told, progress) = (Told::default(), Progress::default());
        told.refuse.set(true);
        let (said, _) = talk(IDENTITY, &told, &progress);
        assert!(said.ends_with("{\"type\":\"failed\",\"message\":\"no eth0\"}\n"), "{said}");
        told.refuse.set(false);
        let (said, _) = talk(IDENTITY, &told, &progress);
        assert!(said.contains("\"configured\":false") && said.contains("boot-script-done"), "{said}");
    }

    #[test]
    fn nonsense_ends_the_connection() {
        let (told, progress) = (Told::default(), Progress::default());
        assert!(talk("what?\n", &told, &progress).1.is_err());
        assert!(talk("{\"type\":\"welcome\"", &told, &progress).1.is_err());
        assert!(next_message(&mut BufReader::new(io::repeat(b'x'))).is_err());
    }
}
