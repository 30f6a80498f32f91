//! Spawning `sliver-vmm` so that it outlives the node manager, the first process of a pid namespace of its own. It is told where the
//! [void](commonage_isolation::void) is that its jail is made in and which control group to join, and does so before anything else; between fork
//! and exec nothing runs, so nothing of the node manager is copied for a process that is about to be another one. The only unsafe code of the
//! node manager.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::OnceLock;

use commonage_isolation::void::Void;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::process::{Child, Command};
use tokio::runtime::Handle;

/// The void of this node manager's machines, made at the first one's start. It holds nothing and nobody can change it, so all share it.
static VOID: OnceLock<Void> = OnceLock::new();

/// Spawns `program run --config config`. It joins the control group whose `cgroup.procs` is `group`; what it says goes to `log`. Must be
/// called in a tokio runtime.
pub fn spawn(program: &Path, config: &Path, group: Option<&Path>, log: File) -> io::Result<Child> {
    let [mounts, network] = void()?.parts().map(|namespace| namespace.as_raw_fd());
    let mine = format!("/proc/{}/fd", std::process::id());
    let mut command = Command::new(program);
    command.arg("run").arg("--config").arg(config);
    command.arg("--void").arg(format!("{mine}/{mounts},{mine}/{network}"));
    command.args(group.into_iter().flat_map(|group| ["--group".as_ref(), group.as_os_str()]));
    command.env_clear().stdin(Stdio::null());
    command.stdout(log.try_clone()?).stderr(log).kill_on_drop(false);
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
    async fn it_is_process_1_of_its_namespace_and_is_told_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        std::fs::write(&program, "#!/bin/sh\necho $$ $*; ls -l /proc/self/fd; set; exit 7\n").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        for _ in 0..2 {
            let mut log = tempfile::tempfile().unwrap();
            let (config, group) = (Path::new("/machine.json"), Path::new("/group/cgroup.procs"));
            let mut child = spawn(&program, config, Some(group), log.try_clone().unwrap()).unwrap();
            assert_eq!(child.wait().await.unwrap().code(), Some(7));
            let mut text = String::new();
            log.rewind().unwrap();
            log.read_to_string(&mut text).unwrap();
            let void = text.strip_prefix("1 run --config /machine.json --void ");
            let (void, rest) =
                void.and_then(|rest| rest.split_once(" --group /group/cgroup.procs\n")).unwrap();
            let (mounts, network) = void.split_once(',').unwrap();
            for (file, kind) in [(mounts, "mnt:["), (network, "net:[")] {
                let link = std::fs::read_link(file).unwrap();
                assert!(link.to_str().unwrap().starts_with(kind), "{file} is {}", link.display());
                File::open(file).unwrap();
            }
            let inherited = |kind| rest.contains(&format!("-> {kind}:["));
            assert!(!inherited("mnt") && !inherited("net"), "it inherited a namespace: {text}");
            assert!(!text.contains("HOME="), "{text}");
        }
        // The node manager itself, and its other children, stay where they were.
        let output = std::process::Command::new("/bin/sh").args(["-c", "echo $$"]).output().unwrap();
        assert_ne!(output.stdout, b"1\n");
    }
}
