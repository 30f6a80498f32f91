//! Relative shares as nodes are told them.

use commonage_plc_api::Code;
use commonage_plc_api::rest::Role;

use crate::world::{WEEK, World, code, resources, running};

#[tokio::test]
async fn one_slice_s_share_moves_the_others_nodes() {
    let world = World::new().await;
    world.site("one").await;
    world.site("two").await;
    let pi = world.principal("pi", "one", Role::Pi).await;
    let pi2 = world.principal("pi2", "two", Role::Pi).await;
    let (node, on_node) = world.node("node1", "one").await;
    let (far, on_far) = world.node("node2", "two").await;

    running(&pi, "one_a", 10, &[&node]).await;
    running(&pi2, "two_x", 3, &[&far]).await;
    let share = |d: &commonage_plc_api::node::Desired, slice: &str| {
        d.slivers.iter().find(|s| s.slice.as_str() == slice).map(|s| s.rspec.share)
    };
    let before = on_node.desired(0, 0).await.unwrap();
    assert_eq!(share(&before, "one_a"), Some(100_000), "alone it has all of its site's share");
    let far_before = on_far.desired(0, 0).await.unwrap();

    // A slice of the same site on another node: the first node must hear of it.
    running(&pi, "one_b", 1, &[&far]).await;
    let after = on_node.desired(before.revision, 60).await.unwrap();
    assert!(after.revision > before.revision);
    assert_eq!(share(&after, "one_a"), Some(90_909));
    let far_after = on_far.desired(far_before.revision, 60).await.unwrap();
    assert_eq!(share(&far_after, "one_b"), Some(9_090));
    assert_eq!(share(&far_after, "two_x"), Some(100_000), "other sites' slices are not touched");

    pi.set_resources(&"one_a".parse().unwrap(), &resources(1, WEEK)).await.unwrap();
    let even = on_far.desired(far_after.revision, 60).await.unwrap();
    assert_eq!(share(&even, "one_b"), Some(50_000));

    world.admin.set_site_shares(&"one".parse().unwrap(), 10).await.unwrap();
    let poorer = on_far.desired(even.revision, 60).await.unwrap();
    assert_eq!(share(&poorer, "one_b"), Some(5_000));

    pi.delete_slice(&"one_a".parse().unwrap()).await.unwrap();
    let alone = on_far.desired(poorer.revision, 60).await.unwrap();
    assert_eq!(share(&alone, "one_b"), Some(10_000));
    assert_eq!(on_node.desired(0, 0).await.unwrap().slivers, []);
    assert_eq!(code(world.admin.set_site_shares(&"one".parse().unwrap(), 0).await), Code::Invalid);
}
