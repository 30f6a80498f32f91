//! Starting the command of a session: whose shell, which environment, which descriptors.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use commonage_nodemgr_api::exec::{Command as What, Pty, Start, WindowSize};
use rustix::pipe::PipeFlags;
use rustix::process::Pid;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::children::{Children, Exit};
use crate::sys;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_SHELL: &str = "/bin/sh";

/// Whose commands are run: root, as the sliver's `/etc/passwd` has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

impl Account {
    /// Root's entry in a passwd file; what is usual where it says nothing.
    pub fn of_root(passwd: &Path) -> Self {
        // The file is the tenant's and need not be text.
        let text = std::fs::read(passwd).unwrap_or_default();
        let account = Self::parse(&String::from_utf8_lossy(&text));
        if Path::new(&account.shell).exists() {
            account
        } else {
            Self { shell: DEFAULT_SHELL.into(), ..account }
        }
    }

    fn parse(passwd: &str) -> Self {
        let mut fields =
            passwd.lines().find(|line| line.starts_with("root:")).unwrap_or_default().split(':').skip(5);
        let mut field = |default: &str| {
            fields.next().map(str::trim).filter(|f| f.starts_with('/')).unwrap_or(default).to_owned()
        };
        Self { home: field("/root"), shell: field(DEFAULT_SHELL) }
    }

    /// Gives a command this account's environment, and no other.
    pub fn environment(&self, command: &mut Command) {
        command.env_clear().env("PATH", PATH).env("HOME", &self.home).env("SHELL", &self.shell);
        command.env("USER", "root").env("LOGNAME", "root").env("LANG", "C.UTF-8");
    }

    /// The command as asked for, without descriptors.
    fn command(&self, start: &Start) -> io::Result<Command> {
        let mut command = match &start.command {
            What::Shell => {
                let mut shell = Command::new(&self.shell);
                // A leading hyphen makes it a login shell.
                let name =
                    Path::new(&self.shell).file_name().unwrap_or_default().to_string_lossy().into_owned();
                shell.arg0(format!("-{name}"));
                shell
            }
            What::Line(line) => {
                let mut shell = Command::new(&self.shell);
                shell.arg("-c").arg(line);
                shell
            }
            What::Argv(argv) => {
                let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "the command is empty");
                let (program, arguments) = argv.split_first().ok_or_else(invalid)?;
                let mut command = Command::new(program);
                command.args(arguments);
                command
            }
        };
        self.environment(&mut command);
        if let Some(pty) = &start.pty {
            command.env("TERM", &pty.term);
        }
        for (name, value) in &start.env {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                let why = format!("{name:?} cannot be in an environment");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
            }
            command.env(name, value);
        }
        let enterable = rustix::fs::access(&self.home, rustix::fs::Access::EXEC_OK).is_ok();
        command.current_dir(if enterable { &self.home } else { "/" });
        Ok(command)
    }
}

/// A command that runs. Descriptors are non-blocking; each is gone once it is of no more use.
#[derive(Debug)]
pub struct Process {
    /// Leader of a session of its own.
    pub pid: Pid,
    /// Its end.
    pub exit: Exit,
    /// Its standard input, or the terminal's.
    pub input: Option<OwnedFd>,
    /// Its standard output, or the terminal's.
    pub output: Option<OwnedFd>,
    /// Its standard error, unless that is the terminal.
    pub error: Option<OwnedFd>,
    /// The terminal, if it runs on one.
    pub terminal: Option<OwnedFd>,
}

/// Starts what `start` asks for.
///
/// # Errors
/// It cannot be started; the message is for whoever asked.
pub fn spawn(start: &Start, account: &Account, children: &Children) -> io::Result<Process> {
    let mut command = account.command(start)?;
    sys::in_new_session(&mut command, start.pty.is_some());
    let process = match &start.pty {
        Some(pty) => on_terminal(&mut command, pty, children),
        None => on_pipes(&mut command, children),
    };
    process
        .map_err(|e| io::Error::new(e.kind(), format!("cannot run {}: {e}", command.get_program().display())))
}

fn on_pipes(command: &mut Command, children: &Children) -> io::Result<Process> {
    let (stdin, input) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (output, stdout) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (error, stderr) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    for end in [&input, &output, &error] {
        rustix::io::ioctl_fionbio(end, true)?;
    }
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    let child = children.spawn(command);
    // Our copies of the command's ends must go, or the pipes never end.
    close_stdio(command);
    let child = child?;
    Ok(Process {
        pid: child.pid,
        exit: child.exit,
        input: Some(input),
        output: Some(output),
        error: Some(error),
        terminal: None,
    })
}

fn on_terminal(command: &mut Command, pty: &Pty, children: &Children) -> io::Result<Process> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let terminal = rustix::pty::openpt(flags)?;
    rustix::pty::grantpt(&terminal)?;
    rustix::pty::unlockpt(&terminal)?;
    resize(&terminal, pty.size)?;
    let inside = rustix::pty::ioctl_tiocgptpeer(&terminal, flags)?;
    rustix::io::ioctl_fionbio(&terminal, true)?;
    let (input, output) = (terminal.try_clone()?, terminal.try_clone()?);
    command.stdin(inside.try_clone()?).stdout(inside.try_clone()?).stderr(inside);
    let child = children.spawn(command);
    close_stdio(command);
    let child = child?;
    Ok(Process {
        pid: child.pid,
        exit: child.exit,
        input: Some(input),
        output: Some(output),
        error: None,
        terminal: Some(terminal),
    })
}

fn close_stdio(command: &mut Command) {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
}

/// Gives a terminal a size.
///
/// # Errors
/// It is none.
pub fn resize(terminal: &OwnedFd, size: WindowSize) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal.as_fd(), size)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwd_may_say_anything() {
        let parse = |text: &str| {
            let Account { home, shell } = Account::parse(text);
            (home, shell)
        };
        let usual = ("/root".to_owned(), "/bin/sh".to_owned());
        assert_eq!(
            parse("daemon:x:1\nroot:x:0:0:root:/home/r:/bin/bash\n"),
            ("/home/r".into(), "/bin/bash".into())
        );
        for text in [
            "",
            "root",
            "root:",
            "root:x:0:0:root",
            "root:x:0:0:root::",
            "root:x:0:0::rel:nologin",
            "toor:x:0:0::/a:/b",
        ] {
            assert_eq!(parse(text), usual, "{text:?}");
        }
        assert_eq!(Account::of_root(Path::new("/nonexistent")).home, "/root");
    }

    #[test]
    fn environments_that_cannot_be_are_refused() {
        let account = Account { home: "/".into(), shell: "/bin/sh".into() };
        for (name, value) in [("", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "x\0")] {
            let start = Start { env: vec![(name.into(), value.into())], ..Start::default() };
            assert!(account.command(&start).is_err(), "{name:?}={value:?}");
        }
        assert!(account.command(&Start { command: What::Argv(vec![]), ..Start::default() }).is_err());
    }
}
