//! Every permission of PDN-04-017 §3.3, and those around it: a table of who may do what, tried over the wire.

use std::collections::BTreeSet;

use commonage_isolation_api::{Privilege, SliceName};
use commonage_plc_api::Code;
use commonage_plc_api::rest::{BootState, CreateNode, CreateSite, Phase, Role};
use commonage_plc_client::{Client, identity};
use jiff::SignedDuration;

use crate::world::{SSH_KEY, WEEK, World, code, principal, resources, running};

/// Who tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum As {
    Admin,
    Pi,
    Owner,
    OtherUser,
    OtherPi,
    Node,
}

const ALL: [As; 6] = [As::Admin, As::Pi, As::Owner, As::OtherUser, As::OtherPi, As::Node];

/// What is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Create,
    Read,
    SetOwners,
    SetState,
    SetFirstResources,
    Instantiate,
    RenewSame,
    RenewMoreShare,
    RenewLessShare,
    RenewLonger,
    RenewShorter,
    RenewTooLong,
    RenewMoreMemory,
    SetPrivileges,
    Delete,
}

/// Who may, of §3.3. Whoever is not named may not.
const TABLE: [(Call, &[As]); 15] = {
    use As::{Admin, Owner, Pi};
    [
        (Call::Create, &[Pi]),
        (Call::Read, &[Admin, Pi, Owner]),
        (Call::SetOwners, &[Pi, Owner]),
        (Call::SetState, &[Pi, Owner]),
        (Call::SetFirstResources, &[Pi]),
        (Call::Instantiate, &[Pi, Owner]),
        (Call::RenewSame, &[Pi, Owner]),
        (Call::RenewMoreShare, &[Pi]),
        (Call::RenewLessShare, &[Pi, Owner]),
        (Call::RenewLonger, &[Pi, Owner]),
        (Call::RenewShorter, &[Pi]),
        (Call::RenewTooLong, &[Pi]),
        (Call::RenewMoreMemory, &[Pi]),
        (Call::SetPrivileges, &[Admin]),
        (Call::Delete, &[Pi, Owner]),
    ]
};

async fn attempt(caller: &Client, call: Call, slice: &SliceName) -> Result<(), commonage_plc_client::Error> {
    let owner = || BTreeSet::from(["owner".parse().unwrap()]);
    let renew = |share, weeks: i32| resources(share, WEEK * weeks);
    match call {
        Call::Create => caller.create_slice(&"one_new".parse().unwrap()).await.map(drop),
        Call::Read => caller.slice(slice).await.map(drop),
        Call::SetOwners => caller.set_owners(slice, owner()).await.map(drop),
        Call::SetState => caller.set_state(slice, &BootState::default()).await.map(drop),
        Call::SetFirstResources => caller.set_resources(slice, &renew(10, 1)).await.map(drop),
        Call::Instantiate => {
            // As the slice is: nothing changes, but it takes the right to call.
            let nodes = BTreeSet::from([NODE.get().unwrap().clone()]);
            caller.instantiate_slice(slice, nodes).await.map(drop)
        }
        Call::RenewSame | Call::RenewLonger => caller.set_resources(slice, &renew(10, 2)).await.map(drop),
        Call::RenewMoreShare => caller.set_resources(slice, &renew(11, 2)).await.map(drop),
        Call::RenewLessShare => caller.set_resources(slice, &renew(9, 2)).await.map(drop),
        Call::RenewShorter => {
            caller.set_resources(slice, &resources(10, SignedDuration::from_hours(1))).await.map(drop)
        }
        Call::RenewTooLong => caller.set_resources(slice, &renew(10, 9)).await.map(drop),
        Call::RenewMoreMemory => {
            let mut more = renew(10, 2);
            more.memory_mib = Some(256);
            caller.set_resources(slice, &more).await.map(drop)
        }
        Call::SetPrivileges => {
            caller.set_privileges(slice, [Privilege::EnvironmentService].into()).await.map(drop)
        }
        Call::Delete => caller.delete_slice(slice).await,
    }
}

static NODE: std::sync::OnceLock<commonage_isolation_api::NodeId> = std::sync::OnceLock::new();

#[tokio::test]
async fn the_table_of_section_3_3() {
    let world = World::new().await;
    world.site("one").await;
    world.site("two").await;
    let pi = world.principal("pi", "one", Role::Pi).await;
    let owner = world.principal("owner", "one", Role::User).await;
    let other_user = world.principal("other", "one", Role::User).await;
    let other_pi = world.principal("other.pi", "two", Role::Pi).await;
    let (node, node_client) = world.node("node1", "one").await;
    NODE.set(node.clone()).unwrap();
    let client = |who| match who {
        As::Admin => &world.admin,
        As::Pi => &pi,
        As::Owner => &owner,
        As::OtherUser => &other_user,
        As::OtherPi => &other_pi,
        As::Node => &node_client,
    };
    let slice: SliceName = "one_slice".parse().unwrap();
    for (call, allowed) in TABLE {
        for who in ALL {
            // A fresh slice each time, in the state the call is about.
            if matches!(call, Call::SetFirstResources) {
                pi.create_slice(&slice).await.unwrap();
            } else {
                running(&pi, slice.as_str(), 10, &[&node]).await;
            }
            pi.set_owners(&slice, ["owner".parse().unwrap()].into()).await.unwrap();
            let result = attempt(client(who), call, &slice).await;
            if allowed.contains(&who) {
                assert!(result.is_ok(), "{call:?} as {who:?}: {result:?}");
            } else {
                assert_eq!(code(result), Code::Forbidden, "{call:?} as {who:?}");
            }
            for leftover in [&slice, &"one_new".parse().unwrap()] {
                match pi.delete_slice(leftover).await {
                    Ok(()) => {}
                    gone => assert_eq!(code(gone), Code::NotFound),
                }
            }
        }
    }
}

#[tokio::test]
async fn instantiating_takes_resources_and_nodes_that_exist() {
    let world = World::new().await;
    world.site("one").await;
    let pi = world.principal("pi", "one", Role::Pi).await;
    let (node, _) = world.node("node1", "one").await;
    let slice: SliceName = "one_slice".parse().unwrap();
    pi.create_slice(&slice).await.unwrap();
    let on = || BTreeSet::from([node.clone()]);
    assert_eq!(code(pi.instantiate_slice(&slice, on()).await), Code::Conflict, "no resources yet");
    let past = resources(1, -WEEK);
    assert_eq!(code(pi.set_resources(&slice, &past).await), Code::Invalid, "a time that is over");
    pi.set_resources(&slice, &resources(1, WEEK)).await.unwrap();
    assert_eq!(code(pi.instantiate_slice(&slice, BTreeSet::new()).await), Code::Invalid, "no node");
    let nowhere = BTreeSet::from(["00000000-0000-4000-8000-000000000000".parse().unwrap()]);
    assert_eq!(code(pi.instantiate_slice(&slice, nowhere).await), Code::NotFound, "an unknown node");
    assert_eq!(pi.slice(&slice).await.unwrap().phase, Phase::Created, "refusals change nothing");
    let active = pi.instantiate_slice(&slice, on()).await.unwrap();
    assert_eq!(active.phase, Phase::Active);
    // A PI may end a slice by moving its time into the past; then it is expired, not gone.
    let ended = pi.set_resources(&slice, &past).await.unwrap();
    assert_eq!(ended.phase, Phase::Expired);
    assert_eq!(code(pi.instantiate_slice(&slice, on()).await), Code::Conflict, "its time is over");
    let renewed = pi.set_resources(&slice, &resources(1, WEEK)).await.unwrap();
    assert_eq!(renewed.phase, Phase::Active);
}

#[tokio::test]
async fn sites_principals_and_nodes_are_kept_by_those_responsible() {
    let world = World::new().await;
    world.site("one").await;
    world.site("two").await;
    let pi = world.principal("pi", "one", Role::Pi).await;
    let user = world.principal("user", "one", Role::User).await;
    let (node, node_client) = world.node("node1", "one").await;

    let three = CreateSite { name: "three".parse().unwrap(), shares: None };
    for caller in [&pi, &user, &node_client] {
        assert_eq!(code(caller.create_site(&three).await), Code::Forbidden);
        assert_eq!(code(caller.set_site_shares(&"one".parse().unwrap(), 1000).await), Code::Forbidden);
    }
    assert_eq!(
        code(world.admin.create_site(&CreateSite { name: "one".parse().unwrap(), shares: None }).await),
        Code::Conflict
    );

    let new = |name: &str, site: &str, role| {
        principal(name, site, role, &identity::generate(name).unwrap().csr_pem)
    };
    pi.create_principal(&new("user2", "one", Role::User)).await.unwrap();
    for bad in [new("x", "two", Role::User), new("x", "one", Role::Pi), new("x", "one", Role::Admin)] {
        assert_eq!(code(pi.create_principal(&bad).await), Code::Forbidden, "{bad:?}");
    }
    assert_eq!(code(user.create_principal(&new("x", "one", Role::User)).await), Code::Forbidden);
    assert_eq!(code(pi.create_principal(&new("user2", "one", Role::User)).await), Code::Conflict);

    let seen = |c: &Client| {
        let c = c.clone();
        async move { c.principals().await.unwrap().into_iter().map(|p| p.name.to_string()).collect::<Vec<_>>() }
    };
    assert_eq!(seen(&world.admin).await, ["admin", "pi", "user", "user2"]);
    assert_eq!(seen(&pi).await, ["pi", "user", "user2"]);
    assert_eq!(seen(&user).await, ["user"]);

    let create = |site: &str| CreateNode {
        site: site.parse().unwrap(),
        hostname: format!("new.{site}"),
        csr: identity::generate("n").unwrap().csr_pem,
    };
    pi.create_node(&create("one")).await.unwrap();
    assert_eq!(code(pi.create_node(&create("two")).await), Code::Forbidden);
    assert_eq!(code(user.create_node(&create("one")).await), Code::Forbidden);
    assert_eq!(user.nodes().await.unwrap().len(), 2, "everybody sees nodes");
    assert_eq!(code(user.delete_node(&node).await), Code::Forbidden);
    pi.delete_node(&node).await.unwrap();
    assert_eq!(code(node_client.me().await), Code::Unauthenticated, "a deleted node is nobody");

    assert_eq!(code(user.delete_principal(&"user2".parse().unwrap()).await), Code::Forbidden);
    assert_eq!(code(pi.delete_principal(&"pi".parse().unwrap()).await), Code::Forbidden);
    pi.delete_principal(&"user".parse().unwrap()).await.unwrap();
    assert_eq!(code(user.me().await), Code::Unauthenticated);
    assert_eq!(
        code(world.admin.delete_principal(&"admin".parse().unwrap()).await),
        Code::Conflict,
        "the last one"
    );
}

#[tokio::test]
async fn ssh_keys_are_kept_by_their_principal_and_its_pi() {
    let world = World::new().await;
    world.site("one").await;
    let pi = world.principal("pi", "one", Role::Pi).await;
    let user = world.principal("user", "one", Role::User).await;
    let other = world.principal("other", "one", Role::User).await;
    let name = "user".parse().unwrap();
    let key = user.add_ssh_key(&name, SSH_KEY).await.unwrap();
    assert_eq!(user.add_ssh_key(&name, SSH_KEY).await.unwrap(), key, "adding again changes nothing");
    assert_eq!(pi.ssh_keys(&name).await.unwrap(), std::slice::from_ref(&key));
    assert_eq!(world.admin.ssh_keys(&name).await.unwrap(), std::slice::from_ref(&key));
    for caller in [&other, &world.admin] {
        assert_eq!(code(caller.add_ssh_key(&name, SSH_KEY).await), Code::Forbidden);
        assert_eq!(code(caller.remove_ssh_key(&name, &key.id).await), Code::Forbidden);
    }
    assert_eq!(code(other.ssh_keys(&name).await), Code::Forbidden);
    assert_eq!(code(user.add_ssh_key(&name, "ssh-ed25519 nonsense").await), Code::Invalid);
    pi.remove_ssh_key(&name, &key.id).await.unwrap();
    assert_eq!(code(user.remove_ssh_key(&name, &key.id).await), Code::NotFound);
}
