//! Nodes and their boot CDs. A node's private key is made here and lies on its CD only.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use commonage_isolation_api::{NodeId, SiteName};
use commonage_plc_api::boot::NodeConfig;
use commonage_plc_api::rest::{CreateNode, Node};
use commonage_plc_client::identity;

use crate::commands::offline_key;
use crate::output::Output;
use crate::profile::{Profile, write_secret};

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes a node at PLC and the configuration for its CD (administrators; PIs for their site).
    Create {
        /// The site that hosts it.
        #[arg(long)]
        site: SiteName,
        /// For people.
        #[arg(long)]
        hostname: String,
        /// The public half of the offline key.
        #[arg(long, value_name = "FILE.pub")]
        offline_key: PathBuf,
        /// Where the node will reach PLC; as you do when absent.
        #[arg(long, value_name = "URL")]
        plc: Option<String>,
        /// Where to write the configuration. It holds the node's private key.
        #[arg(long, value_name = "FILE")]
        config_out: PathBuf,
    },
    /// Writes a node's CD, for BIOS and UEFI. Speaks to nobody.
    Iso {
        /// The node's configuration, from `node create`.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        #[command(flatten)]
        boot: BootFiles,
        /// The CD image to write.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// All nodes.
    List,
    /// One node: hardware, address, slivers.
    Show {
        /// Its id or host name.
        node: String,
        /// Return once the node has reported.
        #[arg(long)]
        wait: bool,
        /// Wait so many seconds at most.
        #[arg(long, default_value_t = 300, requires = "wait")]
        timeout: u64,
    },
    /// Removes a node; its CD is refused from then on.
    Delete {
        /// Its id.
        node: NodeId,
    },
}

/// What a CD starts.
#[derive(Debug, Args)]
pub struct BootFiles {
    /// Its kernel.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Its initramfs, with boot-cd in it.
    #[arg(long, value_name = "FILE")]
    initramfs: PathBuf,
}

/// Does it.
pub async fn run(command: Command, profile: &Profile, output: &Output) -> Result<()> {
    match command {
        Command::Create { site, hostname, offline_key, plc, config_out } => {
            if config_out.exists() {
                bail!("{} is there already, and a node's key is never overwritten", config_out.display());
            }
            let offline_key = offline_key::read_public(&offline_key)?;
            let identity = identity::generate(&hostname)?;
            let request = CreateNode { site, hostname, csr: identity.csr_pem };
            let issued = profile.client()?.create_node(&request).await?;
            let config = NodeConfig {
                node: issued.node.node.clone(),
                plc: plc.map_or_else(|| profile.url(), Ok)?,
                ca_pem: issued.ca_pem,
                cert_pem: issued.certificate_pem,
                key_pem: identity.key_pem,
                offline_key,
                online_key: issued.online_key,
            };
            write_secret(&config_out, &serde_json::to_string_pretty(&config)?)?;
            let said = format!("node {}: configuration in {}", issued.node.node, config_out.display());
            output.told(&issued.node, &[said])
        }
        Command::Iso { config, boot, out } => {
            let text = std::fs::read(&config).with_context(|| format!("cannot read {}", config.display()))?;
            let parsed: NodeConfig = serde_json::from_slice(&text)
                .with_context(|| format!("{} is no node configuration", config.display()))?;
            write_iso(&boot, &text, &out)?;
            let said = format!("{}: the CD of node {}; it holds the node's key", out.display(), parsed.node);
            output.told(&serde_json::json!({"node": parsed.node, "iso": out}), &[said])
        }
        Command::List => {
            let nodes = profile.client()?.nodes().await?;
            output.table(&nodes, &["NODE", "HOSTNAME", "SITE", "ADDRESS", "LAST REPORT"], |n| {
                let address = n.address.map(|a| a.to_string()).unwrap_or_default();
                let at = n.status.as_ref().map(|s| s.at.to_string()).unwrap_or_else(|| "never".into());
                vec![n.node.to_string(), n.hostname.clone(), n.site.to_string(), address, at]
            })
        }
        Command::Show { node, wait, timeout } => {
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(timeout);
            loop {
                let found = find(profile, &node).await?;
                if !wait || found.status.is_some() {
                    return output.value(&found);
                }
                if std::time::Instant::now() > deadline {
                    bail!("node {node} has not reported within {timeout} s; look at its console");
                }
                tokio::time::sleep(std::time::Duration::from_millis(500)).await;
            }
        }
        Command::Delete { node } => {
            profile.client()?.delete_node(&node).await?;
            output.told(&serde_json::json!({}), &[format!("node {node} is gone")])
        }
    }
}

async fn find(profile: &Profile, name: &str) -> Result<Node> {
    let mut nodes = profile.client()?.nodes().await?;
    nodes.retain(|n| n.node.as_str() == name || n.hostname == name);
    match nodes.len() {
        0 => bail!("there is no node {name}; `commonage node list` shows all"),
        1 => Ok(nodes.swap_remove(0)),
        _ => bail!("several nodes are called {name}; name one by its id (`commonage node list`)"),
    }
}

fn write_iso(boot: &BootFiles, config: &[u8], out: &Path) -> Result<()> {
    commonage_images::iso::write(&boot.kernel, &boot.initramfs, config, out)
        .with_context(|| format!("cannot write the CD image {}", out.display()))
}
