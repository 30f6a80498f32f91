//! A sliver's directory, sockets and machine description, and the sweeping away of what no sliver owns.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, chown};
use std::path::Path;
use std::time::Duration;

use commonage_isolation_api::{Rspec, SliceName};
use commonage_vmm_api::{MachineConfig, NetConfig, VsockConfig};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use tokio::net::UnixListener;

use super::Paths;
use crate::error::Error;
use crate::manager::{Manager, Settings};

/// The guest's vsock context id: each sliver has a vsock of its own, so all have the same.
const CID: u32 = 3;

/// Makes the sliver's directory anew. No process of its user may live.
pub fn make_dir(paths: &Paths, uid: u32) -> Result<(), Error> {
    remove_tree(&paths.dir)?;
    if let Some(parent) = paths.dir.parent() {
        fs::create_dir_all(parent).map_err(Error::io("make", parent))?;
        fs::set_permissions(parent, Permissions::from_mode(0o711)).map_err(Error::io("protect", parent))?;
    }
    fs::DirBuilder::new().mode(0o700).create(&paths.dir).map_err(Error::io("make", &paths.dir))?;
    chown(&paths.dir, Some(uid), Some(uid)).map_err(Error::io("give away", &paths.dir))
}

/// Listens for the guest's connections to a port of the host. An old socket is replaced.
pub fn listen(path: &Path, uid: u32) -> Result<UnixListener, Error> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", path)(e)),
        _ => {}
    }
    // bind never follows a link laid here meanwhile: it fails.
    let listener = UnixListener::bind(path).map_err(Error::io("listen at", path))?;
    // The directory is closed to all but the sliver's user, so the socket's own mode matters to that user only.
    give_away(path, uid).map_err(Error::io("give away", path))?;
    Ok(listener)
}

/// Gives a socket that was just made to the sliver's user. That user owns the directory, so what is there by now may be a link to something of
/// the host's: what is given away is what was looked at, a socket with one name.
fn give_away(path: &Path, uid: u32) -> io::Result<()> {
    let socket = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let stat = rustix::fs::fstat(&socket)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket || stat.st_nlink != 1 {
        return Err(io::Error::other("something else was laid there"));
    }
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    Ok(rustix::fs::chownat(&socket, "", Some(user), Some(group), AtFlags::EMPTY_PATH)?)
}

/// Writes the machine's description.
pub fn write_machine(
    settings: &Settings,
    paths: &Paths,
    uid: u32,
    base: &str,
    rspec: &Rspec,
) -> Result<(), Error> {
    let config = MachineConfig {
        kernel: settings.lib.join("vmlinux"),
        initrd: Some(settings.lib.join("sliver-initrd")),
        cmdline: String::new(),
        memory_mib: rspec.memory_mib,
        vcpus: rspec.vcpus,
        base: Some(settings.images.join(format!("base-{base}.erofs"))),
        disk: Some(paths.disk()),
        net: Some(NetConfig { mac: mac(uid) }),
        vsock: Some(VsockConfig { cid: CID, path: paths.vsock() }),
        console: Some(paths.console()),
        control: Some(paths.control()),
        uid: Some(uid),
    };
    let path = paths.machine();
    let write = || -> io::Result<()> {
        let json = serde_json::to_vec_pretty(&config)?;
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

/// std's own walk follows no symbolic links, also none that are laid while it runs.
fn remove_tree(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}
