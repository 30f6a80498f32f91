//! Making a template: boot a machine that is nobody's, wait until its init knocks and nothing of that is left, pause, snapshot, end it.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use commonage_isolation_api::{Interval, Rspec};
use jiff::Timestamp;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Shape;
use crate::book::FIRST_UID;
use crate::error::Error;
use crate::manager::Manager;
use crate::sliver::{Launch, Machine, Paths, Visits, console, files, remove_tree};

/// The user whom a template's machine runs as: no sliver's.
const UID: u32 = FIRST_UID - 1;
/// How long a guest may take to boot.
const BOOT_WAIT: Duration = Duration::from_secs(180);
/// How long the knock's connection may take to be gone from the machine, and how often that is asked.
const SETTLE_WAIT: Duration = Duration::from_secs(10);
const SETTLE_LOOK: Duration = Duration::from_millis(5);
/// How long killing may take.
const KILL_WAIT: Duration = Duration::from_secs(20);
/// The disk in the template's machine, bytes: never written, and no clone's.
const PLACEHOLDER: u64 = 16 << 20;

/// Makes the template of `shape` in `root` and gives it the name `dir`.
pub async fn make(manager: &Manager, shape: &Shape, root: &Path, dir: &Path) -> Result<(), Error> {
    let aside = root.join("new");
    let paths = Paths { dir: aside.clone(), state: aside.clone() };
    let made = snapshot(manager, shape, &paths).await;
    // In any case: of an earlier node manager's attempt, too, nothing may live.
    end(manager).await?;
    let kept = made.and_then(|()| keep(&paths, dir));
    if kept.is_err() {
        remove_tree(&aside)?;
    }
    kept
}

async fn snapshot(manager: &Manager, shape: &Shape, paths: &Paths) -> Result<(), Error> {
    end(manager).await?;
    let disk = paths.state.with_extension("disk");
    let make = || fs::File::create(&disk)?.set_len(PLACEHOLDER);
    fs::create_dir_all(disk.parent().unwrap_or(&disk)).map_err(Error::io("make the directory of", &disk))?;
    make().map_err(Error::io("make", &disk))?;
    let settings = &manager.settings;
    let config = files::machine(settings, paths, shape, UID, &disk, files::boot(settings, shape));
    let group = manager.cgroups.as_ref().map(|groups| (groups.template(), rspec(shape)));
    let launch = Launch {
        owner: "a template".to_owned(),
        paths: paths.clone(),
        config,
        group,
        program: settings.vmm.clone(),
    };
    let mut machine = launch.start().await?;
    // The machine holds what it needs of the disk.
    fs::remove_file(&disk).map_err(Error::io("remove", &disk))?;
    let failed = |message: String| {
        let said = [paths.vmm_log(), paths.console()].map(|path| console::tail(&path)).join("\n");
        let message = format!("{message}; it and its guest said last:\n{}", said.trim());
        Error::Machine { slice: "a template".to_owned(), message }
    };
    wait_for_knock(&mut machine, paths).await.map_err(failed)?;
    let (state, memory) = (new_file(&paths.dir, "state")?, new_file(&paths.dir, "memory")?);
    let written = async {
        machine.pause().await?;
        machine.snapshot(&state, &memory, shape.memory_mib).await
    };
    written.await.map_err(|e| failed(format!("no snapshot: {e}")))?;
    machine.stop(Duration::ZERO).await;
    Ok(())
}

async fn wait_for_knock(machine: &mut Machine, paths: &Paths) -> Result<(), String> {
    let (knock, knocked) = oneshot::channel();
    let visits = Visits::receive(paths.control(), None, Some(knock)).await.map_err(|e| e.to_string())?;
    tokio::select! {
        ended = machine.ended() => return Err(format!("{ended} before its init knocked")),
        knocked = tokio::time::timeout(BOOT_WAIT, knocked) => match knocked {
            Ok(Ok(())) => {}
            _ => return Err(format!("its init did not knock within {} s", BOOT_WAIT.as_secs())),
        }
    }
    // Clones would be told that the connection was reset; better that there is none.
    let deadline = Instant::now() + SETTLE_WAIT;
    while machine.own_metrics().await.map_err(|e| e.to_string())?.vsock_connections > 0 {
        if Instant::now() > deadline {
            return Err("the connection of its knock does not end".to_owned());
        }
        tokio::time::sleep(SETTLE_LOOK).await;
    }
    drop(visits);
    Ok(())
}

/// Keeps the snapshot and nothing else.
fn keep(paths: &Paths, dir: &Path) -> Result<(), Error> {
    for extra in [paths.vsock(), paths.control(), paths.console(), paths.vmm_log(), paths.machine()] {
        match fs::remove_file(&extra) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", &extra)(e)),
            _ => {}
        }
    }
    remove_tree(dir)?;
    fs::rename(&paths.dir, dir).map_err(Error::io("rename", &paths.dir))
}

fn new_file(dir: &Path, name: &str) -> Result<fs::File, Error> {
    let path = dir.join(name);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(&path).map_err(Error::io("make", &path))
}

/// Ends every process of the template's user. Nothing of it is on the network.
async fn end(manager: &Manager) -> Result<(), Error> {
    if let Some(groups) = &manager.cgroups {
        let group = groups.template();
        tokio::task::spawn_blocking(move || group.kill(KILL_WAIT).and_then(|()| group.remove())).await??;
    }
    Ok(())
}

/// What the template's machine is held to while it boots. Its snapshot lies in memory, and counts as its own while it writes it.
fn rspec(shape: &Shape) -> Rspec {
    let forever = Interval { start: Timestamp::UNIX_EPOCH, end: Timestamp::MAX };
    let memory_mib = shape.memory_mib.saturating_mul(2);
    Rspec { vcpus: shape.vcpus, memory_mib, ..Rspec::modest(forever) }
}
