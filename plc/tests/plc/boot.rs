//! The boot server: grants, scripts, files.

use std::collections::BTreeMap;

use commonage_isolation_api::NodeId;
use commonage_nodemgr_api::Bytes;
use commonage_plc_api::Code;
use commonage_plc_api::boot::{BootRequest, Facts, ImageFile, NodeConfig, Script, Step, sign_script};
use commonage_plc_api::rest::{BootFile, PublishScript};
use commonage_plc_client::Error;
use ed25519_dalek::SigningKey;
use jiff::SignedDuration;
use sha2::{Digest as _, Sha256};

use crate::world::{World, code, refusal};

fn offline() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

fn hash(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn publication(files: &[(&str, &[u8])]) -> PublishScript {
    let image = |bytes: &[u8]| ImageFile { sha256: hash(bytes), size: bytes.len() as u64 };
    let files: BTreeMap<_, _> = files.iter().map(|(n, b)| ((*n).to_owned(), image(b))).collect();
    let kexec =
        Step::Kexec { kernel: "vmlinuz".into(), initramfs: "initramfs".into(), cmdline: String::new() };
    let script = Script { release: "test 1".into(), steps: vec![Step::Install { files }, kexec] };
    let script = serde_json::to_vec(&script).unwrap();
    PublishScript {
        signature: sign_script(&offline(), &script),
        script: Bytes(script),
        offline_key: Bytes(offline().verifying_key().to_bytes().to_vec()),
    }
}

fn request(node: &NodeId) -> BootRequest {
    let facts = Facts { cpus: 4, firmware: "uefi".into(), ..Facts::default() };
    BootRequest { node: node.clone(), nonce: Bytes(vec![9; 32]), facts }
}

async fn put(world: &World, bytes: &[u8]) -> Result<BootFile, Error> {
    let source = std::io::Cursor::new(bytes.to_vec());
    world.admin.put_boot_file(&hash(bytes), bytes.len() as u64, source, |_, _| {}).await
}

#[tokio::test]
async fn a_node_boots_what_was_published() {
    let world = World::new().await;
    world.site("one").await;
    let (node, on_node) = world.node("node1", "one").await;
    assert_eq!(code(on_node.boot(&request(&node)).await), Code::NotFound, "nothing is published yet");
    let (kernel, initramfs) = (b"kernel".as_slice(), b"initramfs".as_slice());
    let release = publication(&[("vmlinuz", kernel), ("initramfs", initramfs)]);
    let missing = refusal(world.admin.publish_script(&release).await);
    assert_eq!(missing.code, Code::Conflict);
    assert!(missing.message.contains("vmlinuz") && missing.message.contains("initramfs"), "{missing}");
    put(&world, kernel).await.unwrap();
    put(&world, initramfs).await.unwrap();
    let current = world.admin.publish_script(&release).await.unwrap();
    assert_eq!(world.admin.current_script().await.unwrap(), current);

    let response = on_node.boot(&request(&node)).await.unwrap();
    let info = world.admin.info().await.unwrap();
    let config = NodeConfig {
        node: node.clone(),
        plc: world.url(),
        ca_pem: String::new(),
        cert_pem: String::new(),
        key_pem: String::new(),
        offline_key: release.offline_key.clone(),
        online_key: info.online_key,
    };
    let (script, grant) = response.verify(&config, &[9; 32], SignedDuration::ZERO).unwrap();
    assert_eq!(script.get().release, "test 1");
    assert_eq!(grant.expires.duration_since(grant.now), SignedDuration::from_mins(10));
    assert!(response.verify(&config, &[8; 32], SignedDuration::ZERO).is_err(), "another boot");
    assert!(response.verify(&config, &[9; 32], SignedDuration::from_mins(11)).is_err(), "too late");

    let boot = world.admin.node(&node).await.unwrap().boot.unwrap();
    assert_eq!((boot.release.as_str(), boot.facts.cpus), ("test 1", 4));
}

#[tokio::test]
async fn a_node_boots_as_itself_only() {
    let world = World::new().await;
    world.site("one").await;
    let (node, on_node) = world.node("node1", "one").await;
    let (other, _) = world.node("node2", "one").await;
    let refused = refusal(on_node.boot(&request(&other)).await);
    assert_eq!(refused.code, Code::Forbidden);
    assert!(refused.message.contains(node.as_str()) && refused.message.contains(other.as_str()));
    assert_eq!(code(world.admin.boot(&request(&node)).await), Code::Forbidden);
    let short = BootRequest { nonce: Bytes(vec![1; 8]), ..request(&node) };
    assert_eq!(code(on_node.boot(&short).await), Code::Invalid);
    world.admin.delete_node(&node).await.unwrap();
    let gone = refusal(on_node.boot(&request(&node)).await);
    assert!(gone.hint.unwrap().contains("commonage node create"));
}

#[tokio::test]
async fn only_what_is_signed_and_complete_is_published() {
    let world = World::new().await;
    world.site("one").await;
    let (_, on_node) = world.node("node1", "one").await;
    put(&world, b"k").await.unwrap();
    let good = publication(&[("vmlinuz", b"k"), ("initramfs", b"k")]);
    let mut forged = good.clone();
    forged.script.0.push(b' ');
    assert_eq!(code(world.admin.publish_script(&forged).await), Code::Invalid);
    let half = publication(&[("vmlinuz", b"k")]);
    assert_eq!(
        code(world.admin.publish_script(&half).await),
        Code::Invalid,
        "it starts what it does not install"
    );
    assert_eq!(code(on_node.publish_script(&good).await), Code::Forbidden);
    world.admin.publish_script(&good).await.unwrap();
}

#[tokio::test]
async fn files_come_and_go_whole_or_not_at_all() {
    let world = World::new().await;
    world.site("one").await;
    let (_, on_node) = world.node("node1", "one").await;
    let user = world.principal("user", "one", commonage_plc_api::rest::Role::User).await;
    let bytes: Vec<u8> = (0..3_000_001_u32).map(|i| (i % 251) as u8).collect();
    let (sha256, size) = (hash(&bytes), bytes.len() as u64);
    let source = |bytes: &[u8]| std::io::Cursor::new(bytes.to_vec());

    // Another hash than said: nothing is kept.
    let wrong = world.admin.put_boot_file(&sha256, 5, source(b"other"), |_, _| {}).await;
    assert_eq!(code(wrong), Code::Invalid);
    assert_eq!(world.admin.boot_file_size(&sha256).await.unwrap(), None);
    let incoming = world.state.path().join("boot/incoming");
    assert_eq!(std::fs::read_dir(&incoming).unwrap().count(), 0);
    for caller in [&on_node, &user] {
        let refused = caller.put_boot_file(&sha256, size, source(&bytes), |_, _| {}).await;
        assert_eq!(code(refused), Code::Forbidden);
    }

    let (progress, seen) = std::sync::mpsc::channel();
    let path = world.state.path().join("upload");
    std::fs::write(&path, &bytes).unwrap();
    let put =
        world.admin.upload_boot_file(&path, move |n, of| progress.send((n, of)).unwrap()).await.unwrap();
    assert_eq!(put, BootFile { sha256: sha256.clone(), size });
    assert_eq!(seen.iter().last(), Some((size, size)));
    // Again: nothing is sent.
    world.admin.upload_boot_file(&path, |_, _| panic!("sent again")).await.unwrap();

    let mut got = Vec::new();
    let mut last = 0;
    on_node.download_boot_file(&sha256, size, &mut got, |n| last = n).await.unwrap();
    assert!(got == bytes && last == size);
    let too_short = on_node.download_boot_file(&sha256, size - 1, &mut Vec::new(), |_| {}).await;
    assert!(matches!(too_short, Err(Error::Damaged { .. })), "{too_short:?}");
    assert_eq!(code(user.download_boot_file(&sha256, size, &mut Vec::new(), |_| {}).await), Code::Forbidden);
    let absent = hash(b"absent");
    assert_eq!(code(on_node.download_boot_file(&absent, 1, &mut Vec::new(), |_| {}).await), Code::NotFound);

    // A file damaged on PLC's disk is noticed by the node.
    let kept = world.state.path().join("boot/files").join(&sha256);
    let mut damaged = bytes.clone();
    damaged[1_000_000] ^= 1;
    std::fs::write(kept, damaged).unwrap();
    let noticed = on_node.download_boot_file(&sha256, size, &mut Vec::new(), |_| {}).await;
    assert!(matches!(noticed, Err(Error::Damaged { .. })), "{noticed:?}");
    // Unless the node says that it will hash the file itself; its size is checked all the same.
    let mut got = Vec::new();
    on_node.download_unhashed_boot_file(&sha256, size, &mut got, |_| {}).await.unwrap();
    assert_ne!(hash(&got), sha256);
    let too_short = on_node.download_unhashed_boot_file(&sha256, size - 1, &mut Vec::new(), |_| {}).await;
    assert!(matches!(too_short, Err(Error::Damaged { .. })), "{too_short:?}");
}
