//! Who gets in: only keys that PLC knows, by certificates that PLC's CA signed; and what strangers are told.

use std::os::unix::fs::PermissionsExt as _;

use commonage_plc_api::Code;
use commonage_plc_api::rest::{CreateNode, Me, Role};
use commonage_plc_client::{Client, Error, identity};

use crate::world::{World, code, principal, refusal};

fn transport<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Err(e @ Error::Transport { .. }) => e.to_string(),
        other => panic!("it should not have come through: {other:?}"),
    }
}

#[tokio::test]
async fn another_ca_is_refused_on_either_side() {
    let (ours, theirs) = (World::new().await, World::new().await);
    let read =
        |w: &World, name: &str| std::fs::read_to_string(w.state.path().join("admin").join(name)).unwrap();
    let (cert, key) = (read(&theirs, "cert.pem"), read(&theirs, "key.pem"));
    // A client that trusts us, with a certificate of theirs: our server ends the handshake.
    let stranger = Client::new(&ours.url(), &ours.ca_pem(), &cert, &key).unwrap();
    let why = transport(stranger.me().await);
    assert!(why.contains("refuses this client's certificate") || why.contains("hung up"), "{why}");
    // A client that trusts them only: it ends the handshake.
    let misled = Client::new(&ours.url(), &theirs.ca_pem(), &cert, &key).unwrap();
    let why = transport(misled.me().await);
    assert!(why.contains("not signed by the CA"), "{why}");
    assert!(why.contains(&ours.url()), "{why}");
}

#[tokio::test]
async fn other_mistakes_are_explained() {
    let world = World::new().await;
    let read = |name: &str| std::fs::read_to_string(world.state.path().join("admin").join(name)).unwrap();
    let (ca, cert, key) = (read("ca.pem"), read("cert.pem"), read("key.pem"));
    let port = world.server.address().port();
    let by = |url: &str| Client::new(url, &ca, &cert, &key).unwrap();
    by(&format!("https://localhost:{port}")).me().await.unwrap();
    let why = transport(by(&format!("https://127.0.0.2:{port}")).me().await);
    assert!(why.contains("nothing listens"), "{why}");
    let why = transport(by("https://127.0.0.1:1").me().await);
    assert!(why.contains("nothing listens"), "{why}");
    assert!(matches!(Client::new("http://127.0.0.1", &ca, &cert, &key), Err(Error::Url { .. })));
    assert!(matches!(Client::new(&world.url(), "", &cert, &key), Err(Error::Identity { .. })));
    assert!(matches!(Client::new(&world.url(), &ca, &cert, "no key"), Err(Error::Identity { .. })));
    let other = identity::generate("x").unwrap().key_pem;
    assert!(matches!(Client::new(&world.url(), &ca, &cert, &other), Err(Error::Identity { .. })));
}

#[tokio::test]
async fn whom_the_database_does_not_know_is_told_what_to_do() {
    let world = World::new().await;
    world.site("one").await;
    let (node, on_node) = world.node("node1", "one").await;
    world.admin.delete_node(&node).await.unwrap();
    let refused = refusal(on_node.desired(0, 0).await);
    assert_eq!(refused.code, Code::Unauthenticated);
    assert!(refused.hint.unwrap().contains("commonage node create"));
}

#[tokio::test]
async fn a_key_is_one_identity() {
    let world = World::new().await;
    world.site("one").await;
    let new = identity::generate("user").unwrap();
    world.admin.create_principal(&principal("user", "one", Role::User, &new.csr_pem)).await.unwrap();
    let again = identity::csr(&new.key_pem, "other").unwrap();
    let other = principal("other", "one", Role::User, &again);
    assert_eq!(code(world.admin.create_principal(&other).await), Code::Conflict);
    let node = CreateNode { site: "one".parse().unwrap(), hostname: "n".into(), csr: again.clone() };
    assert_eq!(code(world.admin.create_node(&node).await), Code::Conflict);
    let mut broken = again.into_bytes();
    let middle = broken.len() / 2;
    broken[middle] = if broken[middle] == b'A' { b'B' } else { b'A' };
    let broken = principal("third", "one", Role::User, &String::from_utf8(broken).unwrap());
    assert_eq!(code(world.admin.create_principal(&broken).await), Code::Invalid);
}

#[tokio::test]
async fn keys_are_for_their_owner_only_and_the_profile_works() {
    let world = World::new().await;
    let Me::Principal(me) = world.admin.me().await.unwrap() else { panic!("not a principal") };
    assert_eq!((me.name.as_str(), me.roles), ("admin", [Role::Admin].into()));
    for key in ["ca/key.pem", "server/key.pem", "online/key.pem", "admin/key.pem"] {
        let mode = std::fs::metadata(world.state.path().join(key)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
    }
    let mode = std::fs::metadata(world.state.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "the state directory");
    let info = world.admin.info().await.unwrap();
    assert_eq!(info.ca_pem, world.ca_pem());
    assert_eq!(info.online_key.0.len(), 32);
}
