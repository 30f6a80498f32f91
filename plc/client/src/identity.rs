//! Who a client is: a private key that never leaves it, and the request by which PLC certifies its public half.
//!
//! Keys are ECDSA P-256 (every TLS library understands them). PLC takes nothing from a request but the public key.

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

use crate::{Error, Result};

/// A new key and its certificate signing request.
#[derive(Clone)]
pub struct NewIdentity {
    /// The private key, PKCS #8 PEM. Write it with mode 0600.
    pub key_pem: String,
    /// The certificate signing request, PEM.
    pub csr_pem: String,
}

impl std::fmt::Debug for NewIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewIdentity").field("csr_pem", &self.csr_pem).finish_non_exhaustive()
    }
}

/// Makes a key and a request. `name` is for people who look at the request.
///
/// # Errors
/// The random source or the encoder fails.
pub fn generate(name: &str) -> Result<NewIdentity> {
    let key = KeyPair::generate().map_err(|e| bad("new key", &e))?;
    Ok(NewIdentity { csr_pem: request(&key, name)?, key_pem: key.serialize_pem() })
}

/// Makes a request for a key that exists.
///
/// # Errors
/// The PEM is not a private key.
pub fn csr(key_pem: &str, name: &str) -> Result<String> {
    request(&KeyPair::from_pem(key_pem).map_err(|e| bad("private key", &e))?, name)
}

fn request(key: &KeyPair, name: &str) -> Result<String> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let request = params.serialize_request(key).map_err(|e| bad("certificate request", &e))?;
    request.pem().map_err(|e| bad("certificate request", &e))
}

fn bad(what: &'static str, why: &rcgen::Error) -> Error {
    Error::Identity { what, why: why.to_string() }
}
