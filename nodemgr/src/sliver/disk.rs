//! A sliver's own disk: a sparse file with an empty ext4 file system, made once and kept until the sliver is deleted.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::Paths;
use crate::error::Error;

const MKFS_WAIT: Duration = Duration::from_secs(300);

/// Makes the disk of `mib` MiB, owned by `uid`, unless it is there. Made aside and renamed, so a disk that exists is whole.
pub async fn prepare(paths: &Paths, mib: u32, uid: u32, mke2fs: &Path) -> Result<(), Error> {
    let disk = paths.disk();
    if disk.exists() {
        return Ok(());
    }
    fs::create_dir_all(&paths.state).map_err(Error::io("make", &paths.state))?;
    let new = paths.state.join("disk.new");
    let file = File::create(&new).map_err(Error::io("make", &new))?;
    file.set_permissions(fs::Permissions::from_mode(0o600)).map_err(Error::io("protect", &new))?;
    file.set_len(u64::from(mib) << 20).map_err(Error::io("size", &new))?;
    // Lazy: tables that were never written are not written now either, so the file stays sparse and making it is quick.
    // No root reserve: the guest's own root is all there is.
    let mut command = Command::new(mke2fs);
    command
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1"])
        .arg(&new);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let failed = |message| Error::Program { program: mke2fs.to_owned(), path: new.clone(), message };
    let output = tokio::time::timeout(MKFS_WAIT, command.output()).await;
    let output =
        output.map_err(|_| failed("it takes too long".to_owned()))?.map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        return Err(failed(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())));
    }
    chown(&new, Some(uid), Some(uid)).map_err(Error::io("give away", &new))?;
    let sync = move || {
        file.sync_all().map_err(Error::io("sync", &new))?;
        fs::rename(&new, &disk).map_err(Error::io("rename", &new))
    };
    tokio::task::spawn_blocking(sync).await?
}
