//! The files that boot scripts install, each named by its SHA-256 in `STATE/boot/files`.
//!
//! A name exists only once the whole file is on disk and its hash was right: it is written in `STATE/boot/incoming`, synced and renamed.
//! Memory use does not depend on a file's size.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use commonage_plc_api::rest::BootFile;
use commonage_plc_api::{ApiError, Code};
use futures_util::StreamExt as _;
use sha2::{Digest as _, Sha256};
use tokio::fs::{self, File};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::error::{Error, Result, invalid, not_found};

/// Largest file, bytes.
pub const MAX_FILE: u64 = 16 << 30;
const CHUNK: usize = 256 << 10;
/// An upload that stands still for so long is over.
const IDLE: Duration = Duration::from_secs(60);

/// The store.
#[derive(Debug)]
pub struct Files {
    dir: PathBuf,
    incoming: PathBuf,
}

/// Removes what was written of a file, unless it got its name.
struct Aside(PathBuf);

impl Drop for Aside {
    fn drop(&mut self) {
        // Most often it has been renamed, and there is nothing to remove.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Files {
    /// Opens the store; unfinished uploads of an earlier run are removed.
    ///
    /// # Errors
    /// The directories can't be used.
    pub async fn open(state: &Path) -> Result<Self> {
        let (dir, incoming) = (state.join("boot/files"), state.join("boot/incoming"));
        fs::create_dir_all(&dir).await.map_err(Error::file("making", &dir))?;
        match fs::remove_dir_all(&incoming).await {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Error::file("emptying", &incoming)(e));
            }
            _ => {}
        }
        fs::create_dir_all(&incoming).await.map_err(Error::file("making", &incoming))?;
        Ok(Self { dir, incoming })
    }

    /// The size of a file, if it is there.
    ///
    /// # Errors
    /// The disk fails, or the hash isn't one.
    pub async fn size(&self, sha256: &str) -> Result<Option<u64>> {
        let path = self.path(sha256)?;
        match fs::metadata(&path).await {
            Ok(data) => Ok(Some(data.len())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::file("looking at", &path)(e)),
        }
    }

    /// A file's bytes, to stream, and how many they are.
    ///
    /// # Errors
    /// It isn't there, or the disk fails.
    pub async fn read(&self, sha256: &str) -> Result<(Body, u64)> {
        let path = self.path(sha256)?;
        let file = match File::open(&path).await {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let hint = "publish the release again: `commonage release publish` puts its files first";
                return Err(not_found(format!("there is no boot file {sha256}"), hint).into());
            }
            Err(e) => return Err(Error::file("opening", &path)(e)),
        };
        let size = file.metadata().await.map_err(Error::file("looking at", &path))?.len();
        let chunks = futures_util::stream::unfold(file, |mut file| async {
            let mut chunk = Vec::with_capacity(CHUNK);
            match (&mut file).take(CHUNK as u64).read_to_end(&mut chunk).await {
                Ok(0) => None,
                Ok(_) => Some((Ok(chunk), file)),
                Err(e) => Some((Err(e), file)),
            }
        });
        Ok((Body::from_stream(chunks), size))
    }

    /// Takes a file in, if its SHA-256 is what it is said to be.
    ///
    /// # Errors
    /// Another hash, too large, it stands still, or the disk fails. Nothing is kept then.
    pub async fn put(&self, sha256: &str, body: Body) -> Result<BootFile> {
        let path = self.path(sha256)?;
        let aside = Aside(self.incoming.join(uuid::Uuid::new_v4().to_string()));
        let mut file = File::create_new(&aside.0).await.map_err(Error::file("making", &aside.0))?;
        let (hash, size) = receive(body.into_data_stream(), &mut file, &aside.0).await?;
        if hash != sha256 {
            return Err(invalid(
                format!("the {size} bytes received have SHA-256 {hash}, not {sha256}"),
                "nothing was kept; send it again, to the path of its own hash",
            )
            .into());
        }
        file.sync_all().await.map_err(Error::file("syncing", &aside.0))?;
        fs::rename(&aside.0, &path).await.map_err(Error::file("naming", &path))?;
        let dir = File::open(&self.dir).await.map_err(Error::file("opening", &self.dir))?;
        dir.sync_all().await.map_err(Error::file("syncing", &self.dir))?;
        tracing::info!(sha256, size, "boot file put");
        Ok(BootFile { sha256: hash, size })
    }

    fn path(&self, sha256: &str) -> Result<PathBuf> {
        let ok =
            sha256.len() == 64 && sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if ok {
            return Ok(self.dir.join(sha256));
        }
        let hint = "a boot file is named by its SHA-256: 64 lower-case hexadecimal digits";
        Err(invalid("that is no boot file's name", hint).into())
    }
}

async fn receive(mut body: BodyDataStream, file: &mut File, path: &Path) -> Result<(String, u64)> {
    let (mut hash, mut size) = (Sha256::new(), 0_u64);
    let broken = |why: String| invalid(format!("the upload broke off: {why}"), "send it again");
    loop {
        let next = tokio::time::timeout(IDLE, body.next()).await;
        let Some(chunk) = next.map_err(|_| broken("nothing came for 60 s".into()))? else { break };
        let chunk = chunk.map_err(|e| broken(e.to_string()))?;
        size = size.saturating_add(chunk.len() as u64);
        if size > MAX_FILE {
            let error = ApiError::new(Code::TooLarge, "the file is larger than 16 GiB");
            return Err(error.hint("a node image is made of smaller files").into());
        }
        hash.update(&chunk);
        file.write_all(&chunk).await.map_err(Error::file("writing", path))?;
    }
    file.flush().await.map_err(Error::file("writing", path))?;
    Ok((hex::encode(hash.finalize()), size))
}
