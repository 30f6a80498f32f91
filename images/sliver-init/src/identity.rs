//! Applying an identity: everything that makes a booted machine this slice's sliver on this node.
//!
//! Clock and random numbers come first, before anything could have used them; the network last, so that nothing
//! arrives before files and keys lie. Applying the same identity again changes nothing.

use std::path::Path;

use commonage_init::clock;
use commonage_init::error::Context as _;
use commonage_isolation_api::SliceName;
use commonage_nodemgr_api::guest::Identity;

use crate::error::Result;
use crate::{files, network, sys};

/// Where the machine's own identifier is kept: in the sliver's disk, never in a base.
const MACHINE_ID: &str = "/var/lib/commonage/machine-id";

/// Makes this machine the sliver.
///
/// # Errors
/// The first thing that could not be applied.
pub fn apply(identity: &Identity) -> Result<()> {
    clock::set(identity.now.into())?;
    sys::credit_entropy(&identity.entropy.0).what(|| "credit entropy".into())?;
    let host = host_name(&identity.slice);
    rustix::system::sethostname(host.as_bytes()).what(|| format!("set the host name {host}"))?;
    lay(Path::new("/"), identity)?;
    Ok(network::configure(identity.address, &identity.ports)?)
}

/// Lays all files under `root`. The tenant's come last: they may replace ours.
fn lay(root: &Path, identity: &Identity) -> Result<()> {
    let host = host_name(&identity.slice);
    files::lay(root, "/etc/hostname", 0o644, format!("{host}\n").as_bytes())?;
    let hosts = format!("127.0.0.1 localhost\n::1 localhost\n{} {host}\n", identity.address);
    files::lay(root, "/etc/hosts", 0o644, hosts.as_bytes())?;
    let resolvers: String = identity.dns.iter().map(|server| format!("nameserver {server}\n")).collect();
    files::lay(root, "/etc/resolv.conf", 0o644, resolvers.as_bytes())?;
    machine_id(root)?;

    let keys: String = identity.ssh_keys.iter().map(|key| format!("{}\n", key.trim())).collect();
    files::lay(root, "/root/.ssh/authorized_keys", 0o600, keys.as_bytes())?;
    for (dir, mode) in [("root", 0o700), ("root/.ssh", 0o700)] {
        let path = root.join(dir);
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode))
            .what(|| format!("set the mode of /{dir}"))?;
    }
    for file in &identity.files {
        files::lay(root, &file.path, file.mode, &file.contents.0)?;
    }
    Ok(())
}

/// A host name has no underscores.
fn host_name(slice: &SliceName) -> String {
    slice.as_str().replace('_', "-")
}

/// Gives the machine an identifier at its first start, and the same one ever after. A base may carry one: it is every sliver's, so it
/// is replaced.
fn machine_id(root: &Path) -> Result<()> {
    let kept = std::fs::read(root.join(MACHINE_ID.trim_start_matches('/'))).ok();
    let id = match kept.filter(|id| id.len() == 33) {
        Some(id) => id,
        None => {
            let mut bits = [0_u8; 16];
            rustix::rand::getrandom(&mut bits, rustix::rand::GetRandomFlags::empty())
                .what(|| "get random numbers".into())?;
            let id: String = bits.iter().map(|b| format!("{b:02x}")).collect();
            files::lay(root, MACHINE_ID, 0o444, format!("{id}\n").as_bytes())?;
            format!("{id}\n").into_bytes()
        }
    };
    files::lay(root, "/etc/machine-id", 0o444, &id)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use commonage_nodemgr_api::Bytes;
    use commonage_nodemgr_api::http::{File, PortGrant};

    use super::*;

    fn identity() -> Identity {
        Identity {
            slice: "princeton_codeen".parse().unwrap(),
            node: "3f0e4a52-0000-4000-8000-000000000001".parse().unwrap(),
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
    fn files_are_laid_and_the_machine_id_stays() {
        let dir = tempfile::tempdir().unwrap();
        lay(dir.path(), &identity()).unwrap();
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
        let id = read("etc/machine-id");
        lay(dir.path(), &identity()).unwrap();
        assert_eq!(read("etc/machine-id"), id);
        assert_eq!(id.len(), 33);
    }

    #[test]
    fn a_file_outside_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut identity = identity();
        identity.files.push(File { path: "/../out".into(), mode: 0o600, contents: Bytes::default() });
        assert!(lay(dir.path(), &identity).unwrap_err().to_string().contains(".."));
    }
}
