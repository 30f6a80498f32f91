//! The offline key: Ed25519, PKCS#8 PEM. Its public half, base64, goes on every CD.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Subcommand;
use commonage_nodemgr_api::Bytes;
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _};

use crate::output::Output;
use crate::profile::write_secret;

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes a key: the private half in FILE, the public half in FILE.pub. Speaks to nobody.
    Create {
        /// Where.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}

/// Does it.
pub fn run(command: Command, output: &Output) -> Result<()> {
    let Command::Create { out } = command;
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).context("the kernel's random numbers cannot be read")?;
    let key = SigningKey::from_bytes(&seed);
    write_secret(&out, &key.to_pkcs8_pem(LineEnding::LF)?)?;
    let public = public_path(&out);
    let text = serde_json::to_string(&Bytes(key.verifying_key().to_bytes().to_vec()))?;
    std::fs::write(&public, format!("{text}\n"))
        .with_context(|| format!("cannot write {}", public.display()))?;
    let said = format!("{}: keep it off line; {} goes on every CD", out.display(), public.display());
    output.told(&serde_json::json!({"private": out, "public": public}), &[said])
}

/// Reads the private half.
pub fn read(path: &Path) -> Result<SigningKey> {
    let pem = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    SigningKey::from_pkcs8_pem(&pem).map_err(|_| {
        anyhow::anyhow!("{} is no Ed25519 key; make one with `commonage offline-key create`", path.display())
    })
}

/// Reads the public half.
pub fn read_public(path: &Path) -> Result<Bytes> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let key: Option<Bytes> = serde_json::from_str(&text).ok().filter(|k: &Bytes| k.0.len() == 32);
    key.with_context(|| {
        format!(
            "{} is not the public half of an offline key (the .pub file of `commonage offline-key create`)",
            path.display()
        )
    })
}

fn public_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".pub");
    name.into()
}
