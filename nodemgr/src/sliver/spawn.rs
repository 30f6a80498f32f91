//! Spawning `sliver-vmm` so that it outlives the node manager: in a session of its own, the first process of a pid namespace of its own and, from
//! before its first instruction, in its control group. It inherits the [void](commonage_isolation::void) that its jail is made in. The
//! only unsafe code of the node manager.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::OnceLock;

use commonage_isolation::void::Void;
use rustix::io::FdFlags;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::process::{Child, Command};
use tokio::runtime::Handle;

/// The void of this node manager's machines, made at the first one's start. It holds nothing and nobody can change it, so all share it.
static VOID: OnceLock<Void> = OnceLock::new();

/// Spawns `program run --config config`. It joins the control group whose `cgroup.procs` is `procs`; what it says goes to `log`. Must be
/// called in a tokio runtime.
pub fn spawn(program: &Path, config: &Path, procs: Option<File>, log: File) -> io::Result<Child> {
    let void = void()?;
    let [mounts, network] = void.parts();
    let mut command = Command::new(program);
    command.arg("run").arg("--config").arg(config);
    command.arg("--void").arg(format!("{},{}", mounts.as_raw_fd(), network.as_raw_fd()));
    command.env_clear().current_dir("/").stdin(Stdio::null());
    command.stdout(log.try_clone()?).stderr(log).kill_on_drop(false);
    let before_exec = move || {
        rustix::process::setsid()?;
        if let Some(procs) = &procs {
            // "0" is the process that writes.
            rustix::io::write(procs, b"0")?;
        }
        // The child's own table of descriptors: they go on closing in every other child of the node manager.
        for descriptor in void.parts() {
            rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are made: setsid, write and fcntl, on descriptors that are open; an
    // error is returned as a number, nothing allocates and no lock is taken.
    unsafe { command.pre_exec(before_exec) };
    first_of_its_namespace(&mut command)
}

/// Spawns as process 1 of a new pid namespace. The namespace for children is a thread's, so a thread is made for it that has no other child.
fn first_of_its_namespace(command: &mut Command) -> io::Result<Child> {
    let runtime = Handle::current();
    let birth = move || {
        let _runtime = runtime.enter();
        // SAFETY: no descriptors are unshared, only where this thread's future children are counted.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?;
        command.spawn()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("birth".into()).spawn_scoped(scope, birth)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that spawns it panicked")))
    })
}

fn void() -> io::Result<&'static Void> {
    if let Some(void) = VOID.get() {
        return Ok(void);
    }
    let void = Void::create().map_err(io::Error::other)?;
    // Two first machines at once make two voids; one is dropped.
    Ok(VOID.get_or_init(|| void))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    #[ignore = "needs root"]
    async fn it_is_process_1_of_its_namespace_and_inherits_the_void() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        let said = "echo $$ $*; ls -l /proc/self/fd; set; exit 7";
        std::fs::write(&program, format!("#!/bin/sh\n{said}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        for _ in 0..2 {
            let mut log = tempfile::tempfile().unwrap();
            let mut child =
                spawn(&program, Path::new("/machine.json"), None, log.try_clone().unwrap()).unwrap();
            assert_eq!(child.wait().await.unwrap().code(), Some(7));
            let mut text = String::new();
            log.rewind().unwrap();
            log.read_to_string(&mut text).unwrap();
            assert!(text.starts_with("1 run --config /machine.json --void "), "{text}");
            let inherited: Vec<_> = text.lines().filter_map(|line| line.split_once(" -> ")).collect();
            let namespaces = |kind: &str| inherited.iter().filter(|(_, to)| to.starts_with(kind)).count();
            assert_eq!((namespaces("mnt:["), namespaces("net:[")), (1, 1), "{text}");
            assert!(!text.contains("HOME="), "{text}");
        }
        // The node manager itself, and its other children, stay where they were.
        let output = std::process::Command::new("/bin/sh").args(["-c", "echo $$"]).output().unwrap();
        assert_ne!(output.stdout, b"1\n");
    }
}
