//! What nodes pull and report.

use std::time::{Duration, Instant};

use commonage_plc_api::Code;
use commonage_plc_api::rest::{Me, Role};

use crate::world::{World, code, running, status};

#[tokio::test]
async fn a_long_poll_wakes_when_something_changes_and_only_then() {
    let world = World::new().await;
    world.site("one").await;
    let pi = world.principal("pi", "one", Role::Pi).await;
    let (node, on_node) = world.node("node1", "one").await;
    let (_, on_other) = world.node("node2", "one").await;
    assert_eq!(on_node.me().await.unwrap(), Me::Node { node: node.clone() });
    let now = on_node.desired(0, 0).await.unwrap();
    assert!(now.slivers.is_empty());
    let other = on_other.desired(0, 0).await.unwrap().revision;

    let began = Instant::now();
    assert_eq!(on_node.desired(now.revision, 1).await.unwrap(), now, "nothing changed");
    assert!(began.elapsed() >= Duration::from_secs(1));

    let waiting = tokio::spawn({
        let on_node = on_node.clone();
        async move { on_node.desired(now.revision, 120).await.unwrap() }
    });
    let began = Instant::now();
    running(&pi, "one_a", 1, &[&node]).await;
    let desired = waiting.await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(60));
    assert_eq!(desired.slivers[0].slice.as_str(), "one_a");
    assert_eq!(on_other.desired(0, 0).await.unwrap().revision, other, "other nodes hear nothing");
}

#[tokio::test]
async fn principals_are_no_nodes_and_nodes_no_principals() {
    let world = World::new().await;
    world.site("one").await;
    let (_, on_node) = world.node("node1", "one").await;
    assert_eq!(code(world.admin.desired(0, 0).await), Code::Forbidden);
    assert_eq!(code(world.admin.put_status(&status(1, &[])).await), Code::Forbidden);
    assert_eq!(code(on_node.nodes().await), Code::Forbidden);
    assert_eq!(code(on_node.slices().await), Code::Forbidden);
}

#[tokio::test]
async fn a_stopping_server_lets_long_polls_end() {
    let world = World::new().await;
    world.site("one").await;
    let (_, on_node) = world.node("node1", "one").await;
    let now = on_node.desired(0, 0).await.unwrap();
    let mut waiting = tokio::spawn(async move { on_node.desired(now.revision, 600).await.unwrap() });
    // Its connection is open already: within a second the call is at the server.
    let early = tokio::time::timeout(Duration::from_secs(1), &mut waiting).await;
    assert!(early.is_err(), "it must wait");
    let began = Instant::now();
    world.server.stop().await;
    assert_eq!(waiting.await.unwrap().revision, now.revision);
    assert!(began.elapsed() < Duration::from_secs(9));
}

#[tokio::test]
async fn a_node_ahead_of_plc_is_told_at_once() {
    let world = World::new().await;
    world.site("one").await;
    let (_, on_node) = world.node("node1", "one").await;
    // PLC restored from a backup knows less than the node has seen.
    let desired = tokio::time::timeout(Duration::from_secs(60), on_node.desired(99, 600)).await;
    assert_eq!(desired.unwrap().unwrap().revision, 1);
}
