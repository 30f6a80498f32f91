//! One node's whole life: slices come, talk, are attacked from within, survive crashes, go on after a planned restart, come back after a reboot, and go.

mod common;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use commonage_testbed::cli::CliError;
use commonage_testbed::demo::{check_login, check_terminal, fetch, serve};
use commonage_testbed::node::Node;
use commonage_testbed::ssh::{Key, Ssh};
use commonage_testbed::testbed::{Options, Sliver, Testbed};
use serde_json::{Value, json};

const BOOT_SCRIPT: &str = "mkdir -p /srv/www && echo \"hello from $(hostname)\" > /srv/www/index.html\n";

#[test]
#[ignore = "needs QEMU and images: cargo xtask test"]
fn a_node_lives() {
    let mut bed = common::testbed(&Options { faults: true, ..Options::default() }).unwrap();
    if let Err(error) = life(&mut bed) {
        panic!(
            "{error:?}\nthe console of node1:\n{}\nplcd:\n{}",
            bed.nodes[0].console.tail(60),
            bed.plc.tail(20)
        );
    }
}

fn life(bed: &mut Testbed) -> Result<()> {
    let slice = bed.slice("one", "debian", BOOT_SCRIPT, &["node1"])?;
    let one = bed.sliver(&slice, "node1")?;
    step("login", || check_login("demo_one", &one))?;
    step("terminal", || check_terminal(&one))?;
    let tool = env!("CARGO_BIN_EXE_vsock-call");
    step("upload", || upload(&one, tool))?;
    let free = call(&one, "GET", "/v1/node", "")?.1["free"].clone();

    let slice = bed.slice("two", "mini", BOOT_SCRIPT, &["node1"])?;
    let two = bed.sliver(&slice, "node1")?;
    step("login to the second", || check_login("demo_two", &two))?;
    let url = serve(bed, "demo_one", &one)?;
    let other_url = serve(bed, "demo_two", &two)?;
    step("neighbours", || neighbours(&one, &two))?;
    step("hostile calls", || hostile_calls(&one))?;
    step("foreign source port", || foreign_source_port(&one, bed.plc.port()))?;
    step("another key", || another_key(bed, &one))?;
    step("bad resources", || bad_resources(bed, one.first_port))?;
    step("still there", || fetch(&other_url).map(drop))?;

    step("nodemgr is killed", || {
        bed.nodes[0].kill("nodemgr")?;
        fetch(&url)?;
        until("SSH after nodemgr was killed", || check_login("demo_one", &one))?;
        until("API after nodemgr was killed", || {
            upload(&two, tool).and_then(|()| call(&two, "GET", "/v1/slivers", "").map(drop))
        })
    })?;
    step("net-demux is killed", || {
        bed.nodes[0].kill("net-demux")?;
        until("HTTP after net-demux was killed", || fetch(&url).map(drop))?;
        until("HTTP of the other one", || fetch(&other_url).map(drop))?;
        neighbours(&one, &two)
    })?;

    step("planned restart", || {
        let (boot, heard) = (boot_id(&one)?, Conversation::start(&one, &two)?);
        bed.reboot(0, Node::restart)?;
        until("SSH after the planned restart", || boot_id(&one).map(drop))?;
        ensure!(boot_id(&one)? == boot, "the sliver was started afresh");
        fetch(&url)?;
        heard.goes_on(&one, &two)
    })?;

    step("reboot", || {
        one.ssh.run("echo kept > /root/file && sync")?;
        bed.reboot(0, Node::reset)?;
        until("SSH after the reboot", || {
            let file = one.ssh.run("cat /root/file")?;
            ensure!(file == "kept\n", "the file says {file:?}");
            Ok(())
        })
    })?;

    step("delete", || {
        bed.user.run(&["slice", "delete", "demo_two"])?;
        until("the second sliver is gone", || {
            let node = call(&one, "GET", "/v1/node", "")?.1;
            ensure!(node["free"] == free, "free is {}, was {free} before", node["free"]);
            Ok(())
        })?;
        ensure!(two.ssh.run("true").is_err(), "a deleted sliver lets people in");
        check_login("demo_one", &one)
    })
}

fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = work().with_context(|| format!("step {name:?}"));
    eprintln!("{name}: {:.1} s", start.elapsed().as_secs_f64());
    result
}

/// Tries until it succeeds: what recovers does so in its own time, and there is no event outside the node to wait for.
fn until(what: &str, mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        match attempt() {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("{what}, within 120 s")));
            }
            Err(_) => std::thread::park_timeout(Duration::from_millis(250)),
        }
    }
}

fn upload(sliver: &Sliver, tool: &str) -> Result<()> {
    let bytes = std::fs::read(tool)?;
    let output = sliver.ssh.output(
        &[],
        "cat > /root/vsock-call && chmod 755 /root/vsock-call && wc -c < /root/vsock-call",
        &bytes,
    )?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(said.trim() == bytes.len().to_string(), "uploaded {} bytes, {said:?} arrived", bytes.len());
    Ok(())
}

/// A raw request to the node manager from inside a sliver: HTTP status and body.
fn raw(sliver: &Sliver, request: &[u8]) -> Result<(u16, Value)> {
    let output = sliver.ssh.output(&[], "/root/vsock-call 806", request)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let status = text.split_whitespace().nth(1).and_then(|s| s.parse().ok());
    let Some(status) = status else {
        bail!("no HTTP answer: {text:?} {}", String::from_utf8_lossy(&output.stderr));
    };
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default();
    Ok((status, serde_json::from_str(body).with_context(|| format!("not JSON: {body:?}"))?))
}

fn call(sliver: &Sliver, method: &str, path: &str, body: &str) -> Result<(u16, Value)> {
    let headers = "host: node\r\nconnection: close\r\ncontent-type: application/json\r\nx-slice: demo_two";
    let length = body.len();
    let request = format!("{method} {path} HTTP/1.1\r\n{headers}\r\ncontent-length: {length}\r\n\r\n{body}");
    raw(sliver, request.as_bytes())
}

fn refused(answer: (u16, Value), status: u16, code: &str) -> Result<()> {
    let (got, body) = answer;
    ensure!(got == status && body["error"]["code"] == code, "expected {status} {code}, got {got} {body}");
    ensure!(body["error"]["message"].as_str().is_some_and(|m| m.len() > 10), "no message: {body}");
    Ok(())
}

/// What a tenant with root in its own sliver may try at the node manager.
fn hostile_calls(sliver: &Sliver) -> Result<()> {
    let rspec = json!({
        "share": 1000, "vcpus": 1, "memory_mib": 64, "disk_mib": 64, "link": {"guaranteed_bps": 0, "cap_bps": 1},
        "ports": {"block": 16}, "limits": {"pids": 64},
        "interval": {"start": "2026-01-01T00:00:00Z", "end": "2099-01-01T00:00:00Z"}
    });
    let acquire = json!({"rspec": rspec}).to_string();
    refused(call(sliver, "POST", "/v1/acquire", &acquire)?, 403, "forbidden")?;
    refused(call(sliver, "POST", "/v1/acquire", "{\"rspec\": {")?, 400, "invalid")?;
    refused(call(sliver, "POST", "/v1/release", "[]")?, 400, "invalid")?;
    refused(call(sliver, "GET", "/v1/rcaps/0123456789abcdef0123456789abcdef", "")?, 404, "not-found")?;
    refused(call(sliver, "GET", "/v1/nothing", "")?, 404, "not-found")?;
    let bind = json!({"slice": "demo_forged", "rcap": "0123456789abcdef0123456789abcdef", "config": {"base": "mini"}});
    refused(call(sliver, "POST", "/v1/bind", &bind.to_string())?, 404, "not-found")?;
    let bind = bind.to_string().replace("demo_forged", "../../etc");
    refused(call(sliver, "POST", "/v1/bind", &bind)?, 400, "invalid")?;
    // The socket says who calls, whatever a header or a path claims; whether others' slivers exist is not told.
    refused(call(sliver, "DELETE", "/v1/slivers/demo_two", "")?, 404, "not-found")?;
    let exec = json!({"argv": ["id"]}).to_string();
    refused(call(sliver, "POST", "/v1/slivers/plc_agent/exec", &exec)?, 404, "not-found")?;
    let (_, node) = call(sliver, "GET", "/v1/node", "")?;
    ensure!(node["caller"] == "demo_one", "the node manager takes demo_one for {}", node["caller"]);
    let length = 10 << 20;
    let mut long = format!("POST /v1/acquire HTTP/1.1\r\nhost: node\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n").into_bytes();
    long.resize(long.len() + length, b' ');
    refused(raw(sliver, &long)?, 413, "too-large")?;
    // A line that never ends, and no HTTP at all.
    let output = sliver.ssh.output(
        &[],
        "head -c 300000 /dev/zero | tr '\\0' a | /root/vsock-call 806 | head -c 12",
        b"",
    )?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said:?}");
    call(sliver, "GET", "/v1/node", "").map(drop)
}

fn neighbours(one: &Sliver, two: &Sliver) -> Result<()> {
    for (from, to) in [(one, two), (two, one)] {
        let url = format!("http://{}:{}/", to.address, to.first_port);
        let page = from.ssh.run(&format!("wget -q -O - {url}"))?;
        ensure!(page.contains("hello from demo-"), "{url} says {page:?}");
    }
    Ok(())
}

/// Changes with each boot of a guest's kernel.
fn boot_id(sliver: &Sliver) -> Result<String> {
    sliver.ssh.run("cat /proc/sys/kernel/random/boot_id")
}

/// A TCP connection between two slivers, on which nothing was said yet but that it is there.
struct Conversation;

impl Conversation {
    fn start(from: &Sliver, to: &Sliver) -> Result<Self> {
        let port = to.first_port + 3;
        to.ssh.run(&format!("setsid nc -l -p {port} > /run/heard 2> /run/nc.log < /dev/null & echo"))?;
        let connect = format!("PeerAddr => \"{}\", PeerPort => {port}, Timeout => 5", to.address);
        let talk = "$|=1; $s->autoflush(1); print $s \"hello\\n\"; open(my $p, \"<\", \"/run/say\"); print {$s} <$p>";
        from.ssh.run(&format!(
            "mkfifo /run/say; setsid perl -MIO::Socket::INET -e \
             'for (1..50) {{ $s = IO::Socket::INET->new({connect}) and last; select undef, undef, undef, .1 }} {talk}' \
             > /run/perl.log 2>&1 < /dev/null & echo"
        ))?;
        until("the connection", || Self::heard(to, "hello\n"))?;
        Ok(Self)
    }

    fn goes_on(self, from: &Sliver, to: &Sliver) -> Result<()> {
        from.ssh.run("echo still there > /run/say")?;
        until("the connection after all", || Self::heard(to, "hello\nstill there\n"))
    }

    fn heard(to: &Sliver, wanted: &str) -> Result<()> {
        let heard = to.ssh.run("cat /run/heard")?;
        ensure!(heard == wanted, "heard {heard:?}");
        Ok(())
    }
}

/// A packet with a source port of somebody else never leaves the node; one with an own port does.
fn foreign_source_port(sliver: &Sliver, plc: u16) -> Result<()> {
    let connect = |port: u16| {
        let to = format!("PeerAddr => \"10.0.2.2\", PeerPort => {plc}, LocalPort => {port}, Timeout => 5");
        format!("perl -MIO::Socket::INET -e 'IO::Socket::INET->new({to}) or die $@'")
    };
    sliver.ssh.run(&connect(sliver.first_port + 1)).context("an own source port")?;
    let foreign = sliver.ssh.output(&[], &connect(19_999), b"")?;
    ensure!(!foreign.status.success(), "a connection from source port 19999 got out");
    let (_, network) = call(sliver, "GET", "/v1/network", "")?;
    let dropped = network["drops"]
        .as_object()
        .context("no drop counters")?
        .iter()
        .any(|(reason, n)| reason == "port-not-owned" && n.as_u64().is_some_and(|n| n > 0));
    ensure!(dropped, "the drop was not counted: {network}");
    Ok(())
}

fn another_key(bed: &Testbed, sliver: &Sliver) -> Result<()> {
    let key = Key::create(&bed.path().join("stranger"))?;
    let host_key = sliver.info.ssh_host_key.as_deref().unwrap_or_default();
    let port = sliver.ssh.port();
    let stranger = Ssh::new(bed.path(), port, "demo_one", &key.private, host_key)?.output(&[], "id", b"")?;
    ensure!(stranger.status.code() == Some(255), "a stranger's key got {}", stranger.status);
    let nobody =
        Ssh::new(bed.path(), port, "demo_nobody", &bed.key.private, host_key)?.output(&[], "id", b"")?;
    ensure!(nobody.status.code() == Some(255), "a slice that is not there got {}", nobody.status);
    Ok(())
}

/// Resources that PLC refuses, and those that only the node can refuse: the reason must reach the user.
fn bad_resources(bed: &Testbed, taken: u16) -> Result<()> {
    let slice = "demo_greedy";
    bed.pi.run(&["slice", "create", slice])?;
    bed.pi.run(&["slice", "set-owners", slice, "alice"])?;
    bed.pi.run(&["slice", "set-state", slice, "--base", "mini"])?;
    let set =
        |more: &[&str]| bed.pi.run(&[&["slice", "set-resources", slice, "--share", "1"], more].concat());
    let refused = |result: Result<Value>, words: &[&str]| match result {
        Ok(answer) => bail!("not refused: {answer}"),
        Err(error) => {
            let said = format!("{error:#}");
            ensure!(words.iter().all(|w| said.contains(w)), "expected {words:?} in {said}");
            Ok(())
        }
    };
    refused(set(&["--until", "2020-01-01T00:00:00Z"]), &["2020-01-01"])?;
    refused(set(&["--for", "1d", "--tcp-port", "80"]), &["80", "1,024"])?;
    let instantiate = || -> Result<String> {
        let args = ["slice", "instantiate", slice, "--node", "node1", "--wait"];
        match bed.user.run(&args) {
            Ok(answer) => bail!("not refused: {answer}"),
            Err(error) => {
                let status = error.downcast_ref::<CliError>().and_then(|e| e.status.code());
                ensure!(status == Some(3), "{error:#}");
            }
        }
        Ok(bed.user.run(&["slice", "show", slice])?["slivers"][0]["reason"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    };
    set(&["--for", "1d", "--memory-mib", "1000000"])?;
    let said = instantiate()?;
    ensure!(said.contains("memory") && said.contains("free"), "{said:?}");
    bed.pi.run(&["slice", "delete", slice])?;
    bed.pi.run(&["slice", "create", slice])?;
    bed.pi.run(&["slice", "set-owners", slice, "alice"])?;
    bed.pi.run(&["slice", "set-state", slice, "--base", "mini"])?;
    set(&["--for", "1d", "--tcp-port", &taken.to_string()])?;
    let said = instantiate()?;
    ensure!(said.contains(&taken.to_string()) && said.contains("taken"), "{said:?}");
    bed.pi.run(&["slice", "delete", slice]).map(drop)
}
