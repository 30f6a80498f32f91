//! What a booting node and whoever publishes for it call. Files are hashed as they stream by, never held in memory.

use std::path::Path;
use std::time::Duration;

use commonage_plc_api::boot::{BootRequest, BootResponse};
use commonage_plc_api::rest::BootFile;
use futures_util::TryStreamExt as _;
use reqwest::header::CONTENT_LENGTH;
use reqwest::{Body, Method, Response, StatusCode};
use sha2::{Digest as _, Sha256};
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::{Client, Error, Result};

const CHUNK: usize = 256 << 10;
/// An upload that stands still for so long is over; PLC syncs a whole file to its disk before it answers.
const STILL_S: u64 = 300;

impl Client {
    /// Asks how to boot. What comes back is run only after [`BootResponse::verify`].
    ///
    /// # Errors
    /// As any call; PLC refuses a node it does not know.
    pub async fn boot(&self, request: &BootRequest) -> Result<BootResponse> {
        self.send(Method::POST, "v1/boot", request).await
    }

    /// Fetches a boot file into `into`, telling `progress` how many bytes there are so far. What was written counts only if this succeeds:
    /// size and SHA-256 were right.
    ///
    /// # Errors
    /// As any call; the file has another size or hash; `into` cannot be written.
    pub async fn download_boot_file<W: AsyncWrite + Unpin>(
        &self,
        sha256: &str,
        size: u64,
        into: &mut W,
        mut progress: impl FnMut(u64),
    ) -> Result<()> {
        let mut hash = Sha256::new();
        let each = |chunk: &[u8], got| {
            hash.update(chunk);
            progress(got);
        };
        self.stream_boot_file(sha256, size, into, each).await?;
        let is = hex::encode(hash.finalize());
        if is == sha256 { Ok(()) } else { Err(damaged(sha256, format!("its SHA-256 is {is}"))) }
    }

    /// [`Client::download_boot_file`] for who reads back and hashes what was written: only the size is checked, so nothing is hashed twice.
    ///
    /// # Errors
    /// As any call; the file has another size; `into` cannot be written.
    pub async fn download_unhashed_boot_file<W: AsyncWrite + Unpin>(
        &self,
        sha256: &str,
        size: u64,
        into: &mut W,
        mut progress: impl FnMut(u64),
    ) -> Result<()> {
        self.stream_boot_file(sha256, size, into, |_, got| progress(got)).await
    }

    /// Gives each piece, and the number of bytes with it, to `each` and writes it.
    async fn stream_boot_file<W: AsyncWrite + Unpin>(
        &self,
        sha256: &str,
        size: u64,
        into: &mut W,
        mut each: impl FnMut(&[u8], u64),
    ) -> Result<()> {
        let request = self.request(Method::GET, &format!("v1/boot/files/{}", checked(sha256)?))?;
        let mut response = self.answer(request, 0).await?;
        let local = |source| Error::Local { what: format!("writing boot file {sha256}"), source };
        let mut got = 0_u64;
        while let Some(chunk) = self.chunk(&mut response).await? {
            let chunk = &*chunk;
            got = got.saturating_add(chunk.len() as u64);
            if got > size {
                return Err(damaged(sha256, format!("it is longer than {size} bytes")));
            }
            into.write_all(chunk).await.map_err(local)?;
            each(chunk, got);
        }
        into.flush().await.map_err(local)?;
        if got != size {
            return Err(damaged(sha256, format!("it has {got} bytes instead of {size}")));
        }
        Ok(())
    }

    /// The size of a boot file that PLC has.
    ///
    /// # Errors
    /// As any call. That PLC has no such file is no error.
    pub async fn boot_file_size(&self, sha256: &str) -> Result<Option<u64>> {
        let request = self.request(Method::HEAD, &format!("v1/boot/files/{}", checked(sha256)?))?;
        // The answer to HEAD has no body, so an error comes as its bare status.
        let response = request.send().await.map_err(|e| Error::transport(self.url(), &e))?;
        match response.status() {
            StatusCode::OK => Ok(length(&response)),
            StatusCode::NOT_FOUND => Ok(None),
            status => Err(Error::unreadable(self.url(), format_args!("HTTP status {status}"))),
        }
    }

    /// Puts a file at PLC for boot scripts to name, unless PLC has it already. `progress` is told the bytes sent so far and the whole.
    ///
    /// # Errors
    /// As any call; the file cannot be read, or changes meanwhile.
    pub async fn upload_boot_file(
        &self,
        path: &Path,
        progress: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<BootFile> {
        let local = |source| Error::Local { what: format!("reading {}", path.display()), source };
        let file = hash_file(path).await.map_err(local)?;
        if self.boot_file_size(&file.sha256).await? == Some(file.size) {
            return Ok(file);
        }
        let source = File::open(path).await.map_err(local)?;
        self.put_boot_file(&file.sha256, file.size, source, progress).await
    }

    /// Puts `size` bytes from `source` at PLC, which takes them only if their SHA-256 is `sha256`.
    ///
    /// # Errors
    /// As any call; `source` fails or holds something else.
    pub async fn put_boot_file<R: AsyncRead + Unpin + Send + 'static>(
        &self,
        sha256: &str,
        size: u64,
        source: R,
        mut progress: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<BootFile> {
        let (moved, mut moves) = tokio::sync::watch::channel(());
        let stream = futures_util::stream::unfold((source.take(size), 0_u64), move |(mut source, sent)| {
            moved.send_replace(());
            async move {
                let mut chunk = Vec::with_capacity(CHUNK);
                match (&mut source).take(CHUNK as u64).read_to_end(&mut chunk).await {
                    Ok(0) => None,
                    Ok(n) => Some((Ok(chunk), (source, sent + n as u64))),
                    Err(e) => Some((Err(e), (source, sent))),
                }
            }
        });
        let mut sent = 0;
        let stream = stream.inspect_ok(move |chunk| {
            sent += chunk.len() as u64;
            progress(sent, size);
        });
        let request = self
            .request(Method::PUT, &format!("v1/boot/files/{}", checked(sha256)?))?
            .header(CONTENT_LENGTH, size)
            .body(Body::wrap_stream(stream));
        let answer = request.send();
        tokio::pin!(answer);
        // The whole may take long; only standing still is an error.
        let response = loop {
            tokio::select! {
                response = &mut answer => break response.map_err(|e| Error::transport(self.url(), &e))?,
                alive = tokio::time::timeout(Duration::from_secs(STILL_S), moved_on(&mut moves)) => {
                    alive.map_err(|_| Error::silence(self.url(), STILL_S))?;
                }
            }
        };
        self.read_answer(response).await
    }
}

/// Returns when the sender has moved; never once it is done, when only the limit on the answer remains.
async fn moved_on(moves: &mut tokio::sync::watch::Receiver<()>) {
    if moves.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn damaged(sha256: &str, why: String) -> Error {
    Error::Damaged { sha256: sha256.to_owned(), why }
}

fn length(response: &Response) -> Option<u64> {
    response.headers().get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn checked(sha256: &str) -> Result<&str> {
    let ok = sha256.len() == 64 && sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if ok {
        return Ok(sha256);
    }
    let why = "that is not 64 lower-case hexadecimal digits".to_owned();
    Err(Error::Damaged { sha256: sha256.chars().take(70).collect(), why })
}

async fn hash_file(path: &Path) -> std::io::Result<BootFile> {
    let mut file = File::open(path).await?;
    let (mut hash, mut size, mut buffer) = (Sha256::new(), 0_u64, vec![0; CHUNK]);
    loop {
        let n = file.read(&mut buffer).await?;
        let Some(read) = buffer.get(..n).filter(|r| !r.is_empty()) else { break };
        hash.update(read);
        size += n as u64;
    }
    Ok(BootFile { sha256: hex::encode(hash.finalize()), size })
}
