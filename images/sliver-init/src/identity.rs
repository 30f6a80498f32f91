//! Applying an identity: everything that makes a booted machine this slice's sliver on this node.
//!
//! Random numbers and clock come first, before anything could have used them; the network last, so that nothing
//! arrives before files and keys lie. Applying the same identity again changes nothing.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::OnceLock;

use commonage_init::clock;
use commonage_init::error::Context as _;
use commonage_isolation_api::SliceName;
use commonage_nodemgr_api::guest::Identity;
use jiff::Timestamp;

use crate::disk::Disk;
use crate::error::Result;
use crate::host_key::HostKey;
use crate::network::Network;
use crate::root::{self, Root};
use crate::{files, log, sys};

/// The kernel's random pool.
const RANDOM: &str = "/dev/urandom";
/// The machine's own identifier, and its length with the end of the line.
const MACHINE_ID: (&str, usize) = ("/etc/machine-id", 33);
/// The SSH host key.
const HOST_KEY: &str = "/etc/ssh/ssh_host_ed25519_key";

/// A machine that is no sliver yet: what a template is a snapshot of. Whatever it will need is open; a device that is not there is missed only
/// by the identity.
pub struct Nameless {
    random: File,
    disk: Option<Disk>,
    network: Option<Network>,
}

impl Nameless {
    /// Does all that no identity is needed for.
    ///
    /// # Errors
    /// The kernel refuses, or a device is missing.
    pub fn prepare() -> Result<Self> {
        root::prepare()?;
        let (random, disk, network) = (open_random()?, Disk::find(), Network::prepare());
        for e in [disk.as_ref().err(), network.as_ref().err()].into_iter().flatten() {
            log(format_args!("{e}; this machine can be no sliver without"));
        }
        Ok(Self { random, disk: disk.ok(), network: network.ok() })
    }

    /// Makes this machine the sliver, whose root is `root` as soon as it is in force. May be tried again when it fails.
    ///
    /// # Errors
    /// The first thing that could not be applied.
    pub fn become_sliver(&mut self, identity: &Identity, root: &OnceLock<Root>) -> Result<()> {
        sys::credit_entropy(&self.random, &identity.entropy.0).what(|| "credit entropy".into())?;
        clock::set(identity.now.into())?;
        let host = host_name(&identity.slice);
        rustix::system::sethostname(host.as_bytes()).what(|| format!("set the host name {host}"))?;
        let root = match root.get() {
            Some(root) => root,
            None => {
                let disk = match &self.disk {
                    Some(disk) => disk,
                    None => self.disk.insert(Disk::find()?),
                };
                disk.wait_for(identity.disk_bytes)?;
                let entered = root::enter()?;
                root.get_or_init(|| entered)
            }
        };
        lay(Path::new("/"), &root.own(), identity)?;
        let network = match &mut self.network {
            Some(network) => network,
            None => self.network.insert(Network::prepare()?),
        };
        Ok(network.configure(identity.mac, identity.address, &identity.ports)?)
    }
}

/// The machine was saved and goes on, perhaps much later, perhaps for the second time.
///
/// # Errors
/// The kernel refuses.
pub fn resume(now: Timestamp, entropy: &[u8]) -> Result<()> {
    sys::credit_entropy(&open_random()?, entropy).what(|| "credit entropy".into())?;
    Ok(clock::set(now.into())?)
}

fn open_random() -> Result<File> {
    Ok(File::options().write(true).open(RANDOM).what(|| format!("open {RANDOM}"))?)
}

/// Lays all files under `root`, of which `own` has those that are the sliver's own already. The tenant's come last: they may replace ours.
fn lay(root: &Path, own: &Path, identity: &Identity) -> Result<()> {
    let host = host_name(&identity.slice);
    files::lay(root, "/etc/hostname", 0o644, format!("{host}\n").as_bytes())?;
    let hosts = format!("127.0.0.1 localhost\n::1 localhost\n{} {host}\n", identity.address);
    files::lay(root, "/etc/hosts", 0o644, hosts.as_bytes())?;
    let resolvers: String = identity.dns.iter().map(|server| format!("nameserver {server}\n")).collect();
    files::lay(root, "/etc/resolv.conf", 0o644, resolvers.as_bytes())?;
    machine_id(root, own)?;
    host_key(root, own, &host)?;

    let keys: String = identity.ssh_keys.iter().map(|key| format!("{}\n", key.trim())).collect();
    files::lay(root, "/root/.ssh/authorized_keys", 0o600, keys.as_bytes())?;
    for dir in ["root", "root/.ssh"] {
        protect(&root.join(dir)).what(|| format!("set the mode of /{dir}"))?;
    }
    for file in &identity.files {
        files::lay(root, &file.path, file.mode, &file.contents.0)?;
    }
    Ok(())
}

/// Lets only the owner into a directory. One that is so already is not touched: it may be the base's, and would be copied.
fn protect(dir: &Path) -> std::io::Result<()> {
    const MODE: u32 = 0o700;
    if std::fs::metadata(dir)?.permissions().mode() & 0o7777 == MODE {
        return Ok(());
    }
    std::fs::set_permissions(dir, Permissions::from_mode(MODE))
}

/// A host name has no underscores.
fn host_name(slice: &SliceName) -> String {
    slice.as_str().replace('_', "-")
}

/// Whether the sliver has a file of its own there, of a certain length if one is given. A base may carry one: that is every sliver's.
fn has_own(own: &Path, path: &str, len: Option<usize>) -> bool {
    let there = std::fs::symlink_metadata(own.join(path.trim_start_matches('/')));
    there.is_ok_and(|m| m.is_file() && len.is_none_or(|len| u64::try_from(len) == Ok(m.len())))
}

/// Gives the machine an identifier at its first start, and the same one ever after.
fn machine_id(root: &Path, own: &Path) -> Result<()> {
    let (path, len) = MACHINE_ID;
    if has_own(own, path, Some(len)) {
        return Ok(());
    }
    let id: String = random::<16>()?.iter().map(|b| format!("{b:02x}")).collect();
    files::lay(root, path, 0o444, format!("{id}\n").as_bytes())
}

/// Gives the machine an SSH host key at its first start, and the same one ever after.
fn host_key(root: &Path, own: &Path, host: &str) -> Result<()> {
    let public = format!("{HOST_KEY}.pub");
    if has_own(own, HOST_KEY, None) && has_own(own, &public, None) {
        return Ok(());
    }
    let key = HostKey::new(random()?, random()?, &format!("root@{host}"));
    files::lay(root, HOST_KEY, 0o600, key.private.as_bytes())?;
    files::lay(root, &public, 0o644, key.public.as_bytes())
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bits = [0; N];
    // Less than 256 bytes come whole once the generator is seeded, which crediting entropy has made sure of.
    let len = rustix::rand::getrandom(&mut bits, rustix::rand::GetRandomFlags::empty());
    let whole = len.and_then(|len| if len == N { Ok(()) } else { Err(rustix::io::Errno::AGAIN) });
    whole.what(|| "get random numbers".into())?;
    Ok(bits)
}

#[cfg(test)]
mod tests {
    use commonage_nodemgr_api::Bytes;
    use commonage_nodemgr_api::http::{File, PortGrant};

    use super::*;

    fn identity() -> Identity {
        Identity {
            slice: "princeton_codeen".parse().unwrap(),
            node: "3f0e4a52-0000-4000-8000-000000000001".parse().unwrap(),
            mac: [2, 0, 0, 1, 0x86, 0xa1],
            disk_bytes: 1 << 30,
            address: [192, 0, 2, 5].into(),
            dns: vec![[10, 0, 2, 3].into(), [9, 9, 9, 9].into()],
            ports: PortGrant { first: 20000, last: 20063, tcp: Default::default(), udp: Default::default() },
            ssh_keys: vec!["ssh-ed25519 AAAA one\n".into(), "ssh-ed25519 BBBB two".into()],
            boot_script: String::new(),
            files: vec![File { path: "/etc/app/conf".into(), mode: 0o640, contents: Bytes(b"x=1".to_vec()) }],
            now: "2024-01-01T00:00:00Z".parse().unwrap(),
            entropy: Bytes(vec![7; 32]),
        }
    }

    #[test]
    fn files_are_laid_and_what_is_the_machines_own_stays() {
        let dir = tempfile::tempdir().unwrap();
        lay(dir.path(), dir.path(), &identity()).unwrap();
        let read = |path: &str| std::fs::read_to_string(dir.path().join(path)).unwrap();
        assert_eq!(read("etc/hostname"), "princeton-codeen\n");
        assert_eq!(read("etc/resolv.conf"), "nameserver 10.0.2.3\nnameserver 9.9.9.9\n");
        assert!(read("etc/hosts").contains("192.0.2.5 princeton-codeen\n"));
        assert_eq!(read("root/.ssh/authorized_keys"), "ssh-ed25519 AAAA one\nssh-ed25519 BBBB two\n");
        assert_eq!(read("etc/app/conf"), "x=1");
        let mode =
            |path: &str| std::fs::metadata(dir.path().join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!(
            (mode("root/.ssh"), mode("root/.ssh/authorized_keys"), mode("etc/app/conf")),
            (0o700, 0o600, 0o640)
        );
        let (id, key) = (read("etc/machine-id"), read("etc/ssh/ssh_host_ed25519_key.pub"));
        assert_eq!(id.len(), 33);
        assert!(key.ends_with(" root@princeton-codeen\n"), "{key}");
        assert_eq!((mode("etc/ssh/ssh_host_ed25519_key"), mode("etc/machine-id")), (0o600, 0o444));
        lay(dir.path(), dir.path(), &identity()).unwrap();
        assert_eq!((read("etc/machine-id"), read("etc/ssh/ssh_host_ed25519_key.pub")), (id, key));
    }

    #[test]
    fn what_the_base_has_is_nobodys_own() {
        let (root, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let of_base = "0123456789abcdef0123456789abcdef\n";
        files::lay(root.path(), "/etc/machine-id", 0o444, of_base.as_bytes()).unwrap();
        lay(root.path(), own.path(), &identity()).unwrap();
        assert_ne!(std::fs::read_to_string(root.path().join("etc/machine-id")).unwrap(), of_base);
    }

    #[test]
    fn a_file_outside_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut identity = identity();
        identity.files.push(File { path: "/../out".into(), mode: 0o600, contents: Bytes::default() });
        assert!(lay(dir.path(), dir.path(), &identity).unwrap_err().to_string().contains(".."));
    }
}
