//! The SSH host key of a sliver, as OpenSSH keeps it (`PROTOCOL.key` of its sources): Ed25519, without a passphrase.
//!
//! Pure: the random numbers are passed in. Nothing here keeps or logs a secret.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::SigningKey;

/// What both parts say the key is.
const ALGORITHM: &[u8] = b"ssh-ed25519";
/// What the key's file starts with, in base64.
const MAGIC: &[u8] = b"openssh-key-v1\0";
/// The block size of "no cipher", to which the secret part is padded.
const BLOCK: usize = 8;
/// Characters of a line, as `ssh-keygen` writes them.
const LINE: usize = 70;

/// A key pair in the two files' format.
#[derive(Clone, PartialEq, Eq)]
pub struct HostKey {
    /// `ssh_host_ed25519_key`.
    pub private: String,
    /// `ssh_host_ed25519_key.pub`.
    pub public: String,
}

impl HostKey {
    /// The key pair that these random bits make; `check` is any number, by which a wrong passphrase would show.
    pub fn new(seed: [u8; 32], check: [u8; 4], comment: &str) -> Self {
        let public = SigningKey::from_bytes(&seed).verifying_key().to_bytes();
        let mut public_blob = Vec::new();
        string(&mut public_blob, ALGORITHM);
        string(&mut public_blob, &public);

        let mut secret = [check, check].concat();
        string(&mut secret, ALGORITHM);
        string(&mut secret, &public);
        string(&mut secret, &[seed, public].concat());
        string(&mut secret, comment.as_bytes());
        for pad in 1_u8.. {
            if secret.len().is_multiple_of(BLOCK) {
                break;
            }
            secret.push(pad);
        }

        let mut blob = MAGIC.to_vec();
        for cipher_and_key_derivation in [&b"none"[..], b"none", b""] {
            string(&mut blob, cipher_and_key_derivation);
        }
        blob.extend(1_u32.to_be_bytes());
        string(&mut blob, &public_blob);
        string(&mut blob, &secret);

        let mut private = "-----BEGIN OPENSSH PRIVATE KEY-----\n".to_owned();
        for (at, character) in STANDARD.encode(blob).chars().enumerate() {
            if at > 0 && at.is_multiple_of(LINE) {
                private.push('\n');
            }
            private.push(character);
        }
        private.push_str("\n-----END OPENSSH PRIVATE KEY-----\n");
        Self { private, public: format!("ssh-ed25519 {} {comment}\n", STANDARD.encode(public_blob)) }
    }
}

/// A string of RFC 4251 §5. All of ours are short.
fn string(to: &mut Vec<u8>, bytes: &[u8]) {
    to.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
    to.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seed and key are RFC 8032's first test vector.
    #[test]
    fn the_public_part_is_the_seeds() {
        let seed: [u8; 32] =
            hex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60").try_into().unwrap();
        let key = HostKey::new(seed, *b"abcd", "root@princeton-codeen");
        let public = hex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a");
        let mut blob = b"\0\0\0\x0bssh-ed25519\0\0\0\x20".to_vec();
        blob.extend(public);
        assert_eq!(key.public, format!("ssh-ed25519 {} root@princeton-codeen\n", STANDARD.encode(blob)));
        assert!(key.private.lines().all(|line| line.len() <= LINE));
    }

    #[test]
    fn the_private_part_holds_what_the_format_says() {
        let key = HostKey::new([7; 32], [1, 2, 3, 4], "c");
        let text: String = key.private.lines().filter(|line| !line.starts_with('-')).collect();
        let blob = STANDARD.decode(text).unwrap();
        let rest =
            blob.strip_prefix(b"openssh-key-v1\0\0\0\0\x04none\0\0\0\x04none\0\0\0\0\0\0\0\x01").unwrap();
        let (public, rest) = take(rest);
        let (secret, rest) = take(rest);
        assert!(rest.is_empty());
        assert_eq!(STANDARD.encode(public), key.public.split(' ').nth(1).unwrap());
        assert_eq!(secret.len() % BLOCK, 0);
        assert_eq!(secret[..8], [1, 2, 3, 4, 1, 2, 3, 4]);
        let (algorithm, rest) = take(&secret[8..]);
        let (public, rest) = take(rest);
        let (pair, rest) = take(rest);
        let (comment, padding) = take(rest);
        assert_eq!((algorithm, comment), (ALGORITHM, &b"c"[..]));
        assert_eq!(pair, [&[7; 32], public].concat());
        assert!(padding.iter().zip(1_u8..).all(|(a, b)| *a == b));
        assert!(key.public != HostKey::new([8; 32], [1, 2, 3, 4], "c").public);
    }

    #[test]
    #[ignore = "needs ssh-keygen"]
    fn openssh_reads_it() {
        let key = HostKey::new([9; 32], [1, 2, 3, 4], "root@sliver");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, &key.private).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let output = std::process::Command::new("ssh-keygen").arg("-y").arg("-f").arg(path).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), key.public);
    }

    fn take(bytes: &[u8]) -> (&[u8], &[u8]) {
        let (len, rest) = bytes.split_at(4);
        rest.split_at(u32::from_be_bytes(len.try_into().unwrap()) as usize)
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }
}
