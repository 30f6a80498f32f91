//! Principals and their SSH keys. A principal's private key is made here and never leaves this machine.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::{Subcommand, ValueEnum};
use commonage_isolation_api::SiteName;
use commonage_plc_api::rest::{CreatePrincipal, Me, PrincipalName, Role};
use commonage_plc_client::{Client, identity};

use crate::output::Output;
use crate::profile::Profile;

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes a principal, its key and its profile (administrators; PIs for users of their site).
    Create {
        /// 1 to 32 lower-case letters, digits, dots or hyphens, a letter first.
        name: PrincipalName,
        /// Its site.
        #[arg(long)]
        site: Option<SiteName>,
        /// What it may be.
        #[arg(long = "role", required = true)]
        roles: Vec<RoleArg>,
        /// Directory to write the new principal's profile to: give it to that person, and to nobody else.
        #[arg(long, value_name = "DIR")]
        profile_out: PathBuf,
        /// An OpenSSH public key file of that person.
        #[arg(long = "ssh-key", value_name = "FILE")]
        ssh_keys: Vec<PathBuf>,
    },
    /// The principals you may see.
    List,
    /// Removes a principal.
    Delete {
        /// Which.
        name: PrincipalName,
    },
}

/// What to do with SSH keys.
#[derive(Debug, Subcommand)]
pub enum SshKeyCommand {
    /// Adds a key.
    Add {
        /// An OpenSSH public key file, like ~/.ssh/id_ed25519.pub.
        file: PathBuf,
        /// Whose; yours when absent.
        #[arg(long)]
        principal: Option<PrincipalName>,
    },
    /// All keys.
    List {
        /// Whose; yours when absent.
        #[arg(long)]
        principal: Option<PrincipalName>,
    },
    /// Removes a key.
    Delete {
        /// Its id, from the list.
        id: String,
        /// Whose; yours when absent.
        #[arg(long)]
        principal: Option<PrincipalName>,
    },
}

/// A role's name.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum RoleArg {
    /// Keeps PLC.
    Admin,
    /// Responsible for a site.
    Pi,
    /// May own slices.
    User,
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Admin => Self::Admin,
            RoleArg::Pi => Self::Pi,
            RoleArg::User => Self::User,
        }
    }
}

/// Does it.
pub async fn run(command: Command, profile: &Profile, output: &Output) -> Result<()> {
    let plc = profile.client()?;
    match command {
        Command::Create { name, site, roles, profile_out, ssh_keys } => {
            if profile_out.join("key.pem").exists() {
                bail!("{} already holds a profile; name another directory", profile_out.display());
            }
            let keys = ssh_keys.iter().map(read_key).collect::<Result<Vec<_>>>()?;
            let identity = identity::generate(name.as_str())?;
            let roles = roles.into_iter().map(Role::from).collect();
            let request = CreatePrincipal { name: name.clone(), site, roles, csr: identity.csr_pem };
            let issued = plc.create_principal(&request).await?;
            let url = profile.url()?;
            Profile::write(&profile_out, &url, &issued.ca_pem, &issued.certificate_pem, &identity.key_pem)?;
            // The new principal adds its own keys: an administrator may not.
            let its_own = Client::new(&url, &issued.ca_pem, &issued.certificate_pem, &identity.key_pem)?;
            for key in keys {
                its_own.add_ssh_key(&name, &key).await?;
            }
            output
                .told(&issued.principal, &[format!("principal {name}: profile in {}", profile_out.display())])
        }
        Command::List => {
            let principals = plc.principals().await?;
            output.table(&principals, &["PRINCIPAL", "SITE", "ROLES"], |p| {
                let roles: Vec<String> = p.roles.iter().map(|r| format!("{r:?}").to_lowercase()).collect();
                let site = p.site.as_ref().map(ToString::to_string).unwrap_or_default();
                vec![p.name.to_string(), site, roles.join(",")]
            })
        }
        Command::Delete { name } => {
            plc.delete_principal(&name).await?;
            output.told(&serde_json::json!({}), &[format!("principal {name} is gone")])
        }
    }
}

/// Does it.
pub async fn run_ssh_key(command: SshKeyCommand, profile: &Profile, output: &Output) -> Result<()> {
    let plc = profile.client()?;
    match command {
        SshKeyCommand::Add { file, principal } => {
            let key = read_key(&file)?;
            let key = plc.add_ssh_key(&whose(&plc, principal).await?, &key).await?;
            output.told(&key, &[format!("added {}", key.fingerprint)])
        }
        SshKeyCommand::List { principal } => {
            let keys = plc.ssh_keys(&whose(&plc, principal).await?).await?;
            output.table(&keys, &["ID", "FINGERPRINT"], |k| vec![k.id.clone(), k.fingerprint.clone()])
        }
        SshKeyCommand::Delete { id, principal } => {
            plc.remove_ssh_key(&whose(&plc, principal).await?, &id).await?;
            output.told(&serde_json::json!({}), &[format!("key {id} is gone")])
        }
    }
}

async fn whose(plc: &Client, named: Option<PrincipalName>) -> Result<PrincipalName> {
    match (named, plc.me().await?) {
        (Some(name), _) => Ok(name),
        (None, Me::Principal(me)) => Ok(me.name),
        (None, Me::Node { node }) => bail!("this profile is node {node}'s, and nodes have no SSH keys"),
    }
}

fn read_key(file: &PathBuf) -> Result<String> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    if text.contains("PRIVATE KEY") {
        bail!("{} is a private key; name the public one (its name ends in .pub)", file.display());
    }
    Ok(text.trim().to_owned())
}
