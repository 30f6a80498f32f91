//! What was acknowledged stays, whatever happens to plcd.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use commonage_isolation_api::SliceName;
use commonage_plc_api::rest::{CreateSite, Phase, Role};
use commonage_plc_client::identity;

use crate::world::{World, admin_of, principal, running, status};

#[tokio::test]
async fn a_restart_keeps_everything() {
    let world = World::new().await;
    world.site("one").await;
    let pi = world.principal("pi", "one", Role::Pi).await;
    let (node, on_node) = world.node("node1", "one").await;
    let slice = running(&pi, "one_a", 1, &[&node]).await.name;
    let desired = on_node.desired(0, 0).await.unwrap();
    on_node.put_status(&status(desired.revision, &["one_a"])).await.unwrap();
    let ca = world.ca_pem();
    let before = world.admin.slice(&slice).await.unwrap();
    let node_before = world.admin.node(&node).await.unwrap();
    let info = world.admin.info().await.unwrap();

    let world = world.restarted().await;
    assert_eq!(world.ca_pem(), ca);
    assert_eq!(world.admin.info().await.unwrap(), info, "the online key too");
    assert_eq!(world.admin.slice(&slice).await.unwrap(), before);
    assert_eq!(before.phase, Phase::Active);
    assert_eq!(world.admin.node(&node).await.unwrap(), node_before);
}

#[tokio::test]
async fn one_state_directory_has_one_server() {
    let world = World::new().await;
    let mut second = plcd(world.state.path());
    let out = second.wait().unwrap();
    assert!(!out.success());
}

/// The program itself, killed without warning while it takes calls: every call it acknowledged is there afterwards.
#[tokio::test]
async fn nothing_acknowledged_is_lost_by_kill_9() {
    let state = tempfile::tempdir().unwrap();
    let mut acknowledged: Vec<String> = Vec::new();
    for round in 0..3 {
        let mut child = plcd(state.path());
        listening(&mut child);
        let admin = admin_of(state.path());
        let sites: Vec<String> =
            admin.sites().await.unwrap().into_iter().map(|s| s.name.to_string()).collect();
        for name in &acknowledged {
            assert!(sites.contains(name), "{name} was lost");
        }
        let (stop, mut stopped) = tokio::sync::oneshot::channel();
        let writer = tokio::spawn(async move {
            let mut done = Vec::new();
            let mut stop = Some(stop);
            for n in 0.. {
                let name = format!("r{round}n{n}");
                let site = CreateSite { name: name.parse().unwrap(), shares: None };
                if admin.create_site(&site).await.is_err() {
                    break;
                }
                done.push(name);
                if n == 20
                    && let Some(stop) = stop.take()
                {
                    stop.send(()).unwrap();
                }
            }
            done
        });
        (&mut stopped).await.unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        acknowledged.extend(writer.await.unwrap());
    }
    let mut child = plcd(state.path());
    listening(&mut child);
    let admin = admin_of(state.path());
    let sites = admin.sites().await.unwrap();
    assert!(acknowledged.len() > 60);
    assert!(sites.len() >= acknowledged.len());
    // It still works, and ends when asked.
    let new = identity::generate("pi").unwrap();
    let site = sites[0].name.to_string();
    admin.create_principal(&principal("pi", &site, Role::Pi, &new.csr_pem)).await.unwrap();
    let _: SliceName = format!("{site}_a").parse().unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
}

fn plcd(state: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_plcd"))
        .args(["--listen", "127.0.0.1:0", "--state"])
        .arg(state)
        .env("RUST_LOG", "warn")
        .env("RUST_BACKTRACE", "0")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for the line that says it takes calls.
fn listening(child: &mut Child) {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert!(line["listening"].as_str().unwrap().starts_with("127.0.0.1:"));
}
