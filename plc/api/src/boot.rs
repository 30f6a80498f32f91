//! The boot server's documents.
//!
//! A node that boots posts a [`BootRequest`] to `POST /v1/boot` (mutual TLS with the node's own certificate) and gets a [`BootResponse`]:
//! the boot script, signed by the *offline* key, and a grant, signed by PLC's *online* key, that binds this script to this node and this boot.
//! [`BootResponse::verify`] is the only way to a [`Verified`] script, and only that can be run.
//! Files are then fetched from `GET /v1/boot/files/{sha256}` and checked against the hash in the script.
//!
//! Signatures are Ed25519 (RFC 8032) over a context string, a zero byte and the document's exact bytes, so a signature of one kind of document is never one of another.

use std::collections::BTreeMap;

use commonage_isolation_api::NodeId;
use commonage_nodemgr_api::Bytes;
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use utoipa::ToSchema;

const SCRIPT_CONTEXT: &[u8] = b"commonage boot script v1\0";
const GRANT_CONTEXT: &[u8] = b"commonage boot grant v1\0";

/// What is on a node's CD besides the kernel and boot-cd: `/etc/commonage/node.json` of its initramfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeConfig {
    /// Who it is.
    pub node: NodeId,
    /// Where PLC is: `https://host:port`.
    pub plc: String,
    /// The CA that PLC's certificate must come from, PEM.
    pub ca_pem: String,
    /// The node's certificate, PEM.
    pub cert_pem: String,
    /// Its private key, PEM.
    pub key_pem: String,
    /// The offline key that boot scripts are signed with, 32 bytes.
    pub offline_key: Bytes,
    /// PLC's online key that grants are signed with, 32 bytes.
    pub online_key: Bytes,
}

/// A node asks how to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootRequest {
    /// Who it says it is; must be the node of the certificate.
    #[schema(value_type = String)]
    pub node: NodeId,
    /// 32 random bytes, new for each boot.
    #[schema(value_type = String, format = Byte)]
    pub nonce: Bytes,
    /// What it is made of.
    pub facts: Facts,
}

/// Hardware facts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Facts {
    /// Processors.
    pub cpus: u32,
    /// Processor model.
    pub cpu_model: String,
    /// Hardware virtualisation: `svm`, `vmx` or empty.
    pub virtualisation: String,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Disks: name and bytes.
    pub disks: BTreeMap<String, u64>,
    /// Network interfaces: name and MAC address.
    pub interfaces: BTreeMap<String, String>,
    /// `bios` or `uefi`.
    pub firmware: String,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BootResponse {
    /// A [`Script`] as JSON, exactly as signed.
    #[schema(value_type = String, format = Byte)]
    pub script: Bytes,
    /// By the offline key.
    #[schema(value_type = String, format = Byte)]
    pub script_signature: Bytes,
    /// A [`Grant`] as JSON, exactly as signed.
    #[schema(value_type = String, format = Byte)]
    pub grant: Bytes,
    /// By PLC's online key.
    #[schema(value_type = String, format = Byte)]
    pub grant_signature: Bytes,
}

/// A boot script: steps in order. Nothing in it can name a program: boot-cd knows how to do these steps and no others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// For people: which release this is.
    pub release: String,
    /// The steps.
    pub steps: Vec<Step>,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Step {
    /// Makes sure that the first disk of at least `min_mib` has the image and the state partition (GPT, labels
    /// `commonage-image` and `commonage-state`), each with a file system. What is right already is left alone.
    Partition {
        /// Smallest disk to take, MiB.
        min_mib: u64,
        /// Size of the image partition, MiB. The rest is state.
        image_mib: u64,
    },
    /// Makes sure that the image partition holds exactly these files: those with the right hash stay, others are fetched,
    /// written aside, synced, read back and renamed.
    Install {
        /// By file name.
        files: BTreeMap<String, ImageFile>,
    },
    /// Starts the installed kernel.
    Kexec {
        /// File name of the kernel.
        kernel: String,
        /// File name of the initramfs; boot-cd appends the node's own configuration.
        initramfs: String,
        /// Kernel command line.
        cmdline: String,
    },
}

/// A file of the node image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageFile {
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
    /// Bytes.
    pub size: u64,
}

/// PLC's word that a script is for one boot of one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// Which node.
    pub node: NodeId,
    /// The request's nonce.
    pub nonce: Bytes,
    /// SHA-256 of the script's bytes, lower-case hexadecimal.
    pub script_sha256: String,
    /// Not after this. The CD's clock may be wrong at first, so the grant also brings PLC's time.
    pub expires: Timestamp,
    /// PLC's time.
    pub now: Timestamp,
}

/// Why a boot response is not run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// A key on the CD is not one.
    #[error("the {0} key on this CD is damaged; write a new CD for this node")]
    Key(&'static str),
    /// The script's signature is wrong.
    #[error(
        "the boot script is not signed by the offline key on this CD; publish a script signed with that key, or write a new CD"
    )]
    ScriptSignature,
    /// The grant's signature is wrong.
    #[error(
        "the boot grant is not signed by PLC's online key on this CD; if PLC's key was replaced, write a new CD for this node"
    )]
    GrantSignature,
    /// Signed, but not what this version understands.
    #[error("the signed {what} cannot be read ({why}); the CD may be older than the script: write a new CD")]
    Malformed {
        /// Which document.
        what: &'static str,
        /// The parser's words.
        why: String,
    },
    /// For another node.
    #[error("the boot grant is for node {0}, not for this one")]
    OtherNode(NodeId),
    /// For another boot.
    #[error("the boot grant answers another boot's nonce: an old answer was replayed")]
    OtherBoot,
    /// For another script.
    #[error("the boot grant is for another script than the one sent")]
    OtherScript,
    /// Too late.
    #[error("the boot grant expired at {0}")]
    Expired(Timestamp),
}

/// A script whose signature, node, boot and time were checked. Only this can be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified<T>(T);

impl<T> Verified<T> {
    /// What was verified.
    pub fn get(&self) -> &T {
        &self.0
    }
}

/// Signs a script's bytes with the offline key.
pub fn sign_script(key: &SigningKey, script: &[u8]) -> Bytes {
    sign(key, SCRIPT_CONTEXT, script)
}

/// Signs a grant's bytes with the online key.
pub fn sign_grant(key: &SigningKey, grant: &[u8]) -> Bytes {
    sign(key, GRANT_CONTEXT, grant)
}

/// Whether `signature` is `key`'s (32 bytes) for the script's bytes.
///
/// # Errors
/// [`VerifyError::Key`] or [`VerifyError::ScriptSignature`].
pub fn verify_script(key: &[u8], script: &[u8], signature: &[u8]) -> Result<(), VerifyError> {
    check(key, "offline", SCRIPT_CONTEXT, script, signature, VerifyError::ScriptSignature)
}

impl BootResponse {
    /// Checks everything: the script by the offline key, the grant by the online key, and that the grant is for this
    /// node, this nonce, this script, and not expired at `now`.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn verify(
        &self,
        config: &NodeConfig,
        nonce: &[u8],
        elapsed: jiff::SignedDuration,
    ) -> Result<(Verified<Script>, Grant), VerifyError> {
        verify_script(&config.offline_key.0, &self.script.0, &self.script_signature.0)?;
        let (grant, signature) = (&self.grant.0, &self.grant_signature.0);
        check(&config.online_key.0, "online", GRANT_CONTEXT, grant, signature, VerifyError::GrantSignature)?;
        let grant: Grant = parse("grant", grant)?;
        let script: Script = parse("script", &self.script.0)?;
        if grant.node != config.node {
            return Err(VerifyError::OtherNode(grant.node));
        }
        if grant.nonce.0 != nonce {
            return Err(VerifyError::OtherBoot);
        }
        if grant.script_sha256 != hex::encode(Sha256::digest(&self.script.0)) {
            return Err(VerifyError::OtherScript);
        }
        // The CD's own clock is not to be believed before this grant, so time is counted from PLC's: what has passed since the request was sent.
        if grant.now.saturating_add(elapsed).map_or(true, |t| t >= grant.expires) {
            return Err(VerifyError::Expired(grant.expires));
        }
        Ok((Verified(script), grant))
    }
}

fn sign(key: &SigningKey, context: &[u8], document: &[u8]) -> Bytes {
    Bytes(key.sign(&[context, document].concat()).to_bytes().to_vec())
}

fn check(
    key: &[u8],
    name: &'static str,
    context: &[u8],
    document: &[u8],
    signature: &[u8],
    error: VerifyError,
) -> Result<(), VerifyError> {
    let key: &[u8; 32] = key.try_into().map_err(|_| VerifyError::Key(name))?;
    let key = VerifyingKey::from_bytes(key).map_err(|_| VerifyError::Key(name))?;
    let Ok(signature) = Signature::from_slice(signature) else { return Err(error) };
    key.verify_strict(&[context, document].concat(), &signature).map_err(|_| error)
}

fn parse<T: serde::de::DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, VerifyError> {
    serde_json::from_slice(bytes).map_err(|e| VerifyError::Malformed { what, why: e.to_string() })
}
