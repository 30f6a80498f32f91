//! Running the tenant's boot script, `rc.vinit`.
//!
//! It runs in a session of its own; what it and whatever it leaves behind write goes to the console and to a bounded log. It is done when
//! its own process has exited, even if daemons it left still hold its output.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::children::{Child, Children};
use crate::exec::process::Account;
use crate::{files, log, sys};

/// Where it lies.
const SCRIPT: &str = "/etc/rc.vinit";
/// Where its output is kept, from its last start only.
const LOG: &str = "/var/log/rc.vinit.log";
/// Largest log, bytes: a daemon that chatters for months must not fill the tenant's disk.
const MAX_LOG: u64 = 4 << 20;
/// What shells say when a command cannot be run.
const CANNOT_RUN: i32 = 126;

/// Runs `script`, and calls `done` with its exit status from another thread; at once with 0 if it is empty.
pub fn start(script: &str, children: &Children, done: impl FnOnce(i32) + Send + 'static) {
    if script.trim().is_empty() {
        // One of an earlier configuration must not look as if it were in force.
        let _ = std::fs::remove_file(SCRIPT);
        return done(0);
    }
    match spawn(Path::new("/"), script, children) {
        Ok((child, output)) => {
            let keep_all =
                move || keep(output, open_log(), OpenOptions::new().write(true).open("/dev/console").ok());
            let threads = crate::thread("boot-output", keep_all)
                .and_then(|()| crate::thread("boot-end", move || done(child.exit.wait())));
            if let Err(e) = threads {
                log(format_args!("cannot attend to the boot script, whose end will not be told: {e}"));
            }
        }
        Err(e) => {
            log(format_args!("cannot run the boot script: {e}"));
            done(CANNOT_RUN);
        }
    }
}

/// Starts the script laid under `root`; returns the read end of its output.
fn spawn(root: &Path, script: &str, children: &Children) -> io::Result<(Child, File)> {
    files::lay(root, SCRIPT, 0o755, script.as_bytes()).map_err(io::Error::other)?;
    let path = root.join(SCRIPT.trim_start_matches('/'));
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let mut command = if script.starts_with("#!") {
        Command::new(path)
    } else {
        let mut shell = Command::new("/bin/sh");
        shell.arg(path);
        shell
    };
    Account::of_root(Path::new("/etc/passwd")).environment(&mut command);
    command.current_dir("/").stdin(Stdio::null()).stdout(write.try_clone()?).stderr(write);
    sys::in_new_session(&mut command, false);
    let child = children.spawn(&mut command)?;
    Ok((child, read.into()))
}

fn open_log() -> Option<File> {
    std::fs::create_dir_all("/var/log")
        .and_then(|()| File::create(LOG))
        .map_err(|e| log(format_args!("cannot write {LOG}: {e}")))
        .ok()
}

/// Copies output until nobody can write any more. It is read in any case: a full pipe would stop the script.
fn keep(mut from: File, mut log: Option<File>, mut console: Option<File>) {
    let mut buffer = [0; 4096];
    let mut room = MAX_LOG;
    loop {
        let bytes = match from.read(&mut buffer) {
            Ok(n @ 1..) => buffer.get(..n).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            _ => return,
        };
        if let Some(console) = &mut console {
            let _ = console.write_all(bytes);
        }
        let Some(file) = &mut log else { continue };
        let size = bytes.len() as u64;
        let written = if size > room {
            file.write_all(b"\n[the log ends here: it is full]\n")
        } else {
            file.write_all(bytes)
        };
        if size > room || written.is_err() {
            log = None;
        }
        room = room.saturating_sub(size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str) -> (i32, String) {
        let dir = tempfile::tempdir().unwrap();
        let children = Children::own();
        let (child, mut output) = spawn(dir.path(), script, &children).unwrap();
        let exit = child.exit.wait();
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        (exit, text)
    }

    #[test]
    fn with_and_without_an_interpreter_line() {
        assert_eq!(run("echo out; echo err >&2; exit 3"), (3, "out\nerr\n".into()));
        assert_eq!(run("#!/bin/cat\nhello\n"), (0, "#!/bin/cat\nhello\n".into()));
        assert_eq!(run("kill -9 $$"), (137, String::new()));
    }

    #[test]
    fn it_is_done_although_a_daemon_holds_its_output() {
        let dir = tempfile::tempdir().unwrap();
        let children = Children::own();
        // The daemon waits for a file system event of ours, so its end is certain and never before ours.
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let script = format!("(read line < {}; echo late) & exit 7", fifo.display());
        let (child, mut output) = spawn(dir.path(), &script, &children).unwrap();
        assert_eq!(child.exit.wait(), 7);
        std::fs::write(&fifo, "go\n").unwrap();
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        assert_eq!(text, "late\n");
    }

    #[test]
    fn the_log_is_bounded_and_output_is_read_on() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let path = tempfile::NamedTempFile::new().unwrap();
        let file = path.reopen().unwrap();
        let writer =
            std::thread::spawn(move || File::from(write).write_all(&vec![b'x'; MAX_LOG as usize + 100_000]));
        keep(read.into(), Some(file), None);
        writer.join().unwrap().unwrap();
        let size = path.as_file().metadata().unwrap().len();
        assert!((MAX_LOG - 4096..MAX_LOG + 100).contains(&size), "{size}");
    }
}
