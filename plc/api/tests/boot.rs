//! Hostile answers to a boot request: none but the right one leads to a script that can be run.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use commonage_nodemgr_api::Bytes;
use commonage_plc_api::boot::{
    BootResponse, Grant, NodeConfig, Script, Step, VerifyError, sign_grant, sign_script, verify_script,
};
use ed25519_dalek::SigningKey;
use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

const NODE: &str = "0f0e0d0c-1111-2222-3333-444455556666";
const OTHER_NODE: &str = "0f0e0d0c-1111-2222-3333-444455556667";
const NONCE: [u8; 32] = [7; 32];

fn offline() -> SigningKey {
    SigningKey::from_bytes(&[1; 32])
}

fn online() -> SigningKey {
    SigningKey::from_bytes(&[2; 32])
}

fn config() -> NodeConfig {
    NodeConfig {
        node: NODE.parse().unwrap(),
        plc: "https://plc.example.org:8443".into(),
        ca_pem: String::new(),
        cert_pem: String::new(),
        key_pem: String::new(),
        offline_key: Bytes(offline().verifying_key().to_bytes().into()),
        online_key: Bytes(online().verifying_key().to_bytes().into()),
    }
}

fn script() -> Vec<u8> {
    let kexec =
        Step::Kexec { kernel: "vmlinuz".into(), initramfs: "initramfs".into(), cmdline: "quiet".into() };
    serde_json::to_vec(&Script { release: "1".into(), steps: vec![kexec] }).unwrap()
}

/// PLC's time is an hour off the CD's; only PLC's counts.
fn grant() -> Grant {
    let now: Timestamp = "2030-01-01T00:00:00Z".parse().unwrap();
    Grant {
        node: NODE.parse().unwrap(),
        nonce: Bytes(NONCE.into()),
        script_sha256: hex::encode(Sha256::digest(script())),
        expires: now + SignedDuration::from_mins(5),
        now,
    }
}

/// An answer with everything signed by the right keys.
fn signed(script: Vec<u8>, grant: &Grant) -> BootResponse {
    let grant = serde_json::to_vec(grant).unwrap();
    BootResponse {
        script_signature: sign_script(&offline(), &script),
        script: Bytes(script),
        grant_signature: sign_grant(&online(), &grant),
        grant: Bytes(grant),
    }
}

fn refused(response: &BootResponse) -> VerifyError {
    response.verify(&config(), &NONCE, SignedDuration::ZERO).unwrap_err()
}

#[test]
fn the_right_answer_can_be_run() {
    let (verified, grant) =
        signed(script(), &grant()).verify(&config(), &NONCE, SignedDuration::from_mins(4)).unwrap();
    assert_eq!(verified.get().release, "1");
    assert_eq!(grant.now.to_string(), "2030-01-01T00:00:00Z");
}

#[test]
fn a_tampered_script_is_refused() {
    let right = signed(script(), &grant());
    for at in 0..right.script.0.len() {
        let mut tampered = right.clone();
        tampered.script.0[at] ^= 1;
        assert_eq!(refused(&tampered), VerifyError::ScriptSignature);
    }
    let mut longer = right;
    longer.script.0.push(b' ');
    assert_eq!(refused(&longer), VerifyError::ScriptSignature);
}

#[test]
fn a_tampered_grant_is_refused() {
    let right = signed(script(), &grant());
    for at in 0..right.grant.0.len() {
        let mut tampered = right.clone();
        tampered.grant.0[at] ^= 1;
        assert_eq!(refused(&tampered), VerifyError::GrantSignature);
    }
}

#[test]
fn other_keys_are_refused() {
    let other = SigningKey::from_bytes(&[3; 32]);
    let mut response = signed(script(), &grant());
    response.script_signature = sign_script(&other, &response.script.0);
    assert_eq!(refused(&response), VerifyError::ScriptSignature);
    // PLC's own online key chooses among scripts; it cannot make one.
    response.script_signature = sign_script(&online(), &response.script.0);
    assert_eq!(refused(&response), VerifyError::ScriptSignature);
    let mut response = signed(script(), &grant());
    response.grant_signature = sign_grant(&other, &response.grant.0);
    assert_eq!(refused(&response), VerifyError::GrantSignature);
}

#[test]
fn a_signature_of_one_kind_of_document_is_none_of_another() {
    let mut response = signed(script(), &grant());
    response.script_signature = sign_grant(&offline(), &response.script.0);
    assert_eq!(refused(&response), VerifyError::ScriptSignature);
    let mut response = signed(script(), &grant());
    response.grant_signature = sign_script(&online(), &response.grant.0);
    assert_eq!(refused(&response), VerifyError::GrantSignature);
}

#[test]
fn signatures_that_are_none_are_refused() {
    for signature in [vec![], vec![0; 63], vec![0; 64], vec![0xff; 64], vec![0; 65]] {
        let mut response = signed(script(), &grant());
        response.script_signature = Bytes(signature.clone());
        assert_eq!(refused(&response), VerifyError::ScriptSignature);
        let mut response = signed(script(), &grant());
        response.grant_signature = Bytes(signature);
        assert_eq!(refused(&response), VerifyError::GrantSignature);
    }
}

#[test]
fn an_answer_to_another_boot_node_or_script_is_refused() {
    let replayed = signed(script(), &Grant { nonce: Bytes(vec![8; 32]), ..grant() });
    assert_eq!(refused(&replayed), VerifyError::OtherBoot);
    for nonce in [vec![], NONCE[..31].to_vec(), [NONCE, NONCE].concat()] {
        let short = signed(script(), &Grant { nonce: Bytes(nonce), ..grant() });
        assert_eq!(refused(&short), VerifyError::OtherBoot);
    }
    let node = OTHER_NODE.parse().unwrap();
    let stolen = signed(script(), &Grant { node, ..grant() });
    assert_eq!(refused(&stolen), VerifyError::OtherNode(OTHER_NODE.parse().unwrap()));
    // An old release, genuine and once granted, with the grant for the present one: a downgrade.
    let old = serde_json::to_vec(&Script { release: "0".into(), steps: vec![] }).unwrap();
    assert_eq!(refused(&signed(old, &grant())), VerifyError::OtherScript);
    let upper = grant().script_sha256.to_uppercase();
    assert_eq!(
        refused(&signed(script(), &Grant { script_sha256: upper, ..grant() })),
        VerifyError::OtherScript
    );
}

#[test]
fn a_late_answer_is_refused() {
    let late = signed(script(), &grant());
    let after = |elapsed| late.verify(&config(), &NONCE, elapsed).map(drop);
    assert_eq!(after(SignedDuration::from_secs(299)), Ok(()));
    assert_eq!(after(SignedDuration::from_secs(300)), Err(VerifyError::Expired(grant().expires)));
    assert_eq!(after(SignedDuration::MAX), Err(VerifyError::Expired(grant().expires)));
    let already = signed(script(), &Grant { expires: grant().now, ..grant() });
    assert!(matches!(refused(&already), VerifyError::Expired(_)));
}

#[test]
fn what_this_version_does_not_understand_is_refused() {
    for text in [
        "",
        "[]",
        "{",
        r#"{"release":"1"}"#,
        r#"{"release":"1","steps":[{"step":"shell","command":"sh"}]}"#,
        r#"{"release":"1","steps":[],"extra":1}"#,
        r#"{"release":"1","steps":[{"step":"partition","min_mib":-1,"image_mib":1}]}"#,
        r#"{"release":"1","steps":[{"step":"partition","min_mib":2,"image_mib":1,"disk":"/dev/sda"}]}"#,
    ] {
        let script_sha256 = hex::encode(Sha256::digest(text));
        let error = refused(&signed(text.into(), &Grant { script_sha256, ..grant() }));
        assert!(matches!(error, VerifyError::Malformed { what: "script", .. }), "{text}: {error}");
    }
    let mut response = signed(script(), &grant());
    response.grant = Bytes(b"{}".into());
    response.grant_signature = sign_grant(&online(), &response.grant.0);
    assert!(matches!(refused(&response), VerifyError::Malformed { what: "grant", .. }));
}

#[test]
fn a_damaged_cd_is_told_from_a_wrong_signature() {
    let response = signed(script(), &grant());
    for key in [vec![], vec![0; 31], vec![0xff; 33]] {
        let config = NodeConfig { offline_key: Bytes(key.clone()), ..config() };
        let error = response.verify(&config, &NONCE, SignedDuration::ZERO).unwrap_err();
        assert_eq!(error, VerifyError::Key("offline"));
        let config = NodeConfig { online_key: Bytes(key), ..self::config() };
        let error = response.verify(&config, &NONCE, SignedDuration::ZERO).unwrap_err();
        assert_eq!(error, VerifyError::Key("online"));
    }
    // A key of small order, for which signatures of anything can be made, verifies nothing.
    let mut identity = [0; 32];
    identity[0] = 1;
    assert!(verify_script(&identity, b"anything", &[&identity[..], &[0; 32]].concat()).is_err());
}

proptest! {
    #[test]
    fn anything_else_is_refused(
        script: Vec<u8>, grant: Vec<u8>,
        signatures in (proptest::collection::vec(any::<u8>(), 64), proptest::collection::vec(any::<u8>(), 64)),
    ) {
        let response = BootResponse {
            script: Bytes(script),
            script_signature: Bytes(signatures.0),
            grant: Bytes(grant),
            grant_signature: Bytes(signatures.1),
        };
        prop_assert_eq!(refused(&response), VerifyError::ScriptSignature);
    }

    /// Genuine signatures over anything: parsing what is signed never panics.
    #[test]
    fn signed_nonsense_is_refused(script: Vec<u8>, grant: Vec<u8>) {
        let response = BootResponse {
            script_signature: sign_script(&offline(), &script),
            grant_signature: sign_grant(&online(), &grant),
            script: Bytes(script),
            grant: Bytes(grant),
        };
        let malformed = matches!(refused(&response), VerifyError::Malformed { .. });
        prop_assert!(malformed);
    }
}
