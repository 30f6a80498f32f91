//! PLC's keys: its CA, its server's identity, the online key, and the first administrator.
//!
//! Made on the first start, each file written aside, synced and renamed, keys with mode 0600. An interrupted first start is
//! completed by the next. Certificates do not expire of themselves (a node's clock may be wrong by years when it boots):
//! whom PLC knows is decided by the database at each call.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result, invalid};

/// PLC's keys.
pub struct Keys {
    /// The CA's certificate, PEM.
    pub ca_pem: String,
    /// Signs boot grants.
    pub online: SigningKey,
    issuer: Issuer<'static, KeyPair>,
    server: (CertificateDer<'static>, PrivateKeyDer<'static>),
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").finish_non_exhaustive()
    }
}

/// A certificate for somebody.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The certificate, PEM.
    pub pem: String,
    /// SHA-256 of its public key.
    pub key_sha256: String,
}

impl Keys {
    /// Reads the keys in `state`, making those that are not there. The server's certificate is for `names`.
    ///
    /// # Errors
    /// A file can't be used, or is no key.
    pub fn open(state: &Path, names: &[String]) -> Result<Self> {
        let ca_key = key(&state.join("ca/key.pem"))?;
        let ca_pem = keep(&state.join("ca/cert.pem"), || {
            let certificate = ca_params().self_signed(&ca_key).map_err(pki("making the CA's certificate"))?;
            Ok(certificate.pem())
        })?;
        let issuer =
            Issuer::from_ca_cert_pem(&ca_pem, ca_key).map_err(pki("reading the CA's certificate"))?;
        let online = keep(&state.join("online/key.pem"), || {
            let mut secret = [0; 32];
            getrandom::fill(&mut secret).map_err(pki("making the online key"))?;
            let pem = SigningKey::from_bytes(&secret).to_pkcs8_pem(LineEnding::LF);
            Ok(pem.map_err(pki("making the online key"))?.to_string())
        })?;
        let online = SigningKey::from_pkcs8_pem(&online).map_err(pki("reading the online key"))?;
        let server_key = key(&state.join("server/key.pem"))?;
        // Made anew at each start: the names may be others now.
        let certificate = server_params(names)?
            .signed_by(&server_key, &issuer)
            .map_err(pki("making the server's certificate"))?;
        write(&state.join("server/cert.pem"), &certificate.pem())?;
        let server_key = PrivateKeyDer::from_pem_slice(server_key.serialize_pem().as_bytes())
            .map_err(pki("reading the server's key"))?;
        Ok(Self { ca_pem, online, issuer, server: (certificate.der().clone(), server_key) })
    }

    /// The administrator's certificate in `state/admin`, made if it isn't there, with what the command line needs.
    ///
    /// # Errors
    /// A file can't be used.
    pub fn admin(&self, state: &Path, url: &str) -> Result<String> {
        let dir = state.join("admin");
        let key = key(&dir.join("key.pem"))?;
        let pem = keep(&dir.join("cert.pem"), || {
            let request = CertificateParams::default().serialize_request(&key);
            let request = request.and_then(|r| r.pem()).map_err(pki("making the administrator's request"))?;
            Ok(self.issue(&request, "admin")?.pem)
        })?;
        write(&dir.join("ca.pem"), &self.ca_pem)?;
        write(&dir.join("url"), &format!("{url}\n"))?;
        let der = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(pki("reading the administrator's certificate"))?;
        key_sha256(&der).map_err(pki("reading the administrator's certificate"))
    }

    /// A client certificate for the public key of a request. Nothing else of the request is believed.
    ///
    /// # Errors
    /// The request is not one, or is not signed by its own key.
    pub fn issue(&self, csr_pem: &str, name: &str) -> Result<Issued> {
        let refuse = |why: String| {
            Error::from(invalid(
                format!("the certificate request cannot be used: {why}"),
                "send a PKCS #10 request in PEM, with an ECDSA P-256 or P-384, Ed25519 or RSA key",
            ))
        };
        let request =
            CertificateSigningRequestParams::from_pem(csr_pem).map_err(|e| refuse(e.to_string()))?;
        let mut params = params(name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let request = CertificateSigningRequestParams { params, public_key: request.public_key };
        let certificate = request.signed_by(&self.issuer).map_err(|e| refuse(e.to_string()))?;
        let key_sha256 = key_sha256(certificate.der()).map_err(|e| refuse(e.to_string()))?;
        Ok(Issued { pem: certificate.pem(), key_sha256 })
    }

    /// How the server does TLS: 1.3, and only with clients whose certificates the CA signed.
    ///
    /// # Errors
    /// The keys don't fit together.
    pub fn tls(&self) -> Result<rustls::ServerConfig> {
        let bad = pki("preparing TLS");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_slice(self.ca_pem.as_bytes()).map_err(pki("preparing TLS"))?;
        roots.add(ca).map_err(pki("preparing TLS"))?;
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(pki("preparing TLS"))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(pki("preparing TLS"))?
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![self.server.0.clone()], self.server.1.clone_key())
            .map_err(bad)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// SHA-256 of a certificate's public key (SubjectPublicKeyInfo), lower-case hexadecimal: who somebody is.
///
/// # Errors
/// It is no certificate.
pub fn key_sha256(certificate: &CertificateDer<'_>) -> std::result::Result<String, rustls::Error> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    Ok(hex::encode(Sha256::digest(parsed.subject_public_key_info())))
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params
}

fn ca_params() -> CertificateParams {
    let mut params = params("Commonage PLC CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn server_params(names: &[String]) -> Result<CertificateParams> {
    let mut params = params("Commonage PLC");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    for name in names {
        params.subject_alt_names.push(match name.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => {
                let bad = |e: rcgen::Error| Error::Pki { what: "--name", why: format!("{name:?}: {e}") };
                SanType::DnsName(name.as_str().try_into().map_err(bad)?)
            }
        });
    }
    Ok(params)
}

fn key(path: &Path) -> Result<KeyPair> {
    let pem = keep(path, || Ok(KeyPair::generate().map_err(pki("making a key"))?.serialize_pem()))?;
    KeyPair::from_pem(&pem)
        .map_err(|e| Error::Pki { what: "reading a key", why: format!("{}: {e}", path.display()) })
}

fn pki<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |why| Error::Pki { what, why: why.to_string() }
}

/// What is in a file; made by `make` if there is none.
fn keep(path: &Path, make: impl FnOnce() -> Result<String>) -> Result<String> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let text = make()?;
            write(path, &text)?;
            Ok(text)
        }
        Err(e) => Err(Error::file("reading", path)(e)),
    }
}

/// Writes a file that only its owner can read, whole or not at all.
fn write(path: &Path, text: &str) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let aside: PathBuf = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&aside, path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(Error::file("writing", path))
}
