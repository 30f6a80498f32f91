//! OpenSSH public keys, checked before they are given to nodes: one line, no options, a key of the kind it says (RFC 4253 §6.6).

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use commonage_plc_api::ApiError;
use commonage_plc_api::rest::SshKey;
use sha2::{Digest as _, Sha256};

use crate::error::invalid;

const KINDS: [&str; 7] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];
const MAX_LINE: usize = 4096;

/// Reads a line as in `id_ed25519.pub`.
///
/// # Errors
/// It is not one.
pub fn parse(line: &str) -> Result<SshKey, ApiError> {
    let refuse = |why: &str| {
        invalid(
            format!("that is no OpenSSH public key: {why}"),
            "give the one line of a file like id_ed25519.pub",
        )
    };
    let line = line.trim();
    if line.len() > MAX_LINE || line.chars().any(char::is_control) {
        return Err(refuse("it is longer than a line of 4,096 bytes"));
    }
    let mut words = line.split(' ').filter(|w| !w.is_empty());
    let (Some(kind), Some(key)) = (words.next(), words.next()) else {
        return Err(refuse("it needs a kind and a key"));
    };
    if !KINDS.contains(&kind) {
        return Err(refuse("it does not begin with a kind of key that is known, like ssh-ed25519"));
    }
    let blob = STANDARD.decode(key).map_err(|_| refuse("the key is not base64"))?;
    // The blob begins with its own kind as an SSH string.
    let (length, rest) = blob.split_first_chunk::<4>().ok_or_else(|| refuse("the key is cut off"))?;
    let inner = usize::try_from(u32::from_be_bytes(*length)).ok().and_then(|n| rest.split_at_checked(n));
    match inner {
        Some((inside, body)) if inside == kind.as_bytes() && body.len() >= 32 => {}
        _ => return Err(refuse("the key is cut off, or of another kind than it says")),
    }
    let hash = Sha256::digest(&blob);
    let mut clean = format!("{kind} {key}");
    for word in words {
        clean.push(' ');
        clean.push_str(word);
    }
    Ok(SshKey {
        id: hex::encode(hash),
        fingerprint: format!("SHA256:{}", STANDARD_NO_PAD.encode(hash)),
        key: clean,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl github";

    #[test]
    fn a_key_has_the_fingerprint_ssh_keygen_shows() {
        let key = parse(&format!("  {GOOD}\n")).unwrap();
        assert_eq!(key.fingerprint, "SHA256:+DiY3wvvV6TuJJhbpZisF/zLDA0zPMSvHdkr4UvCOqU");
        assert_eq!(key.key, GOOD);
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for bad in [
            "",
            "ssh-ed25519",
            "ssh-ed25519 !!!",
            "ssh-ed25519 AAAA",
            "command=\"sh\" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl",
            "ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(parse(&format!("{GOOD}\nssh-ed25519 AAAA")).is_err(), "two lines");
    }

    proptest! {
        #[test]
        fn nothing_panics(line in "\\PC{0,200}", blob in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = parse(&line);
            let _ = parse(&format!("ssh-ed25519 {}", STANDARD.encode(blob)));
        }
    }
}
