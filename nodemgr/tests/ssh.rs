//! The SSH front door, asked by the real OpenSSH client and bridged to the exec server that runs in slivers.
//!
//! The "sliver" is this machine: the same code serves a Unix socket that speaks the vsock convention. Whatever a test waits for is
//! an event (an end of file, an exit), never a time.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "all of it is test code")]

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use commonage_nodemgr::directory::{Directory, Login};
use commonage_nodemgr::ssh::{HostKey, serve};
use commonage_nodemgr_api::http::SliverState;
use commonage_sliver_init::children::Children;
use commonage_sliver_init::{exec, sys};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

const SLICE: &str = "princeton_codeen";

/// A directory of one slice whose keys may change.
#[derive(Clone)]
struct OneSlice {
    keys: Arc<Mutex<Vec<String>>>,
    vsock: PathBuf,
}

impl Directory for OneSlice {
    fn login(&self, slice: &str) -> Option<Login> {
        let ssh_keys = self.keys.lock().unwrap().clone();
        (slice == SLICE).then(|| Login {
            ssh_keys,
            vsock: self.vsock.clone(),
            state: SliverState::Running { boot_script_exit: 0 },
        })
    }
}

/// A front door with a sliver behind it, and a client's files.
struct Door {
    address: SocketAddr,
    dir: tempfile::TempDir,
    slice: OneSlice,
    _runtime: tokio::runtime::Runtime,
}

fn generate_key(path: &Path) -> String {
    let done = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "a comment", "-f"])
        .arg(path)
        .status();
    assert!(done.unwrap().success());
    std::fs::read_to_string(path.with_extension("pub")).unwrap()
}

/// Answers like a machine's vsock and hands each connection to the exec server.
fn sliver(listener: UnixListener) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { return };
        std::thread::spawn(move || {
            let mut line = Vec::new();
            while line.last() != Some(&b'\n') {
                let mut byte = [0];
                stream.read_exact(&mut byte)?;
                line.extend(byte);
            }
            assert_eq!(line, b"CONNECT 808\n");
            stream.write_all(b"OK 808\n")?;
            exec::serve_connection(OwnedFd::from(stream), &Children::own())
        });
    }
}

fn open() -> Door {
    let dir = tempfile::tempdir().unwrap();
    let vsock = dir.path().join("vsock.sock");
    let listener = UnixListener::bind(&vsock).unwrap();
    std::thread::spawn(move || sliver(listener));
    let key = generate_key(&dir.path().join("key"));
    let slice = OneSlice { keys: Arc::new(Mutex::new(vec![key])), vsock };
    let host_key = HostKey::load_or_create(&dir.path().join("host_key")).unwrap();
    let public = host_key.public_openssh();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(serve(listener, host_key, slice.clone()));
    std::fs::write(dir.path().join("known_hosts"), format!("[127.0.0.1]:{} {public}\n", address.port()))
        .unwrap();
    Door { address, dir, slice, _runtime: runtime }
}

impl Door {
    fn ssh_as(&self, user: &str, key: &str) -> Command {
        let mut ssh = Command::new("ssh");
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        ssh.args(["-F", "/dev/null", "-p", &self.address.port().to_string(), "-i", &path(key), "-l", user]);
        for option in [
            "IdentitiesOnly=yes".to_owned(),
            "IdentityAgent=none".to_owned(),
            "StrictHostKeyChecking=yes".to_owned(),
            format!("UserKnownHostsFile={}", path("known_hosts")),
            "GlobalKnownHostsFile=/dev/null".to_owned(),
            "LogLevel=INFO".to_owned(),
        ] {
            ssh.args(["-o", &option]);
        }
        ssh
    }

    /// `ssh` with options before the host and a command after it.
    fn ssh(&self, options: &[&str], command: &[&str]) -> Command {
        let mut ssh = self.ssh_as(SLICE, "key");
        ssh.args(options).arg("127.0.0.1").args(command).stdin(Stdio::null());
        ssh
    }

    fn run(&self, options: &[&str], command: &[&str]) -> Output {
        self.ssh(options, command).output().unwrap()
    }

    fn fifo(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        path
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
#[ignore = "needs the OpenSSH client"]
fn commands_run_and_tell_their_status() {
    let door = open();
    let uname = door.run(&[], &["uname", "-s"]);
    assert_eq!((text(&uname.stdout), uname.status.code()), ("Linux\n".into(), Some(0)), "{uname:?}");
    assert_eq!(text(&uname.stderr), "", "nothing but the command's own output");
    let both = door.run(&[], &["echo out; echo err >&2; exit 42"]);
    assert_eq!(
        (text(&both.stdout), text(&both.stderr), both.status.code()),
        ("out\n".into(), "err\n".into(), Some(42))
    );
    assert_eq!(door.run(&[], &["kill -TERM $$"]).status.code(), Some(143));
    let env = door.run(&["-o", "SetEnv=GREETING=hello"], &["echo $GREETING $USER $PATH; pwd"]);
    assert!(text(&env.stdout).starts_with("hello root /usr/local/sbin:"), "{env:?}");
    let missing = door.run(&[], &["/nonexistent/program"]);
    assert_eq!(missing.status.code(), Some(127));
}

#[test]
#[ignore = "needs the OpenSSH client"]
fn five_megabytes_go_there_and_back() {
    let door = open();
    let bytes: Vec<u8> = (0..5_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut ssh = door.ssh(&[], &["cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = ssh.stdin.take().unwrap();
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| stdin.write_all(&bytes).map(|()| drop(stdin)).unwrap());
        ssh.stdout.take().unwrap().read_to_end(&mut back).unwrap();
    });
    assert!(ssh.wait().unwrap().success());
    assert!(back == bytes, "{} bytes came back, or others", back.len());
}

#[test]
#[ignore = "needs the OpenSSH client"]
fn more_input_than_is_kept_waits_for_a_command_that_writes_first() {
    let door = open();
    // Four times what the front door keeps, to a command that writes 3 MB, reads nothing until told, and then reads it all.
    let go = door.fifo("go");
    let line = format!("head -c 3000000 /dev/zero; read x < {}; wc -c", go.display());
    let mut ssh = door.ssh(&[], &[&line]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = ssh.stdin.take().unwrap();
    let mut stdout = ssh.stdout.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(&vec![b'x'; 32 << 20]).unwrap());
        stdout.read_exact(&mut vec![0; 3_000_000]).unwrap();
        std::fs::write(&go, "go\n").unwrap();
        let mut count = String::new();
        stdout.read_to_string(&mut count).unwrap();
        assert_eq!(count.trim(), (32 << 20).to_string());
    });
    assert!(ssh.wait().unwrap().success());
}

#[test]
#[ignore = "needs the OpenSSH client"]
fn input_that_nobody_wants_holds_nothing_up() {
    let door = open();
    let zero = File::open("/dev/zero").unwrap();
    let done = door.ssh(&[], &["exit 3"]).stdin(zero).output().unwrap();
    assert_eq!(done.status.code(), Some(3), "{done:?}");
    let much = door.run(&[], &["head -c 20000000 /dev/zero"]);
    assert_eq!((much.stdout.len(), much.status.code()), (20_000_000, Some(0)));
}

/// A terminal for the client, as a person has one.
struct Terminal {
    master: OwnedFd,
    lines: BufReader<File>,
    ssh: Child,
}

impl Terminal {
    fn start(mut ssh: Command, cols: u16, rows: u16) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags).unwrap();
        rustix::pty::grantpt(&master).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
        let lines = BufReader::new(File::from(master.try_clone().unwrap()));
        let terminal = |slave: &OwnedFd| Stdio::from(slave.try_clone().unwrap());
        ssh.stdin(terminal(&slave)).stdout(terminal(&slave)).stderr(terminal(&slave));
        sys::in_new_session(&mut ssh, true);
        rustix::termios::tcsetwinsize(
            &master,
            Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 },
        )
        .unwrap();
        Self { master, lines, ssh: ssh.spawn().unwrap() }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn line_with(&mut self, wanted: &str) -> String {
        loop {
            let line = self.line();
            if line.contains(wanted) {
                return line;
            }
        }
    }

    fn type_in(&self, bytes: &[u8]) {
        rustix::io::write(&self.master, bytes).unwrap();
    }
}

#[test]
#[ignore = "needs the OpenSSH client"]
fn a_terminal_has_its_size_and_control_c_interrupts() {
    let door = open();
    let line = "stty size; trap 'stty size' WINCH; echo ready; while :; do read x && echo \"got $x\"; done";
    let mut terminal = Terminal::start(door.ssh(&["-tt"], &[line]), 101, 37);
    assert_eq!(terminal.line_with("37 "), "37 101");
    terminal.line_with("ready");
    let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&terminal.master, size).unwrap();
    terminal.type_in(b"hello\r");
    // The trap runs when the shell comes back from reading, so the order is not certain.
    let mut seen = vec![terminal.line_with(" "), terminal.line_with(" ")];
    seen.sort();
    assert_eq!(seen, ["24 80", "got hello"]);
    terminal.type_in(&[3]);
    assert_eq!(terminal.ssh.wait().unwrap().code(), Some(130));
}

#[test]
#[ignore = "needs the OpenSSH client"]
fn a_login_shell_is_interactive() {
    let door = open();
    let mut terminal = Terminal::start(door.ssh(&[], &[]), 80, 24);
    terminal.type_in(b"PS1=; echo $((40+2)); tty; echo $TERM.; exit 7\r");
    terminal.line_with("42");
    assert!(terminal.line().contains("/dev/pts/"));
    assert!(terminal.line().ends_with('.'));
    assert_eq!(terminal.ssh.wait().unwrap().code(), Some(7));
}

#[test]
#[ignore = "needs the OpenSSH client"]
fn strangers_are_refused_and_told_the_same() {
    let door = open();
    generate_key(&door.dir.path().join("other"));
    let mut said = Vec::new();
    for (user, key) in [(SLICE, "other"), ("princeton_nobody", "key"), ("root", "key")] {
        let refused =
            door.ssh_as(user, key).args(["127.0.0.1", "true"]).stdin(Stdio::null()).output().unwrap();
        assert_eq!(refused.status.code(), Some(255), "{refused:?}");
        let stderr = text(&refused.stderr);
        assert!(stderr.contains("or") && stderr.contains("has no sliver on this node"), "{stderr}");
        assert!(stderr.contains("Permission denied"), "{stderr}");
        said.push(stderr.replace(user, "SLICE"));
    }
    assert!(said.iter().all(|s| *s == said[0]), "{said:?}");
}

#[test]
#[ignore = "needs the OpenSSH client"]
fn subsystems_and_forwarding_are_refused() {
    let door = open();
    let sftp = door.run(&["-s"], &["sftp"]);
    assert_ne!(sftp.status.code(), Some(0));
    assert!(text(&sftp.stderr).contains("no subsystem sftp here"), "{sftp:?}");
    let direct = door.run(&["-W", "127.0.0.1:1"], &[]);
    assert!(text(&direct.stderr).contains("administratively prohibited"), "{direct:?}");
    let remote = door.run(&["-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1"], &["true"]);
    assert_eq!(remote.status.code(), Some(255), "{remote:?}");
    let x11 = door.run(&["-A", "-X"], &["echo agent=$SSH_AUTH_SOCK."]);
    assert_eq!(text(&x11.stdout), "agent=.\n");
}

#[test]
#[ignore = "needs the OpenSSH client"]
fn many_sessions_share_a_connection_and_keys_that_go_count_at_once() {
    let door = open();
    let socket = door.dir.path().join("mux").display().to_string();
    let control = format!("ControlPath={socket}");
    let mut master = door.ssh(&["-M", "-N", "-o", &control], &[]).stderr(Stdio::null()).spawn().unwrap();
    // The client has no event for "the socket is there": asking it is one.
    while !door.run(&["-O", "check", "-o", &control], &[]).status.success() {
        std::thread::yield_now();
    }
    let multiplexed = |command: &str| {
        door.run(&["-o", &control, "-o", "ControlMaster=no", "-o", "ProxyCommand=false"], &[command])
    };
    std::thread::scope(|scope| {
        // More in all than one connection may have at a time.
        for worker in 0..4 {
            let multiplexed = &multiplexed;
            scope.spawn(move || {
                for round in 0..8 {
                    let done = multiplexed(&format!("head -c 100000 /dev/zero; exit {}", worker * 8 + round));
                    assert_eq!(
                        (done.stdout.len(), done.status.code()),
                        (100_000, Some(worker * 8 + round)),
                        "{done:?}"
                    );
                }
            });
        }
    });
    door.slice.keys.lock().unwrap().clear();
    let refused = multiplexed("true");
    assert!(!refused.status.success() && text(&refused.stderr).contains("no longer"), "{refused:?}");
    assert!(door.run(&["-O", "exit", "-o", &control], &[]).status.success());
    master.wait().unwrap();
}

#[test]
#[ignore = "needs the OpenSSH client"]
fn a_client_that_goes_away_hangs_its_command_up() {
    for options in [&[][..], &["-tt"][..]] {
        let door = open();
        let fifo = door.fifo("held");
        let line = format!("exec sleep 1000 > {}", fifo.display());
        let mut ssh = door.ssh(options, &[&line]).spawn().unwrap();
        // Opens when the command does, ends when the command has ended.
        let mut held = File::open(&fifo).unwrap();
        ssh.kill().unwrap();
        ssh.wait().unwrap();
        assert_eq!(held.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
#[ignore = "needs the OpenSSH client"]
fn a_daemon_left_behind_does_not_hold_the_session() {
    let door = open();
    let fifo = door.fifo("daemon");
    let done = door.run(&[], &[&format!("(read x < {}) & echo started", fifo.display())]);
    assert_eq!((text(&done.stdout), done.status.code()), ("started\n".into(), Some(0)));
    // It is alive: somebody reads.
    std::fs::write(&fifo, "end\n").unwrap();
}

#[test]
#[ignore = "needs the OpenSSH client"]
fn a_sliver_that_does_not_answer_is_told() {
    let door = open();
    std::fs::remove_file(&door.slice.vsock).unwrap();
    let failed = door.run(&[], &["true"]);
    assert_eq!(failed.status.code(), Some(255));
    assert!(text(&failed.stderr).contains("commonage: cannot reach the sliver's machine"), "{failed:?}");
}

#[test]
fn a_guest_that_is_silent_or_hostile_is_no_sliver() {
    // Without SSH: what the exec server does with a host that does not speak its protocol.
    for said in [&b"\x63\0\0\0\0"[..], b"\x00\xff\xff\xff\xff", b"\x01\0\0\0\x01x", b"\x00\0\0\0\x02{}", b""]
    {
        let (mut host, guest) = UnixStream::pair().unwrap();
        host.write_all(said).unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        let served = exec::serve_connection(OwnedFd::from(guest), &Children::own());
        assert!(served.is_err() || said.is_empty(), "{said:?}");
        let mut answer = Vec::new();
        host.read_to_end(&mut answer).unwrap();
        assert!(answer.is_empty());
    }
}
