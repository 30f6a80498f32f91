//! The API as slivers meet it: the real router behind real Unix sockets, one a caller. No machine is started: slivers that are bound here
//! begin tomorrow, or cannot start.

use std::path::PathBuf;

use commonage_isolation::{Capacity, PortRange};
use commonage_isolation_api::{Interval, Privilege, Rspec};
use commonage_nodemgr_api::error::{Code, ErrorBody};
use commonage_nodemgr_api::http::SliverState;
use jiff::{SignedDuration, Timestamp};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::*;
use crate::book::AGENT;
use crate::manager::Settings;

struct Node {
    dir: tempfile::TempDir,
    manager: Arc<Manager>,
    servers: std::sync::Mutex<JoinSet<()>>,
}

impl Node {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for file in ["base-mini.erofs", "base-agent.erofs", "node.json"] {
            std::fs::write(dir.path().join(file), "").unwrap();
        }
        let manager = Self::manager(&dir);
        manager.keep_agent().await.unwrap();
        Self { dir, manager, servers: Default::default() }
    }

    fn manager(dir: &tempfile::TempDir) -> Arc<Manager> {
        let settings = Settings::for_tests(dir.path());
        let capacity = Capacity {
            memory_mib: 1024,
            disk_mib: 8192,
            link_bps: 1_000_000,
            pids: 1000,
            ports: PortRange::DEFAULT,
        };
        Manager::open(settings, capacity, None, watch::channel(None).1).unwrap()
    }

    /// A socket whose caller is `slice`.
    fn socket(&self, slice: &str) -> PathBuf {
        let path = self.dir.path().join(format!("{slice}.sock"));
        if !path.exists() {
            let listener = UnixListener::bind(&path).unwrap();
            let (sender, calls) = mpsc::channel(1);
            let server = crate::api::serve(calls, Arc::clone(&self.manager), slice.parse().unwrap());
            let mut servers = self.servers.lock().unwrap();
            servers.spawn(server);
            servers
                .spawn(async move { while sender.send(listener.accept().await.unwrap().0).await.is_ok() {} });
        }
        path
    }

    async fn call(&self, caller: &str, method: &str, path: &str, body: impl AsRef<[u8]>) -> (u16, Vec<u8>) {
        raw(&self.socket(caller), method, path, body.as_ref()).await
    }

    async fn ok<T: DeserializeOwned>(&self, caller: &str, method: &str, path: &str, body: Value) -> T {
        let (status, bytes) = self.call(caller, method, path, body.to_string()).await;
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&bytes));
        serde_json::from_slice(&bytes).unwrap()
    }

    async fn refused(
        &self,
        caller: &str,
        method: &str,
        path: &str,
        body: impl AsRef<[u8]>,
        code: Code,
    ) -> ApiError {
        let (status, bytes) = self.call(caller, method, path, body).await;
        let error = serde_json::from_slice::<ErrorBody>(&bytes).unwrap().error;
        assert_eq!((status, error.code), (code.status(), code), "{error}");
        assert!(error.hint.is_some(), "{error}");
        error
    }

    async fn acquire(&self, rspec: &Rspec) -> Acquired {
        self.ok(AGENT, "POST", "/v1/acquire", json!({ "rspec": rspec })).await
    }

    async fn bind(&self, slice: &str, rcap: &Rcap) -> Sliver {
        self.ok(AGENT, "POST", "/v1/bind", bind_body(slice, rcap)).await
    }
}

async fn raw(socket: &PathBuf, method: &str, path: &str, body: &[u8]) -> (u16, Vec<u8>) {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
    (status, answer[end + 4..].to_vec())
}

fn bind_body(slice: &str, rcap: &Rcap) -> Value {
    json!({ "slice": slice, "rcap": rcap, "config": { "base": "mini", "boot_script": "", "ssh_keys": ["ssh-ed25519 KEY"] } })
}

fn hours(n: i64) -> Timestamp {
    Timestamp::now() + SignedDuration::from_hours(n)
}

fn tomorrow() -> Rspec {
    Rspec::modest(Interval { start: hours(24), end: hours(48) })
}

#[tokio::test]
async fn a_right_is_acquired_shown_renewed_and_released() {
    let node = Node::new().await;
    let acquired = node.acquire(&tomorrow()).await;
    assert_eq!((acquired.ports.last - acquired.ports.first + 1, acquired.bound_to.clone()), (64, None));
    let path = format!("/v1/rcaps/{}", acquired.rcap);
    assert_eq!(node.ok::<Acquired>("any_body", "GET", &path, Value::Null).await, acquired);
    let all: Vec<Acquired> = node.ok(AGENT, "GET", "/v1/rcaps", Value::Null).await;
    assert!(all.contains(&acquired));
    let none: Vec<Acquired> = node.ok("any_body", "GET", "/v1/rcaps", Value::Null).await;
    assert_eq!(none, []);

    let end = hours(72);
    let renewal = json!({ "rcap": acquired.rcap, "end": end, "share": 2000 });
    node.refused("any_body", "POST", "/v1/renew", renewal.to_string(), Code::Forbidden).await;
    let renewed: Acquired = node.ok(AGENT, "POST", "/v1/renew", renewal).await;
    assert_eq!(
        (renewed.rspec.interval.end, renewed.rspec.share, &renewed.ports),
        (end, 2000, &acquired.ports)
    );
    let early = json!({ "rcap": acquired.rcap, "end": hours(1) });
    node.refused(AGENT, "POST", "/v1/renew", early.to_string(), Code::Invalid).await;

    let release = json!({ "rcap": acquired.rcap });
    node.ok::<Value>("any_body", "POST", "/v1/release", release.clone()).await;
    node.refused("any_body", "POST", "/v1/release", release.to_string(), Code::NotFound).await;
    node.refused(AGENT, "GET", &path, "", Code::NotFound).await;
}

#[tokio::test]
async fn refusals_say_what_is_wrong() {
    let node = Node::new().await;
    let ask = |rspec: &Rspec| json!({ "rspec": rspec }).to_string();
    let e = node.refused("princeton_codeen", "POST", "/v1/acquire", ask(&tomorrow()), Code::Forbidden).await;
    assert!(e.message.contains("princeton_codeen"));

    let mut rspec = tomorrow();
    rspec.memory_mib = 961;
    let e = node.refused(AGENT, "POST", "/v1/acquire", ask(&rspec), Code::OverCapacity).await;
    assert!(e.message.contains("memory_mib: 961 MiB asked, 960 free"), "{e}");

    rspec = tomorrow();
    rspec.interval.end = rspec.interval.start;
    let e = node.refused(AGENT, "POST", "/v1/acquire", ask(&rspec), Code::Invalid).await;
    assert!(e.message.contains("not after its start"), "{e}");
    rspec.interval = Interval { start: hours(-2), end: hours(-1) };
    node.refused(AGENT, "POST", "/v1/acquire", ask(&rspec), Code::Invalid).await;

    rspec = tomorrow();
    rspec.ports.tcp = [5000].into();
    let first = node.acquire(&rspec).await;
    assert_eq!(first.ports.tcp, [5000].into());
    let e = node.refused(AGENT, "POST", "/v1/acquire", ask(&rspec), Code::OverCapacity).await;
    assert!(e.message.contains("5000/tcp is taken by an unbound right of plc_agent until"), "{e}");
    rspec.ports.tcp = [61_000].into();
    let e = node.refused(AGENT, "POST", "/v1/acquire", ask(&rspec), Code::Invalid).await;
    assert!(e.message.contains("out of range"), "{e}");
}

#[tokio::test]
async fn requests_that_are_none_get_the_one_error_shape() {
    let node = Node::new().await;
    for body in ["", "{", "[]", "{\"rspec\":{}}", "{\"rcap\":\"00\"}", "\u{0}"] {
        node.refused("a_b", "POST", "/v1/release", body, Code::Invalid).await;
    }
    let extra = json!({ "rcap": Rcap::random().unwrap(), "slice": "princeton_codeen" });
    node.refused("a_b", "POST", "/v1/release", extra.to_string(), Code::Invalid).await;
    let unknown = json!({ "rcap": Rcap::random().unwrap() });
    node.refused("a_b", "POST", "/v1/release", unknown.to_string(), Code::NotFound).await;
    node.refused("a_b", "GET", "/v1/rcaps/nonsense", "", Code::Invalid).await;
    node.refused("a_b", "GET", "/v1/rcaps/%ff%fe", "", Code::Invalid).await;
    node.refused("a_b", "DELETE", "/v1/slivers/..%2f..%2fetc", "", Code::Invalid).await;
    for (method, path) in
        [("GET", "/"), ("GET", "/v1/acquire"), ("PATCH", "/v1/node"), ("POST", "/v2/acquire")]
    {
        node.refused("a_b", method, path, "", Code::NotFound).await;
    }
    let e = node.refused("a_b", "POST", "/v1/acquire", vec![b' '; 10 << 20], Code::TooLarge).await;
    assert!(e.message.contains("1048576"), "{e}");
}

#[tokio::test]
async fn the_socket_is_the_identity_and_nothing_said_changes_it() {
    let node = Node::new().await;
    let right = node.acquire(&tomorrow()).await;
    let sliver = node.bind("princeton_codeen", &right.rcap).await;
    assert_eq!((sliver.status, sliver.ports), (SliverState::Pending, right.ports));
    for caller in ["princeton_codeen", "other_slice"] {
        let seen: Value = node.ok(caller, "GET", "/v1/node", Value::Null).await;
        assert_eq!(seen["caller"], caller);
        // Neither itself nor a stranger is who bound it.
        let config = json!({ "base": "mini" }).to_string();
        node.refused(caller, "PUT", "/v1/slivers/princeton_codeen/config", config, Code::NotFound).await;
        node.refused(caller, "DELETE", "/v1/slivers/princeton_codeen", "", Code::NotFound).await;
        let exec = json!({ "argv": ["id"] }).to_string();
        node.refused(caller, "POST", "/v1/slivers/princeton_codeen/exec", exec, Code::NotFound).await;
        node.refused(caller, "DELETE", "/v1/slivers/plc_agent", "", Code::NotFound).await;
    }
    let own: Vec<Sliver> = node.ok("princeton_codeen", "GET", "/v1/slivers", Value::Null).await;
    assert_eq!(own.iter().map(|s| s.slice.as_str()).collect::<Vec<_>>(), ["princeton_codeen"]);
    let none: Vec<Sliver> = node.ok("other_slice", "GET", "/v1/slivers", Value::Null).await;
    assert_eq!(none, []);
    // Words in the request's head change nothing.
    let mut stream = UnixStream::connect(node.socket("other_slice")).await.unwrap();
    let forged = "GET /v1/node?caller=plc_agent HTTP/1.1\r\nHost: plc_agent\r\nX-Slice: plc_agent\r\nConnection: close\r\n\r\n";
    stream.write_all(forged.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("\"caller\":\"other_slice\""), "{answer}");
}

#[tokio::test]
async fn a_sliver_is_bound_configured_and_deleted_by_who_bound_it() {
    let node = Node::new().await;
    let (right, other) = (node.acquire(&tomorrow()).await, node.acquire(&tomorrow()).await);
    let forged = bind_body("Bad_name", &right.rcap).to_string();
    node.refused(AGENT, "POST", "/v1/bind", forged, Code::Invalid).await;
    let mut no_base = bind_body("a_b", &right.rcap);
    no_base["config"]["base"] = json!("windows");
    let e = node.refused(AGENT, "POST", "/v1/bind", no_base.to_string(), Code::Invalid).await;
    assert!(e.message.contains("agent, mini"), "{e}");

    node.bind("a_b", &right.rcap).await;
    node.refused(AGENT, "POST", "/v1/bind", bind_body("a_c", &right.rcap).to_string(), Code::Conflict).await;
    node.refused(AGENT, "POST", "/v1/bind", bind_body("a_b", &other.rcap).to_string(), Code::Conflict).await;
    node.refused(AGENT, "POST", "/v1/bind", bind_body(AGENT, &other.rcap).to_string(), Code::Conflict).await;
    node.refused(AGENT, "POST", "/v1/release", json!({ "rcap": right.rcap }).to_string(), Code::Conflict)
        .await;

    let config = json!({ "base": "mini", "ssh_keys": [], "files": [{ "path": "/etc/x", "mode": 384, "contents": "c2VjcmV0" }] });
    let changed: Sliver = node.ok(AGENT, "PUT", "/v1/slivers/a_b/config", config).await;
    assert!(changed.config.ssh_keys.is_empty() && changed.config.files[0].contents.0.is_empty());
    let other_base = json!({ "base": "agent" }).to_string();
    node.refused(AGENT, "PUT", "/v1/slivers/a_b/config", other_base, Code::Conflict).await;
    let exec = json!({ "argv": ["id"], "timeout_s": 301 }).to_string();
    node.refused(AGENT, "POST", "/v1/slivers/a_b/exec", exec, Code::Invalid).await;
    let exec = json!({ "argv": ["id"] }).to_string();
    node.refused(AGENT, "POST", "/v1/slivers/a_b/exec", exec, Code::Conflict).await;

    node.ok::<Value>(AGENT, "DELETE", "/v1/slivers/a_b", Value::Null).await;
    node.refused(AGENT, "DELETE", "/v1/slivers/a_b", "", Code::NotFound).await;
    node.refused(AGENT, "GET", &format!("/v1/rcaps/{}", right.rcap), "", Code::NotFound).await;
    node.bind("a_b", &other.rcap).await;
    node.refused(AGENT, "DELETE", "/v1/slivers/plc_agent", "", Code::Forbidden).await;
}

#[tokio::test]
async fn a_broker_needs_the_privilege_in_its_rspec() {
    let node = Node::new().await;
    let mut rspec = tomorrow();
    rspec.privileges = [Privilege::Acquire].into();
    let right = node.acquire(&rspec).await;
    let ask = json!({ "rspec": tomorrow() });
    node.refused("a_broker", "POST", "/v1/acquire", ask.to_string(), Code::Forbidden).await;
    node.bind("a_broker", &right.rcap).await;
    let resold: Acquired = node.ok("a_broker", "POST", "/v1/acquire", ask).await;
    // Whoever is handed the right may bind it.
    let sliver: Sliver = node.ok("b_tenant", "POST", "/v1/bind", bind_body("b_service", &resold.rcap)).await;
    assert_eq!(sliver.rcap, resold.rcap);
}

#[tokio::test]
async fn a_lease_that_ends_is_reclaimed_even_if_its_machine_never_came_up() {
    let node = Node::new().await;
    let now = Timestamp::now();
    let mut rspec = tomorrow();
    rspec.interval = Interval { start: now, end: now + SignedDuration::from_millis(1500) };
    let right = node.acquire(&rspec).await;
    node.bind("a_b", &right.rcap).await;
    let mut state = node.manager.follow(&"a_b".parse().unwrap()).unwrap();
    state.wait_for(|s| matches!(s, SliverState::Failed { .. })).await.unwrap();
    let failed: Vec<Sliver> = node.ok("a_b", "GET", "/v1/slivers", Value::Null).await;
    assert!(
        matches!(&failed[0].status, SliverState::Failed { reason } if reason.contains("could not be started"))
    );
    // The sender goes when nothing is left.
    while state.changed().await.is_ok() {}
    node.refused(AGENT, "GET", &format!("/v1/rcaps/{}", right.rcap), "", Code::NotFound).await;
    assert!(!node.dir.path().join("slivers/a_b").exists());
}

#[tokio::test]
async fn what_was_granted_is_there_after_a_restart() {
    let node = Node::new().await;
    let (right, bound) = (node.acquire(&tomorrow()).await, node.acquire(&tomorrow()).await);
    node.bind("a_b", &bound.rcap).await;
    let Node { dir, manager, servers } = node;
    let before = manager.node(&AGENT.parse().unwrap());
    manager.power_off().await;
    servers.into_inner().unwrap().shutdown().await;
    // The database closes with the last who holds the manager.
    let gone = Arc::downgrade(&manager);
    drop(manager);
    while gone.upgrade().is_some() {
        tokio::task::yield_now().await;
    }
    std::fs::remove_file(dir.path().join("plc_agent.sock")).unwrap();
    let node = Node { manager: Node::manager(&dir), dir, servers: Default::default() };
    let after = node.manager.node(&AGENT.parse().unwrap());
    assert_eq!(before.free, after.free);
    let kept: Acquired = node.ok(AGENT, "GET", &format!("/v1/rcaps/{}", right.rcap), Value::Null).await;
    assert_eq!(kept, right);
}

#[tokio::test]
async fn a_sliver_that_holds_its_connections_open_stops_only_itself() {
    let node = Node::new().await;
    let greedy = node.socket("a_greedy");
    let mut held = Vec::new();
    for _ in 0..40 {
        let mut stream = UnixStream::connect(&greedy).await.unwrap();
        stream.write_all(b"POST /v1/release HTTP/1.1\r\nHost: x\r\nContent-Len").await.unwrap();
        held.push(stream);
    }
    let seen: Value = node.ok("b_other", "GET", "/v1/node", Value::Null).await;
    assert_eq!(seen["caller"], "b_other");
    drop(held);
    let seen: Value = node.ok("a_greedy", "GET", "/v1/node", Value::Null).await;
    assert_eq!(seen["caller"], "a_greedy");
}

#[tokio::test]
async fn many_callers_at_once_get_disjoint_ports() {
    let node = Node::new().await;
    let mut asked = tokio::task::JoinSet::new();
    let body = json!({ "rspec": tomorrow() }).to_string();
    let socket = node.socket(AGENT);
    for _ in 0..12 {
        let (socket, body) = (socket.clone(), body.clone());
        asked.spawn(async move { raw(&socket, "POST", "/v1/acquire", body.as_bytes()).await });
    }
    let answers = asked.join_all().await;
    let granted: Vec<Acquired> = answers
        .iter()
        .filter(|(status, _)| *status == 200)
        .map(|(_, body)| serde_json::from_slice(body).unwrap())
        .collect();
    // 1,024 MiB less the agent's 64 are seven slivers of 128.
    assert_eq!(granted.len(), 7);
    assert!(answers.iter().all(|(status, _)| [200, 409].contains(status)));
    let mut firsts: Vec<u16> = granted.iter().map(|a| a.ports.first).collect();
    firsts.sort_unstable();
    assert!(firsts.windows(2).all(|w| w[1] - w[0] >= 64));
}
