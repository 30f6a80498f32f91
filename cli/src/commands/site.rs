//! Sites.

use anyhow::Result;
use clap::Subcommand;
use commonage_isolation_api::SiteName;
use commonage_plc_api::rest::{CreateSite, Site};

use crate::output::Output;
use crate::profile::Profile;

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes a site (administrators).
    Create {
        /// 1 to 16 lower-case letters or digits, a letter first.
        name: SiteName,
        /// Its part of the testbed, relative to other sites'.
        #[arg(long)]
        shares: Option<u32>,
    },
    /// All sites.
    List,
    /// Changes a site's part of the testbed (administrators).
    SetShares {
        /// The site.
        name: SiteName,
        /// Its shares.
        shares: u32,
    },
}

/// Does it.
pub async fn run(command: Command, profile: &Profile, output: &Output) -> Result<()> {
    let plc = profile.client()?;
    let show = |site: Site| output.told(&site, &[format!("site {} has {} shares", site.name, site.shares)]);
    match command {
        Command::Create { name, shares } => show(plc.create_site(&CreateSite { name, shares }).await?),
        Command::SetShares { name, shares } => show(plc.set_site_shares(&name, shares).await?),
        Command::List => {
            let sites = plc.sites().await?;
            output.table(&sites, &["SITE", "SHARES"], |s| vec![s.name.to_string(), s.shares.to_string()])
        }
    }
}
