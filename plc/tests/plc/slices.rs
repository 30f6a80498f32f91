//! Slices: waiting, keys, expiry.

use std::collections::BTreeSet;

use commonage_isolation_api::SliceName;
use commonage_plc_api::Code;
use commonage_plc_api::node::SliverOutcome;
use commonage_plc_api::rest::{BootState, Phase, Role};
use jiff::SignedDuration;

use crate::world::{SSH_KEY, World, code, refusal, resources, running, status};

#[tokio::test]
async fn waiting_on_a_slice_sees_the_sliver_come() {
    let world = World::new().await;
    world.site("one").await;
    let pi = world.principal("pi", "one", Role::Pi).await;
    let (node, on_node) = world.node("node1", "one").await;
    let slice = running(&pi, "one_a", 1, &[&node]).await;
    assert_eq!(slice.slivers[0].outcome, SliverOutcome::Pending);
    assert!(!slice.settled());

    let waiting = tokio::spawn({
        let (pi, name) = (pi.clone(), slice.name.clone());
        async move { pi.slice_after(&name, slice.revision, 60).await.unwrap() }
    });
    let desired = on_node.desired(0, 0).await.unwrap();
    on_node.put_status(&status(desired.revision, &["one_a"])).await.unwrap();
    let seen = waiting.await.unwrap();
    assert!(seen.settled());
    let sliver = &seen.slivers[0];
    assert_eq!(sliver.outcome, SliverOutcome::Running { boot_script_exit: 0 });
    assert_eq!(sliver.ssh.as_deref(), Some("ssh one_a@10.0.2.15"));
    assert_eq!(sliver.hostname, "node1");

    // The same report again is no news; a change of the slice makes it an old one.
    on_node.put_status(&status(desired.revision, &["one_a"])).await.unwrap();
    assert_eq!(pi.slice(&seen.name).await.unwrap().revision, seen.revision);
    let changed = BootState { boot_script: "echo new".into(), ..BootState::default() };
    let stale = pi.set_state(&seen.name, &changed).await.unwrap();
    assert!(!stale.settled() && !stale.slivers[0].current);
    let newer = on_node.desired(desired.revision, 60).await.unwrap();
    assert_eq!(newer.slivers[0].config.boot_script, "echo new");
    on_node.put_status(&status(newer.revision, &["one_a"])).await.unwrap();
    assert!(pi.slice_after(&seen.name, stale.revision, 60).await.unwrap().settled());

    let node = pi.node(&node).await.unwrap();
    assert_eq!(node.address.unwrap().to_string(), "10.0.2.15");
    assert_eq!(node.status.unwrap().slivers.len(), 1);
    assert_eq!(code(pi.slice_after(&seen.name, 0, 601).await), Code::Invalid);
    assert_eq!(code(pi.slice_after(&"one_zz".parse().unwrap(), 0, 60).await), Code::NotFound);
}

#[tokio::test]
async fn owners_keys_reach_their_slivers_and_leave_them() {
    let world = World::new().await;
    world.site("one").await;
    let pi = world.principal("pi", "one", Role::Pi).await;
    let user = world.principal("user", "one", Role::User).await;
    let (node, on_node) = world.node("node1", "one").await;
    let slice = running(&pi, "one_a", 1, &[&node]).await.name;
    let name = "user".parse().unwrap();
    let key = user.add_ssh_key(&name, SSH_KEY).await.unwrap();
    let before = on_node.desired(0, 0).await.unwrap();
    assert_eq!(before.slivers[0].config.ssh_keys, [""; 0], "not an owner");
    pi.set_owners(&slice, [name.clone()].into()).await.unwrap();
    let with = on_node.desired(before.revision, 60).await.unwrap();
    assert_eq!(with.slivers[0].config.ssh_keys, [SSH_KEY]);
    user.remove_ssh_key(&name, &key.id).await.unwrap();
    let without = on_node.desired(with.revision, 60).await.unwrap();
    assert_eq!(without.slivers[0].config.ssh_keys, [""; 0]);
    user.add_ssh_key(&name, SSH_KEY).await.unwrap();
    let again = on_node.desired(without.revision, 60).await.unwrap();
    assert_eq!(again.slivers[0].config.ssh_keys, [SSH_KEY]);
    pi.delete_principal(&name).await.unwrap();
    let gone = on_node.desired(again.revision, 60).await.unwrap();
    assert_eq!(gone.slivers[0].config.ssh_keys, [""; 0]);
    let nobody = BTreeSet::from(["nobody".parse().unwrap()]);
    assert_eq!(code(pi.set_owners(&slice, nobody).await), Code::NotFound);
}

#[tokio::test]
async fn a_slice_leaves_its_nodes_when_its_time_is_over() {
    let world = World::new().await;
    world.site("one").await;
    let pi = world.principal("pi", "one", Role::Pi).await;
    let (node, on_node) = world.node("node1", "one").await;
    running(&pi, "one_stays", 1, &[&node]).await;
    let slice = running(&pi, "one_goes", 1, &[&node]).await.name;
    pi.set_resources(&slice, &resources(1, SignedDuration::from_millis(500))).await.unwrap();
    let before = on_node.desired(0, 0).await.unwrap();
    let after =
        if before.slivers.len() == 2 { on_node.desired(before.revision, 60).await.unwrap() } else { before };
    let names: Vec<&str> = after.slivers.iter().map(|s| s.slice.as_str()).collect();
    assert_eq!(names, ["one_stays"]);
    assert_eq!(after.slivers[0].rspec.share, 100_000, "it has the share of the one that left");
    assert_eq!(pi.slice(&slice).await.unwrap().phase, Phase::Expired);
}

#[tokio::test]
async fn changing_the_nodes_moves_the_slice() {
    let world = World::new().await;
    world.site("one").await;
    let pi = world.principal("pi", "one", Role::Pi).await;
    let (a, on_a) = world.node("a", "one").await;
    let (b, on_b) = world.node("b", "one").await;
    let slice = running(&pi, "one_a", 1, &[&a]).await.name;
    let (at_a, at_b) = (on_a.desired(0, 0).await.unwrap(), on_b.desired(0, 0).await.unwrap());
    pi.instantiate_slice(&slice, [b.clone()].into()).await.unwrap();
    assert_eq!(on_a.desired(at_a.revision, 60).await.unwrap().slivers, []);
    let sliver = on_b.desired(at_b.revision, 60).await.unwrap().slivers.remove(0);
    sliver.rspec.check().unwrap();
    assert!(sliver.rspec.interval.contains(jiff::Timestamp::now()));
    world.admin.delete_node(&b).await.unwrap();
    assert!(pi.slice(&slice).await.unwrap().slivers.is_empty());
}

#[tokio::test]
async fn values_out_of_range_are_refused_with_their_range() {
    let world = World::new().await;
    world.site("one").await;
    let pi = world.principal("pi", "one", Role::Pi).await;
    let slice: SliceName = "one_a".parse().unwrap();
    pi.create_slice(&slice).await.unwrap();
    assert_eq!(code(pi.create_slice(&slice).await), Code::Conflict);
    let mut bad = resources(1, SignedDuration::from_hours(1));
    bad.memory_mib = Some(1);
    let refused = refusal(pi.set_resources(&slice, &bad).await);
    assert!(refused.message.contains("32 to 1,048,576"), "{refused}");
    assert_eq!(
        code(pi.set_resources(&slice, &resources(0, SignedDuration::from_hours(1))).await),
        Code::Invalid
    );
    let base = BootState { base: "agent".into(), ..BootState::default() };
    assert_eq!(code(pi.set_state(&slice, &base).await), Code::Invalid);
    let long = BootState { boot_script: "x".repeat(300_000), ..BootState::default() };
    assert_eq!(code(pi.set_state(&slice, &long).await), Code::Invalid);
    let longer = BootState { boot_script: "x".repeat(2_000_000), ..BootState::default() };
    assert_eq!(code(pi.set_state(&slice, &longer).await), Code::TooLarge);
}
