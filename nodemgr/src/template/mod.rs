//! Templates: machines that were booted up to "waiting for an identity" and snapshotted, of which slivers are clones.
//!
//! There is one for each [`Shape`] and version of everything it is made of (the [`Key`]), in `RUN/templates/KEY/{state,memory,touched}`, made at
//! the first need. Nothing in it is any sliver's. `RUN` lies in memory, so a template lasts at most as long as the node is up, and a directory
//! that has its name is whole: it is made aside and renamed. A node manager that was restarted finds what the last one made.
//!
//! - [`shelf`]: which there are, which may be made, which are to go. Pure.
//! - [`make`]: making one.
//!
//! A template that cannot be made, or whose clones do not come up, costs time but never a sliver: whoever asked boots instead.

mod key;
mod make;
mod shelf;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use commonage_vmm_api::Start;
use tokio::time::Instant;

pub use key::{Key, Shape};
use shelf::{Shelf, Verdict};

use crate::error::Error;
use crate::manager::Manager;
use crate::sliver::{Machine, remove_tree};

/// All templates of a node.
#[derive(Debug)]
pub struct Templates {
    root: PathBuf,
    prefault: bool,
    shelf: Mutex<Shelf>,
    /// One is made at a time: its user id and control group are its alone, and a node has better to do than to boot many at once.
    making: tokio::sync::Mutex<()>,
}

/// A template that there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Which.
    pub key: Key,
    dir: PathBuf,
    prefault: bool,
}

impl Template {
    /// How a clone of it is started.
    pub fn start(&self) -> Start {
        let touched = Some(self.touched()).filter(|path| self.prefault && path.exists());
        Start::Restore { state: self.dir.join("state"), memory: self.dir.join("memory"), prefault: touched }
    }

    /// Which pages a clone of it wrote until it was ready.
    fn touched(&self) -> PathBuf {
        self.dir.join("touched")
    }
}

impl Templates {
    /// Those in `RUN/templates`. `prefault`: whether clones are to copy at once what the first clone wrote.
    pub fn open(run: &std::path::Path, prefault: bool) -> Self {
        let root = run.join("templates");
        let mut shelf = Shelf::default();
        for entry in fs::read_dir(&root).into_iter().flatten().flatten() {
            let (name, path) = (entry.file_name(), entry.path());
            match name.to_str().and_then(Key::parse) {
                Some(key) if path.join("memory").is_file() && path.join("state").is_file() => {
                    shelf.made(&key, Instant::now())
                }
                // An earlier node manager was interrupted.
                _ => remove_tree(&path).unwrap_or_else(|e| tracing::warn!("{e}")),
            }
        }
        Self { root, prefault, shelf: Mutex::new(shelf), making: tokio::sync::Mutex::default() }
    }

    /// The template of a shape, made if there is none. Concurrent needs wait for one maker.
    ///
    /// # Errors
    /// It cannot be made, now or for a while.
    pub async fn get(&self, manager: &Manager, shape: &Shape) -> Result<Template, Error> {
        let key = Key::of(&manager.settings, shape)?;
        if let Some(there) = self.look(&key)? {
            return Ok(there);
        }
        let _turn = self.making.lock().await;
        // Somebody else may have made it meanwhile, or tried to.
        if let Some(there) = self.look(&key)? {
            return Ok(there);
        }
        self.make_room(manager, &key)?;
        let since = Instant::now();
        let template = self.template(&key);
        match make::make(manager, shape, &self.root, &template.dir).await {
            Ok(()) => {
                tracing::info!("template {key} ({shape}): made in {} ms", since.elapsed().as_millis());
                self.shelf().made(&key, Instant::now());
                Ok(template)
            }
            Err(e) => {
                self.shelf().failed(&key, Instant::now());
                Err(e)
            }
        }
    }

    fn look(&self, key: &Key) -> Result<Option<Template>, Error> {
        match self.shelf().take(key, Instant::now()) {
            Verdict::There => Ok(Some(self.template(key))),
            Verdict::Make => Ok(None),
            Verdict::Later(wait) => {
                let message = format!("it failed before and is tried again in {} s", wait.as_secs());
                Err(Error::Template { key: key.to_string(), message })
            }
        }
    }

    fn make_room(&self, manager: &Manager, key: &Key) -> Result<(), Error> {
        let in_use = in_use(manager);
        let gone = self.shelf().make_room(&in_use);
        let gone = gone.map_err(|message| Error::Template { key: key.to_string(), message })?;
        if let Some(gone) = gone {
            self.remove(&gone);
        }
        Ok(())
    }

    /// A clone of it is ready: the template is good. The first one tells which pages later ones will write.
    pub async fn cloned(&self, template: &Template, machine: &Machine) {
        if self.shelf().cloned(&template.key) && self.prefault {
            let aside = template.dir.join("touched.new");
            let written = async {
                machine.touched(&fs::File::create(&aside)?).await?;
                fs::rename(&aside, template.touched())
            };
            if let Err(e) = written.await {
                tracing::warn!("template {}: what its clones write is not known: {e}", template.key);
            }
        }
    }

    /// A clone of it did not come up; it is given up when that was the machine's own refusal, or happens again and again.
    pub fn clone_failed(&self, template: &Template, refused: bool) {
        if self.shelf().clone_failed(&template.key, refused, Instant::now()) {
            tracing::warn!("template {}: its clones do not come up; it is given up", template.key);
            self.remove(&template.key);
        }
    }

    /// Removes those that no sliver has needed for a while, and those of a base or kernel that was replaced.
    pub fn tidy(&self, manager: &Manager) {
        let in_use = in_use(manager);
        let gone = self.shelf().unused(&in_use, Instant::now());
        for key in gone {
            tracing::info!("template {key}: no sliver needs it any more");
            self.remove(&key);
        }
    }

    /// Clones that live keep the pages they map.
    fn remove(&self, key: &Key) {
        remove_tree(&self.template(key).dir).unwrap_or_else(|e| tracing::warn!("{e}"));
    }

    fn template(&self, key: &Key) -> Template {
        Template { key: key.clone(), dir: self.root.join(key.as_str()), prefault: self.prefault }
    }

    /// What a panicking thread left is as valid as before: every change is one step.
    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The keys of all slivers there are.
fn in_use(manager: &Manager) -> BTreeSet<Key> {
    let shapes: BTreeSet<Shape> = {
        let book = manager.book();
        let bound = book.slivers().filter_map(|record| book.bound(&record.slice));
        bound.map(|(record, grant)| Shape::of(&record.config.base, &grant.rspec)).collect()
    };
    shapes.iter().filter_map(|shape| Key::of(&manager.settings, shape).ok()).collect()
}
