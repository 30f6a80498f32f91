//! The connection: TLS with both ends' certificates, time limits, JSON in and out.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use commonage_plc_api::ErrorBody;
use commonage_plc_api::boot::NodeConfig;
use reqwest::{Method, RequestBuilder, Response, Url};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{CipherSuite, ClientConfig, RootCertStore};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

const CONNECT: Duration = Duration::from_secs(10);
/// For a call that PLC answers at once; a long poll adds what it waits.
const ANSWER_S: u64 = 30;
/// Without a byte for so long, a transfer is over.
const IDLE_S: u64 = 60;
/// No JSON answer is larger, bytes.
const MAX_ANSWER: usize = 64 << 20;

/// A client of one PLC. Cheap to clone; calls may run side by side.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
}

impl Client {
    /// A client of the PLC at `url` (`https://host:port`), which must be signed by `ca_pem`; it is the principal or node of `cert_pem`.
    /// Nothing is sent yet.
    ///
    /// # Errors
    /// The address or one of the PEMs cannot be used.
    pub fn new(url: &str, ca_pem: &str, cert_pem: &str, key_pem: &str) -> Result<Self> {
        let bad_url = |why: String| Error::Url { url: url.to_owned(), why };
        let base = Url::parse(url).map_err(|e| bad_url(e.to_string()))?;
        if base.scheme() != "https" {
            return Err(bad_url("it does not begin with https://".into()));
        }
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls(ca_pem, cert_pem, key_pem)?)
            .https_only(true)
            .http1_only()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .hickory_dns(true)
            .connect_timeout(CONNECT)
            // Well before PLC ends an idle connection, so that none is used just as it ends.
            .pool_idle_timeout(Duration::from_secs(20))
            // A long poll may wait ten minutes; a peer that is gone is noticed earlier.
            .tcp_keepalive(Duration::from_secs(15))
            .user_agent(concat!("commonage/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| Error::transport(url, &e))?;
        Ok(Self { http, base })
    }

    /// A client that is the node whose configuration this is.
    ///
    /// # Errors
    /// As [`Client::new`].
    pub fn for_node(config: &NodeConfig) -> Result<Self> {
        Self::new(&config.plc, &config.ca_pem, &config.cert_pem, &config.key_pem)
    }

    /// Where PLC is.
    pub fn url(&self) -> &str {
        self.base.as_str()
    }

    pub(crate) async fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A> {
        self.json(self.request(Method::GET, path)?, 0).await
    }

    pub(crate) async fn get_waiting<A: DeserializeOwned>(
        &self,
        path: &str,
        after: u64,
        wait_s: u32,
    ) -> Result<A> {
        let path = format!("{path}?after={after}&wait_s={wait_s}");
        self.json(self.request(Method::GET, &path)?, wait_s.into()).await
    }

    pub(crate) async fn send<B: Serialize, A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &B,
    ) -> Result<A> {
        self.json(self.request(method, path)?.json(body), 0).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<()> {
        let _: serde_json::Value = self.json(self.request(Method::DELETE, path)?, 0).await?;
        Ok(())
    }

    /// A request without a body. `path` may carry a query.
    pub(crate) fn request(&self, method: Method, path: &str) -> Result<RequestBuilder> {
        let url = self
            .base
            .join(path)
            .map_err(|e| Error::Url { url: format!("{}{path}", self.base), why: e.to_string() })?;
        Ok(self.http.request(method, url))
    }

    /// Sends and waits for the head of a successful answer, at most `ANSWER_S + extra_s` seconds.
    pub(crate) async fn answer(&self, request: RequestBuilder, extra_s: u64) -> Result<Response> {
        let limit = ANSWER_S + extra_s;
        let response = tokio::time::timeout(Duration::from_secs(limit), request.send())
            .await
            .map_err(|_| Error::silence(self.url(), limit))?
            .map_err(|e| Error::transport(self.url(), &e))?;
        self.successful(response).await
    }

    /// An error status becomes PLC's error.
    async fn successful(&self, response: Response) -> Result<Response> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.body(response).await?;
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => Err(Error::Api(body.error)),
            Err(_) => Err(Error::unreadable(self.url(), format_args!("HTTP status {status}"))),
        }
    }

    async fn json<A: DeserializeOwned>(&self, request: RequestBuilder, extra_s: u64) -> Result<A> {
        let response = self.answer(request, extra_s).await?;
        self.read_answer(response).await
    }

    pub(crate) async fn read_answer<A: DeserializeOwned>(&self, response: Response) -> Result<A> {
        let response = self.successful(response).await?;
        let body = self.body(response).await?;
        serde_json::from_slice(&body).map_err(|e| Error::unreadable(self.url(), e))
    }

    async fn body(&self, mut response: Response) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk(&mut response).await? {
            if body.len().saturating_add(chunk.len()) > MAX_ANSWER {
                return Err(Error::unreadable(self.url(), format_args!("over {MAX_ANSWER} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    /// The next bytes of an answer; none for [`IDLE_S`] is an error.
    pub(crate) async fn chunk(
        &self,
        response: &mut Response,
    ) -> Result<Option<impl Deref<Target = [u8]> + use<>>> {
        let chunk = tokio::time::timeout(Duration::from_secs(IDLE_S), response.chunk()).await;
        chunk.map_err(|_| Error::silence(self.url(), IDLE_S))?.map_err(|e| Error::transport(self.url(), &e))
    }
}

fn tls(ca_pem: &str, cert_pem: &str, key_pem: &str) -> Result<ClientConfig> {
    let bad = |what| move |e: &dyn std::fmt::Display| Error::Identity { what, why: e.to_string() };
    let certificates = |what: &'static str, pem: &str| -> Result<Vec<CertificateDer<'static>>> {
        let all: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
        let all = all.map_err(|e| bad(what)(&e))?;
        if all.is_empty() { Err(bad(what)(&"it holds no PEM certificate")) } else { Ok(all) }
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates("CA certificate", ca_pem)? {
        roots.add(certificate).map_err(|e| bad("CA certificate")(&e))?;
    }
    let chain = certificates("client certificate", cert_pem)?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|e| bad("private key")(&e))?;
    let mut provider = rustls::crypto::ring::default_provider();
    // The first that the server has too is used, and ours has all. Of these ChaCha20 alone is fast on every processor: next to a network
    // AES is no faster where its instructions are real (8 and 2.4 GB/s), and half as fast where they are emulated, as in tests.
    provider.cipher_suites.sort_by_key(|s| s.suite() != CipherSuite::TLS13_CHACHA20_POLY1305_SHA256);
    ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| bad("TLS library")(&e))?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(|e| bad("client certificate with its key")(&e))
}
