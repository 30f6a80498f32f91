//! What is said between the node manager and a guest's init, beyond the wire: see [`commonage_nodemgr_api::guest`].

use commonage_nodemgr_api::Bytes;
use commonage_nodemgr_api::guest::{FromGuest, FromHost, Identity};
use commonage_nodemgr_api::http::SliverState;
use jiff::Timestamp;

use super::files;
use super::guest::Said;
use super::lifecycle::{Lifecycle, Live, Origin};
use crate::agent;
use crate::book::AGENT;

/// Longest message taken from a guest, characters.
const MAX_MESSAGE: usize = 1000;
/// Bytes of entropy given to a guest.
const ENTROPY: usize = 64;

impl Lifecycle {
    /// Takes in what the guest's init says. An error is why the machine has to end.
    pub(super) async fn hear(
        &mut self,
        live: &mut Live,
        Said { message, answer }: Said,
    ) -> Result<(), String> {
        live.guest = Some(answer);
        match message {
            FromGuest::Hello { configured: false, .. } => {
                if live.origin == Origin::Saved {
                    return Err("its init does not know who it was".to_owned());
                }
                (live.configured, live.nameless) = (false, true);
                self.introduce(live).await;
            }
            FromGuest::Hello { configured: true, boot_script_exit } => {
                self.speak(live, FromHost::Welcome);
                if live.origin == Origin::Saved && !live.configured {
                    let entropy = entropy()?;
                    self.speak(live, FromHost::Resumed { now: Timestamp::now(), entropy });
                }
                self.configured(live).await;
                if let Some(boot_script_exit) = boot_script_exit {
                    self.publish.send_replace(SliverState::Running { boot_script_exit });
                }
            }
            FromGuest::Configured => self.configured(live).await,
            // Told once for each change: a guest may say it as often as it likes.
            FromGuest::BootScriptDone { exit } => {
                let state = SliverState::Running { boot_script_exit: exit };
                if self.publish.send_replace(state.clone()) != state {
                    tracing::info!("{}: boot script ended with status {exit}", self.slice);
                }
            }
            FromGuest::Failed { message } => {
                let message: String = message.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE).collect();
                return Err(format!("its init failed: {message}"));
            }
        }
        Ok(())
    }

    async fn configured(&self, live: &mut Live) {
        if std::mem::replace(&mut live.configured, true) {
            return;
        }
        live.turn = None;
        let (how, ms) = (live.origin.to_string(), live.since.elapsed().as_millis());
        tracing::info!("{}: {how}, configured after {ms} ms", self.slice);
        if let Origin::Cloned(template) = &live.origin {
            self.manager.templates.cloned(template, &live.machine).await;
        }
    }

    /// Tells the guest who it is, if the node knows its own address.
    pub(super) async fn introduce(&mut self, live: &mut Live) {
        let host = self.host.borrow_and_update().clone();
        let (Some(host), Some((record, grant))) = (host, self.bound()) else {
            return tracing::warn!("{}: waits until the node has an address", self.slice);
        };
        let entropy = match entropy() {
            Ok(entropy) => entropy,
            Err(e) => return tracing::error!("{}: {e}", self.slice),
        };
        let agent = self.slice.as_str() == AGENT;
        let identity = Identity {
            slice: self.slice.clone(),
            node: self.manager.settings.node.clone(),
            mac: files::mac(self.uid),
            disk_bytes: std::fs::metadata(self.paths.disk()).map_or(0, |meta| meta.len()),
            address: host.address,
            dns: host.dns,
            ports: grant.ports,
            ssh_keys: record.config.ssh_keys,
            boot_script: record.config.boot_script,
            files: if agent { agent::files(&self.manager.settings) } else { record.config.files },
            now: Timestamp::now(),
            entropy,
        };
        live.nameless = false;
        std::fs::write(self.address_file(), host.address.to_string())
            .unwrap_or_else(|e| tracing::warn!("{}: {e}", self.address_file().display()));
        self.speak(live, FromHost::Identity(Box::new(identity)));
    }

    fn speak(&self, live: &Live, message: FromHost) {
        if let Some(guest) = &live.guest {
            // Full: the guest does not listen. It will be called anew or timed out.
            guest.try_send(message).ok();
        }
    }
}

fn entropy() -> Result<Bytes, String> {
    let mut entropy = vec![0; ENTROPY];
    getrandom::fill(&mut entropy).map_err(|e| format!("no random numbers for its guest: {e}"))?;
    Ok(Bytes(entropy))
}
