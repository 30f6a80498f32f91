//! A PLC on a free port of 127.0.0.1, and people and nodes that know it.

use std::collections::BTreeSet;
use std::path::Path;

use commonage_isolation_api::NodeId;
use commonage_plc::serve::{Config, Server};
use commonage_plc_api::node::{SliverOutcome, SliverReport, Status};
use commonage_plc_api::rest::{CreateNode, CreatePrincipal, CreateSite, Role, SetResources, Slice};
use commonage_plc_api::{ApiError, Code};
use commonage_plc_client::{Client, Error, identity};
use jiff::{SignedDuration, Timestamp};
use tempfile::TempDir;

/// A server and its administrator.
pub struct World {
    pub server: Server,
    pub admin: Client,
    pub state: TempDir,
}

pub const WEEK: SignedDuration = SignedDuration::from_hours(7 * 24);

impl World {
    pub async fn new() -> Self {
        let state = tempfile::tempdir().unwrap();
        let server = serve(state.path()).await;
        let admin = admin_of(state.path());
        Self { server, admin, state }
    }

    /// Stops the server and starts another over the same state.
    pub async fn restarted(self) -> Self {
        let Self { server, state, .. } = self;
        server.stop().await;
        let server = serve(state.path()).await;
        let admin = admin_of(state.path());
        Self { server, admin, state }
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.server.address())
    }

    pub fn ca_pem(&self) -> String {
        std::fs::read_to_string(self.state.path().join("ca/cert.pem")).unwrap()
    }

    pub async fn site(&self, name: &str) {
        self.admin.create_site(&CreateSite { name: name.parse().unwrap(), shares: None }).await.unwrap();
    }

    /// A principal made by the administrator.
    pub async fn principal(&self, name: &str, site: &str, role: Role) -> Client {
        let new = identity::generate(name).unwrap();
        let body = principal(name, site, role, &new.csr_pem);
        let issued = self.admin.create_principal(&body).await.unwrap();
        Client::new(&self.url(), &issued.ca_pem, &issued.certificate_pem, &new.key_pem).unwrap()
    }

    /// A node made by the administrator.
    pub async fn node(&self, hostname: &str, site: &str) -> (NodeId, Client) {
        let new = identity::generate(hostname).unwrap();
        let body =
            CreateNode { site: site.parse().unwrap(), hostname: hostname.to_owned(), csr: new.csr_pem };
        let issued = self.admin.create_node(&body).await.unwrap();
        let client = Client::new(&self.url(), &issued.ca_pem, &issued.certificate_pem, &new.key_pem).unwrap();
        (issued.node.node, client)
    }
}

pub async fn serve(state: &Path) -> Server {
    let config = Config {
        state: state.to_owned(),
        listen: "127.0.0.1:0".parse().unwrap(),
        names: vec!["127.0.0.1".into(), "10.0.2.2".into(), "plc.example.org".into()],
        max_lifetime: SignedDuration::from_hours(56 * 24),
    };
    Server::start(config).await.unwrap()
}

/// The client that the profile in the state directory makes.
pub fn admin_of(state: &Path) -> Client {
    let read = |name: &str| std::fs::read_to_string(state.join("admin").join(name)).unwrap();
    Client::new(read("url").trim(), &read("ca.pem"), &read("cert.pem"), &read("key.pem")).unwrap()
}

pub fn principal(name: &str, site: &str, role: Role, csr: &str) -> CreatePrincipal {
    CreatePrincipal {
        name: name.parse().unwrap(),
        site: Some(site.parse().unwrap()),
        roles: [role].into(),
        csr: csr.to_owned(),
    }
}

/// Share and time from now, nothing else.
pub fn resources(share: u32, time: SignedDuration) -> SetResources {
    let end = Timestamp::now() + time;
    SetResources { share, end, memory_mib: None, disk_mib: None, ports: None }
}

/// Makes a slice that runs.
pub async fn running(pi: &Client, name: &str, share: u32, nodes: &[&NodeId]) -> Slice {
    let name = name.parse().unwrap();
    pi.create_slice(&name).await.unwrap();
    pi.set_resources(&name, &resources(share, WEEK)).await.unwrap();
    let nodes: BTreeSet<NodeId> = nodes.iter().map(|n| (*n).clone()).collect();
    pi.instantiate_slice(&name, nodes).await.unwrap()
}

/// A report that these slices run.
pub fn status(revision: u64, slices: &[&str]) -> Status {
    let report = |slice: &&str| SliverReport {
        slice: slice.parse().unwrap(),
        state: SliverOutcome::Running { boot_script_exit: 0 },
        ports: None,
    };
    Status {
        revision,
        address: "10.0.2.15".parse().unwrap(),
        ssh_host_key: "ssh-ed25519 AAAA".into(),
        version: "0.1.0".into(),
        slivers: slices.iter().map(report).collect(),
    }
}

/// PLC's refusal.
pub fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> ApiError {
    match result {
        Err(Error::Api(e)) => {
            assert!(e.hint.is_some(), "no hint: {e:?}");
            e
        }
        other => panic!("PLC should have refused: {other:?}"),
    }
}

pub fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> Code {
    refusal(result).code
}

pub const SSH_KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl somebody";
