//! Releases: signing what nodes may run, off line, and publishing it at PLC.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use commonage_nodemgr_api::Bytes;
use commonage_plc_api::boot::{ImageFile, Script, Step, sign_script};
use commonage_plc_api::rest::PublishScript;
use sha2::{Digest as _, Sha256};

use crate::commands::offline_key;
use crate::output::Output;
use crate::profile::Profile;

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Writes and signs the boot script that installs these files and starts them. Speaks to nobody.
    Sign {
        /// The private half of the offline key.
        #[arg(long, value_name = "FILE")]
        offline_key: PathBuf,
        /// For people: what this release is called.
        #[arg(long)]
        name: String,
        /// A file of the node image, by its name there; `vmlinuz` and `initramfs` must be among them.
        #[arg(long = "file", value_name = "NAME=PATH", required = true, value_parser = named_path)]
        files: Vec<(String, PathBuf)>,
        /// The node's kernel command line.
        #[arg(long, default_value = CMDLINE)]
        cmdline: String,
        /// Where to write the signed release.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Uploads a signed release's files to PLC and makes it what nodes boot (administrators).
    Publish {
        /// The signed release.
        release: PathBuf,
        /// The same files as were signed.
        #[arg(long = "file", value_name = "NAME=PATH", required = true, value_parser = named_path)]
        files: Vec<(String, PathBuf)>,
    },
    /// What nodes boot now.
    Show,
}

/// Smallest disk a node may have, MiB.
const MIN_DISK_MIB: u64 = 4096;
/// Size of the image partition, MiB: the same for all releases, because it can't grow once there is a state partition behind it.
const IMAGE_MIB: u64 = 2048;
/// What its file system needs for itself, MiB.
const IMAGE_SLACK_MIB: u64 = 128;
/// The node's kernel command line: both consoles, and a reboot (back to the CD) ten seconds after a panic.
const CMDLINE: &str = "console=tty0 console=ttyS0 quiet panic=10";

/// Does it.
pub async fn run(command: Command, profile: &Profile, output: &Output) -> Result<()> {
    match command {
        Command::Sign { offline_key, name, files, cmdline, out } => {
            let key = offline_key::read(&offline_key)?;
            let files =
                files.into_iter().map(|(name, path)| Ok((name, measure(&path)?))).collect::<Result<_>>()?;
            let script = serde_json::to_vec(&script(name, files, cmdline)?)?;
            let signature = sign_script(&key, &script);
            let offline_key = Bytes(key.verifying_key().to_bytes().to_vec());
            let release = PublishScript { script: Bytes(script), signature, offline_key };
            std::fs::write(&out, serde_json::to_vec(&release)?)
                .with_context(|| format!("cannot write {}", out.display()))?;
            output.told(&serde_json::json!({"release": out}), &[format!("signed: {}", out.display())])
        }
        Command::Publish { release, files } => {
            let plc = profile.client()?;
            let text =
                std::fs::read(&release).with_context(|| format!("cannot read {}", release.display()))?;
            let release: PublishScript = serde_json::from_slice(&text)
                .with_context(|| format!("{} is no signed release", release.display()))?;
            let script: Script =
                serde_json::from_slice(&release.script.0).context("the signed script is damaged")?;
            let files: BTreeMap<String, PathBuf> = files.into_iter().collect();
            for step in &script.steps {
                let Step::Install { files: wanted } = step else { continue };
                for (name, file) in wanted {
                    let path =
                        files.get(name).with_context(|| format!("the release needs --file {name}=PATH"))?;
                    output.progress(&format!("uploading {name} ({} MiB)", file.size >> 20));
                    let put = plc.upload_boot_file(path, |_, _| ()).await?;
                    if put.sha256 != file.sha256 {
                        bail!(
                            "{} is not the {name} that was signed: its SHA-256 is {}",
                            path.display(),
                            put.sha256
                        );
                    }
                }
            }
            let current = plc.publish_script(&release).await?;
            output.told(&current, &[format!("nodes boot release {} from now on", current.release)])
        }
        Command::Show => output.value(&profile.client()?.current_script().await?),
    }
}

fn script(release: String, files: BTreeMap<String, ImageFile>, cmdline: String) -> Result<Script> {
    for needed in ["vmlinuz", "initramfs"] {
        if !files.contains_key(needed) {
            bail!("a release needs --file {needed}=PATH");
        }
    }
    let mib = files.values().map(|f| f.size.div_ceil(1 << 20)).sum::<u64>();
    if mib + IMAGE_SLACK_MIB > IMAGE_MIB {
        bail!("the files are {mib} MiB in all; nodes have room for {} MiB", IMAGE_MIB - IMAGE_SLACK_MIB);
    }
    let steps = vec![
        Step::Partition { min_mib: MIN_DISK_MIB, image_mib: IMAGE_MIB },
        Step::Install { files },
        Step::Kexec { kernel: "vmlinuz".into(), initramfs: "initramfs".into(), cmdline },
    ];
    Ok(Script { release, steps })
}

fn measure(path: &Path) -> Result<ImageFile> {
    let mut file = std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let n = std::io::Read::read(&mut file, &mut buffer)
            .with_context(|| format!("cannot read {}", path.display()))?;
        if n == 0 {
            return Ok(ImageFile { sha256: hex::encode(hash.finalize()), size });
        }
        hash.update(&buffer[..n]);
        size += n as u64;
    }
}

fn named_path(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("write NAME=PATH")?;
    let plain = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if plain && !name.starts_with('.') {
        Ok((name.into(), path.into()))
    } else {
        Err(format!("{name:?} is no plain file name"))
    }
}
