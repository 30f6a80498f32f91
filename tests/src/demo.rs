//! The demonstration: a testbed, slices on it, and proof that they work.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use commonage_plc_api::rest::Slice;
use serde_json::json;

use crate::node::Firmware;
use crate::progress::Steps;
use crate::testbed::{Options, Sliver, Testbed};

/// What to show.
#[derive(Debug, Clone)]
pub struct Demo {
    /// How many nodes.
    pub nodes: usize,
    /// How many slices, each with a sliver on every node.
    pub slivers: usize,
    /// The nodes' firmware.
    pub firmware: Firmware,
    /// The slivers' base: `mini` or `debian`.
    pub base: String,
    /// Verify, tear down, and end.
    pub once: bool,
    /// Print one JSON object at the end, and nothing else on standard output.
    pub json: bool,
}

/// The web server that every sliver of the demonstration starts. `$PORT` is the sliver's first port.
const BOOT_SCRIPT: &str = "mkdir -p /srv/www && echo \"hello from $(hostname)\" > /srv/www/index.html\n";

/// Shows it.
///
/// # Errors
/// The step that failed, with the last console lines.
pub fn run(demo: &Demo) -> Result<()> {
    let start = Instant::now();
    let mut steps = Steps::new(false);
    let result = show(demo, &mut steps);
    if demo.json {
        let seconds: BTreeMap<&str, f64> =
            steps.done().iter().map(|(name, s)| (name.as_str(), round(*s))).collect();
        let order: Vec<&str> = steps.done().iter().map(|(name, _)| name.as_str()).collect();
        let error = result.as_ref().err().map(|e| format!("{e:#}"));
        let total = round(start.elapsed().as_secs_f64());
        println!(
            "{}",
            json!({"ok": result.is_ok(), "error": error, "seconds": seconds, "order": order, "total": total})
        );
    }
    result
}

fn show(demo: &Demo, steps: &mut Steps) -> Result<()> {
    let images =
        steps.run("images", || Ok(commonage_images::build(&commonage_images::Context::from_env()?)?))?;
    let options = Options { nodes: demo.nodes, firmware: demo.firmware, ..Options::default() };
    let mut testbed = Testbed::start(&options, images, steps)?;
    match check(demo, &mut testbed, steps) {
        Ok(shown) if !demo.once => {
            tell(&mut testbed, &shown, steps);
            loop {
                // Until Ctrl-C, whose signal ends this process and, by their death signal, everything it started.
                std::thread::park();
            }
        }
        Ok(_) => steps.run("tear down", || {
            drop(testbed);
            Ok(())
        }),
        Err(error) => {
            let consoles: String =
                testbed.nodes.iter().map(|n| format!("{}:\n{}", n.name, n.console.tail(20))).collect();
            bail!("{error:#}\nthe last console lines of the nodes:\n{consoles}")
        }
    }
}

/// What a person can look at.
struct Shown {
    slices: Vec<Slice>,
    slivers: Vec<(String, Sliver)>,
    urls: Vec<String>,
}

/// Makes the slices and checks that they work.
fn check(demo: &Demo, testbed: &mut Testbed, steps: &mut Steps) -> Result<Shown> {
    let names: Vec<String> = testbed.nodes.iter().map(|n| n.name.clone()).collect();
    let nodes: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut slices = Vec::new();
    for n in 1..=demo.slivers {
        let create = || testbed.slice(&format!("s{n}"), &demo.base, BOOT_SCRIPT, &nodes);
        slices.push(steps.run(&format!("slice demo_s{n}: create, instantiate, boot script"), create)?);
    }
    let mut slivers = Vec::new();
    for slice in &slices {
        for node in &nodes {
            slivers.push((slice.name.to_string(), testbed.sliver(slice, node)?));
        }
    }
    steps.run("ssh uname -a", || slivers.iter().try_for_each(|(name, sliver)| check_login(name, sliver)))?;
    steps
        .run("ssh terminal", || slivers.iter().take(1).try_for_each(|(_, sliver)| check_terminal(sliver)))?;
    let mut urls = Vec::new();
    steps.run("web servers answer from outside", || {
        for (name, sliver) in &slivers {
            urls.push(serve(testbed, name, sliver)?);
        }
        Ok(())
    })?;
    steps.run("slivers reach each other", || check_neighbours(&slivers))?;
    Ok(Shown { slices, slivers, urls })
}

/// `uname -a` runs inside the sliver, and exit statuses come back.
pub fn check_login(slice: &str, sliver: &Sliver) -> Result<()> {
    let uname = sliver.ssh.run("uname -a")?;
    let host = slice.replace('_', "-");
    ensure!(uname.contains(&host), "uname -a of {slice} on {} says {uname:?}", sliver.info.hostname);
    let status = sliver.ssh.output(&[], "exit 42", b"")?.status;
    ensure!(status.code() == Some(42), "`exit 42` came back as {status}");
    Ok(())
}

/// A terminal has the size it is given, and Ctrl-C interrupts. The client runs under `script`, which gives it a terminal of its own.
pub fn check_terminal(sliver: &Sliver) -> Result<()> {
    let ssh = sliver.ssh.command(&["-tt"]);
    let quoted: Vec<String> = std::iter::once(ssh.get_program())
        .chain(ssh.get_args())
        .map(|a| format!("'{}'", a.to_string_lossy()))
        .collect();
    let line = format!("stty rows 33 cols 101; exec {} 2>&1", quoted.join(" "));
    let mut child = Command::new("script")
        .args(["-qefc", &line, "/dev/null"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .context("script (package bsdutils) cannot be run")?;
    let mut input = child.stdin.take().context("no pipe")?;
    let output = child.stdout.take().context("no pipe")?;
    let path = sliver.ssh.terminal_log();
    let terminal = crate::console::Console::follow(output, &path)?;
    let time = std::time::Duration::from_secs(60);
    let mut type_in = |text: &str| std::io::Write::write_all(&mut input, text.as_bytes());
    let start = crate::console::Mark::START;
    type_in("stty size; echo size-is-above\n")?;
    terminal.wait(start, &["33 101"], &[], time)?;
    // What is in the foreground says so itself, and answers an interrupt: the shell may lose one that comes while it starts a program.
    type_in("sh -c 'trap \"exit 42\" INT; echo now-$((40+2)); while :; do sleep 1; done'; echo status-$?\n")?;
    terminal.wait(start, &["now-42"], &[], time)?;
    type_in("\u{3}")?;
    // Only then the next line: the terminal drops what was typed ahead of an interrupt.
    terminal.wait(start, &["status-42"], &[], time)?;
    type_in("exit 7\n")?;
    let status = child.wait()?;
    ensure!(status.code() == Some(7), "the terminal session ended with {status}:\n{}", terminal.tail(20));
    Ok(())
}

/// Starts a web server in the sliver and fetches a page from this machine.
pub fn serve(testbed: &mut Testbed, slice: &str, sliver: &Sliver) -> Result<String> {
    let port = sliver.first_port;
    sliver.ssh.run(&format!("busybox httpd -p {port} -h /srv/www"))?;
    let local = testbed.forward(sliver.address, port)?;
    let url = format!("http://127.0.0.1:{local}/");
    let page = fetch(&url)?;
    let host = slice.replace('_', "-");
    ensure!(page.contains(&format!("hello from {host}")), "{url} of {slice} says {page:?}");
    Ok(url)
}

/// Fetches a page with curl.
pub fn fetch(url: &str) -> Result<String> {
    let output =
        Command::new("curl").args(["-sS", "--fail", "--max-time", "30", url]).output().context("curl")?;
    if !output.status.success() {
        bail!("curl {url}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The first sliver fetches the page of every other, by the nodes' addresses.
fn check_neighbours(slivers: &[(String, Sliver)]) -> Result<()> {
    let Some(((_, first), others)) = slivers.split_first() else { return Ok(()) };
    for (name, other) in others {
        let url = format!("http://{}:{}/", other.address, other.first_port);
        let page = first.ssh.run(&format!("wget -q -O - {url}"))?;
        let host = name.replace('_', "-");
        ensure!(
            page.contains(&format!("hello from {host}")),
            "{url}, seen from the first sliver, says {page:?}"
        );
    }
    Ok(())
}

fn tell(testbed: &mut Testbed, shown: &Shown, steps: &Steps) {
    let Shown { slices, slivers, urls } = shown;
    steps.say("\nThe testbed is up. Log in to a sliver:");
    for ((name, sliver), url) in slivers.iter().zip(urls) {
        steps.say(&format!("  {name} on {}: {}", sliver.info.hostname, sliver.ssh.shown()));
        steps.say(&format!("    its web server: curl {url}"));
    }
    steps.say("Look at it as alice, who owns the slices, or as the administrator:");
    for slice in slices.iter().take(1) {
        steps.say(&format!("  {} slice show {}", testbed.user.shown(), slice.name));
    }
    steps.say(&format!("  {} node list", testbed.admin.shown()));
    steps.say("Consoles of the nodes:");
    for node in &testbed.nodes {
        steps.say(&format!("  {}", node.console.path().display()));
    }
    let dir = testbed.keep();
    steps.say(&format!("Everything lies in {} and stays there. Ctrl-C ends the testbed.", dir.display()));
}

fn round(seconds: f64) -> f64 {
    (seconds * 100.0).round() / 100.0
}
