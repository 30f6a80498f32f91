//! A profile: where PLC is and who the caller is there. A directory with `url`, `ca.pem`, `cert.pem` and `key.pem`.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use commonage_plc_client::Client;

/// A profile's directory, which may not exist yet.
#[derive(Debug)]
pub struct Profile {
    dir: PathBuf,
}

impl Profile {
    /// The named one, else the user's own.
    pub fn locate(named: Option<PathBuf>) -> Self {
        let own = || {
            let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
            let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config"));
            config.or_else(home).unwrap_or_else(|| PathBuf::from("/etc")).join("commonage")
        };
        Self { dir: named.unwrap_or_else(own) }
    }

    /// PLC's address.
    pub fn url(&self) -> Result<String> {
        Ok(self.read("url")?.trim().to_owned())
    }

    /// A connection to PLC.
    pub fn client(&self) -> Result<Client> {
        let (url, ca) = (self.url()?, self.read("ca.pem")?);
        Ok(Client::new(&url, &ca, &self.read("cert.pem")?, &self.read("key.pem")?)?)
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.dir.join(name);
        std::fs::read_to_string(&path).with_context(|| {
            format!(
                "cannot read {}: name a profile with --profile DIR or COMMONAGE_PROFILE; PLC's administrator gets one from \
                 plcd (STATE/admin), everybody else from `commonage principal create`",
                path.display()
            )
        })
    }

    /// Writes a new profile.
    pub fn write(dir: &Path, url: &str, ca: &str, cert: &str, key: &str) -> Result<()> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        write_secret(&dir.join("key.pem"), key)?;
        for (name, text) in [("url", url), ("ca.pem", ca), ("cert.pem", cert)] {
            let path = dir.join(name);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// Writes a file that only its owner may read, and that was not there before: no key is ever overwritten.
pub fn write_secret(path: &Path, text: &str) -> Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot make {} (a key is never overwritten)", path.display()))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .with_context(|| format!("cannot write {}", path.display()))
}
