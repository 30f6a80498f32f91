//! Everything of the host's that a machine has by a path: opened before the process is locked in, and not looked into.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;

use commonage_vmm_api::{DiskConfig, MachineConfig};
use kvm_ioctls::Kvm;
use rustix::fs::FlockOperation;

use crate::control;
use crate::devices::console::Console;
use crate::jail::Jail;
use crate::machine::{MachineError, file_error, host_error};
use crate::metrics::PrivateMemory;
use crate::origin::OriginFiles;
use crate::snapshot::pages::Pagemap;
use crate::virtio::blk::Blk;
use crate::virtio::vsock::Vsock;
use crate::vm;

/// A machine's files and sockets.
pub struct Opened {
    /// `/dev/kvm`.
    pub kvm: Kvm,
    /// What the guest begins with.
    pub origin: OriginFiles,
    /// The read-only image.
    pub base: Option<File>,
    /// The writable image, locked against other machines, behind its io_uring.
    pub disk: Option<Blk>,
    /// Its length, bytes.
    disk_bytes: u64,
    /// Where the guest's console is logged.
    pub console: Console,
    /// The vsock, listening.
    pub vsock: Option<Vsock>,
    /// The control socket, listening.
    pub control: Option<UnixListener>,
    /// Which pages are this process's own, if the host tells.
    pub pagemap: Option<Pagemap>,
    /// How much memory is this process's own.
    pub private: PrivateMemory,
}

impl Opened {
    /// Opens all that `config` names.
    pub fn open(config: &MachineConfig) -> Result<Self, MachineError> {
        let kvm = vm::open_kvm()?;
        let base = match &config.base {
            Some(path) => Some(File::open(path).map_err(file_error("open the base image", path))?),
            None => None,
        };
        let origin = OriginFiles::open(&config.start)?;
        let (mut disk, mut disk_bytes) = (None, 0);
        if let Some(DiskConfig { path, rate }) = &config.disk {
            let file = open_disk(path).map_err(file_error("open the disk", path))?;
            disk_bytes = file.metadata().map_err(file_error("look at the disk", path))?.len();
            disk = Some(Blk::new(file, *rate).map_err(file_error("use the disk", path))?);
        }
        let console = match &config.console {
            Some(path) => Console::file(path).map_err(file_error("open the console file", path))?,
            None => Console::stdout().map_err(host_error("create a timer"))?,
        };
        let vsock = match &config.vsock {
            Some(vsock) => Some(Vsock::new(vsock)?),
            None => None,
        };
        let (pagemap, private) =
            (Pagemap::open().ok(), PrivateMemory::open().map_err(host_error("open /proc/self/smaps"))?);
        // Last: who sees it may give every file above another name.
        let control = match &config.control {
            Some(path) => {
                Some(control::listen(path).map_err(file_error("listen on the control socket", path))?)
            }
            None => None,
        };
        Ok(Self { kvm, origin, base, disk, disk_bytes, console, vsock, control, pagemap, private })
    }

    /// The jail for the machine `config` of these files.
    pub fn jail(&self, config: &MachineConfig) -> Jail {
        Jail::new(config, self.disk_bytes)
    }
}

/// Opens a disk for one machine alone: two writers would destroy its file system.
fn open_disk(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|errno| match errno {
        rustix::io::Errno::WOULDBLOCK => {
            io::Error::new(io::ErrorKind::ResourceBusy, "another machine uses it; stop that one first")
        }
        errno => errno.into(),
    })?;
    Ok(file)
}
