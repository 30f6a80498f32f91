//! The front door's host key: Ed25519, made at the first start and kept for ever, so that users' `known_hosts` stay true.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use russh::keys::PrivateKey;
use russh::keys::ssh_key::LineEnding;
use russh::keys::ssh_key::private::Ed25519Keypair;

use super::SshError;

/// The host key.
#[derive(Debug, Clone)]
pub struct HostKey(PrivateKey);

impl HostKey {
    /// The key kept at `path` (mode 0600, OpenSSH's format), which is made if there is none. A machine that is cut off while
    /// it is made leaves none or a whole one.
    ///
    /// # Errors
    /// The file cannot be read, written or understood.
    pub fn load_or_create(path: &Path) -> Result<Self, SshError> {
        let file_error = |source| SshError::HostKeyFile { path: path.display().to_string(), source };
        let key_error = |why: String| SshError::HostKey { path: path.display().to_string(), why };
        match fs::read_to_string(path) {
            Ok(text) => PrivateKey::from_openssh(text).map(Self).map_err(|e| key_error(e.to_string())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let mut seed = [0; 32];
                getrandom::fill(&mut seed).map_err(|e| key_error(e.to_string()))?;
                let mut key = PrivateKey::from(Ed25519Keypair::from_seed(&seed));
                key.set_comment("commonage");
                let text = key.to_openssh(LineEnding::LF).map_err(|e| key_error(e.to_string()))?;
                write_secret(path, text.as_bytes()).map_err(file_error)?;
                Ok(Self(key))
            }
            Err(e) => Err(file_error(e)),
        }
    }

    /// The public half as OpenSSH writes it: `ssh-ed25519 AAAA…`, without a comment.
    pub fn public_openssh(&self) -> String {
        let mut public = self.0.public_key().clone();
        public.set_comment("");
        // Encoding into memory fails for no key that was decoded.
        public.to_openssh().unwrap_or_default()
    }

    pub(super) fn into_private(self) -> PrivateKey {
        self.0
    }
}

fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent)?;
    let new = path.with_extension("new");
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn it_is_made_once_and_kept_secret() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state/ssh_host_key");
        let made = HostKey::load_or_create(&path).unwrap().public_openssh();
        assert_eq!(HostKey::load_or_create(&path).unwrap().public_openssh(), made);
        assert!(made.starts_with("ssh-ed25519 AAAA") && made.split(' ').count() == 2, "{made}");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_one_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, "damaged").unwrap();
        assert!(matches!(HostKey::load_or_create(&path), Err(SshError::HostKey { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"damaged");
    }
}
