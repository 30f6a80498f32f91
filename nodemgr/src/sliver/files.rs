//! A sliver's directory and machine description, and the sweeping away of what no sliver owns.
//!
//! The directories are the host's alone: a machine opens what it needs there before it gives up its privileges, and is handed everything else.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use commonage_isolation_api::SliceName;
use commonage_vmm_api::{DiskConfig, JailConfig, MachineConfig, NetConfig, Start, VsockConfig};

use super::Paths;
use crate::error::Error;
use crate::manager::{Manager, Settings};
use crate::template::Shape;

/// The guest's vsock context id: each sliver has a vsock of its own, so all have the same.
const CID: u32 = 3;

/// Machines up to so much memory, MiB, get small tables: hash tables sized as for a machine that is not shared are dirtied page by page by every
/// name, and slabs of several pages are written whole when they are made, by each clone for itself.
const SMALL_MIB: u32 = 256;
const SMALL_TABLES: &str = "slub_max_order=0 dhash_entries=512 ihash_entries=512";

/// Makes a machine's directory anew. The machine that used it must be gone.
pub fn make_dir(dir: &Path) -> Result<(), Error> {
    remove_tree(dir)?;
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent).map_err(Error::io("make", parent))?;
        fs::set_permissions(parent, Permissions::from_mode(0o700)).map_err(Error::io("protect", parent))?;
    }
    fs::DirBuilder::new().mode(0o700).create(dir).map_err(Error::io("make", dir))
}

/// How a guest is started at its kernel's entry.
pub fn boot(settings: &Settings, shape: &Shape) -> Start {
    let cmdline = if shape.memory_mib <= SMALL_MIB { SMALL_TABLES } else { "" };
    Start::Boot { kernel: kernel(settings), initrd: Some(initrd(settings)), cmdline: cmdline.to_owned() }
}

/// The slivers' kernel.
pub fn kernel(settings: &Settings) -> PathBuf {
    settings.lib.join("vmlinux")
}

/// Their initrd.
pub fn initrd(settings: &Settings) -> PathBuf {
    settings.lib.join("sliver-initrd")
}

/// A base's image.
pub fn base(settings: &Settings, name: &str) -> PathBuf {
    settings.images.join(format!("base-{name}.erofs"))
}

/// A machine's description: every sliver, and every template, has these devices.
pub fn machine(
    settings: &Settings,
    paths: &Paths,
    shape: &Shape,
    uid: u32,
    disk: &Path,
    start: Start,
) -> MachineConfig {
    MachineConfig {
        start,
        memory_mib: shape.memory_mib,
        vcpus: shape.vcpus,
        base: Some(base(settings, &shape.base)),
        disk: Some(DiskConfig { path: disk.to_owned(), rate: None }),
        net: Some(NetConfig { mac: mac(uid) }),
        vsock: Some(VsockConfig { cid: CID, path: paths.vsock() }),
        balloon: true,
        console: Some(paths.console()),
        control: Some(paths.control()),
        jail: Some(JailConfig { uid }),
    }
}

/// Writes a machine's description into its directory.
pub fn write_machine(paths: &Paths, config: &MachineConfig) -> Result<(), Error> {
    let path = paths.machine();
    let write = || -> io::Result<()> {
        let json = serde_json::to_vec_pretty(config)?;
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?.write_all(&json)
    };
    write().map_err(Error::io("write", &path))
}

/// A sliver's MAC address: 02:00 and its user id, big-endian.
pub fn mac(uid: u32) -> [u8; 6] {
    let [a, b, c, d] = uid.to_be_bytes();
    [0x02, 0x00, a, b, c, d]
}

/// Removes everything of a sliver whose machine is gone.
pub fn remove(paths: &Paths) -> Result<(), Error> {
    remove_tree(&paths.dir)?;
    remove_tree(&paths.state)
}

/// Removes what an earlier life left of slivers that the book does not know: processes, groups, directories, disks.
pub async fn sweep(manager: &Manager) {
    let known =
        |name: &str| name.parse::<SliceName>().is_ok_and(|slice| manager.book().sliver(&slice).is_some());
    if let Some(groups) = &manager.cgroups {
        let names = groups.names().inspect_err(|e| tracing::error!("{e}")).unwrap_or_default();
        for slice in names.iter().filter(|n| !known(n)).filter_map(|n| n.parse::<SliceName>().ok()) {
            tracing::warn!("{slice}: no such sliver is recorded; ending what is left of it");
            let group = groups.of(&slice);
            let end = move || group.kill(Duration::from_secs(10)).and_then(|()| group.remove());
            if let Ok(Err(e)) = tokio::task::spawn_blocking(end).await {
                tracing::error!("{e}");
            }
        }
    }
    for parent in [manager.settings.run.join("slivers"), manager.settings.state.join("slivers")] {
        for entry in fs::read_dir(&parent).into_iter().flatten().flatten() {
            if !entry.file_name().to_str().is_some_and(known) {
                tracing::warn!("removing {}, which belongs to no sliver", entry.path().display());
                remove_tree(&entry.path()).inspect_err(|e| tracing::error!("{e}")).ok();
            }
        }
    }
}

/// Removes a directory and all in it, if it is there. std's own walk follows no symbolic links, also none that are laid while it runs.
pub fn remove_tree(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}
