//! What the machine's configured package sources offer. Nothing else says where packages come from.
//!
//! Asking apt takes over a second, so the answers are kept in the cache, under a key of the state of apt's own files.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::cache::{Build, Recipe};
use crate::error::{Error, IoContext as _, Result};
use crate::{Context, bases};

/// The metapackage whose newest version depends on the host kernel.
const KERNEL: &str = "linux-image-cloud-amd64";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What apt knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The package of the host kernel: `linux-image-6.1.0-56-cloud-amd64`.
    pub kernel_package: String,
    /// Its version.
    pub kernel_version: String,
    /// Debian's release: `bookworm`.
    pub release: String,
    /// Lines for a `sources.list` of the release, its updates and its security updates.
    pub sources: Vec<String>,
    /// `package version` of all that the base `debian` can be made of.
    pub base_packages: Vec<String>,
    /// The same of the base `containers`.
    pub container_packages: Vec<String>,
}

/// A command of apt's that asks nothing and speaks English.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
    command
}

/// Asks apt, or the cache.
///
/// # Errors
/// When apt fails or its sources have no Debian kernel.
pub fn facts(context: &Context) -> Result<Facts> {
    let mut recipe = Recipe::new("apt", 2)
        .input("base", bases::DEBIAN_PACKAGES.join(" "))
        .input("containers", bases::CONTAINER_PACKAGES.join(" "));
    for directory in ["/var/lib/apt/lists", "/etc/apt", "/etc/apt/sources.list.d", "/etc/apt/preferences.d"] {
        recipe = recipe.input(directory, state(Path::new(directory)));
    }
    let entry = context.cache.get(&recipe, ask)?;
    let path = entry.path("facts.json");
    let json = std::fs::read(&path).doing("read", &path)?;
    serde_json::from_slice(&json).map_err(|e| Error::unexpected("read what apt said", e.to_string()))
}

/// Names, sizes and times of a directory's files.
fn state(directory: &Path) -> String {
    let Ok(entries) = std::fs::read_dir(directory) else { return "none".into() };
    let mut lines: Vec<String> = entries
        .flatten()
        .filter_map(|e| Some((e.file_name().to_string_lossy().into_owned(), e.metadata().ok()?)))
        .filter(|(_, m)| m.is_file())
        .map(|(name, m)| format!("{name} {} {}.{}", m.len(), m.mtime(), m.mtime_nsec()))
        .collect();
    lines.sort();
    lines.join("\n")
}

fn ask(build: &Build<'_>) -> Result<()> {
    let show = |build: &Build<'_>| {
        let mut apt = command("apt-cache");
        build.log.output("ask apt for the host kernel", apt.args(["show", "--no-all-versions", KERNEL]))
    };
    let kernel = match show(build) {
        Ok(text) if text.contains("Depends:") => text,
        // A fresh machine has no package lists yet.
        _ if rustix::process::geteuid().is_root() => {
            build.log.run("update package lists", command("apt-get").arg("update"))?;
            show(build)?
        }
        Ok(_) | Err(_) => {
            return Err(Error::unexpected(
                format!("ask apt for {KERNEL}"),
                "there is none; run `apt-get update` as root, and see that Debian's main archive is among the sources",
            ));
        }
    };
    let (kernel_package, kernel_version) = parse_kernel(&kernel).ok_or_else(|| {
        Error::unexpected(
            format!("ask apt for {KERNEL}"),
            format!("it depends on no kernel of the same version:\n{kernel}"),
        )
    })?;
    let mut targets = command("apt-get");
    targets.args(["indextargets", "--format", "$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"]);
    let targets = build.log.output("ask apt for its sources", targets.arg("Created-By: Packages"))?;
    let (release, sources) = parse_sources(&targets, Path::new(KEYRING).exists()).ok_or_else(|| {
        Error::unexpected(
            "ask apt for its sources",
            "no source's origin is Debian; this needs Debian 12 or newer",
        )
    })?;
    let base_packages = closure(build, bases::DEBIAN_PACKAGES)?;
    let container_packages = closure(build, bases::CONTAINER_PACKAGES)?;
    let facts = Facts { kernel_package, kernel_version, release, sources, base_packages, container_packages };
    let json = serde_json::to_vec_pretty(&facts)
        .map_err(|e| Error::unexpected("keep what apt said", e.to_string()))?;
    let path = build.out.join("facts.json");
    std::fs::write(&path, json).doing("write", &path)
}

/// The kernel package that the metapackage's paragraph depends on, and its version.
fn parse_kernel(paragraph: &str) -> Option<(String, String)> {
    let depends = paragraph.lines().find_map(|l| l.strip_prefix("Depends: "))?;
    let (name, rest) = depends.split(", ").find(|d| d.starts_with("linux-image-"))?.split_once(" (= ")?;
    Some((name.to_owned(), rest.split(')').next()?.to_owned()))
}

/// The release and the lines of `sources.list`, from `origin|codename|uri|suite|component` lines.
fn parse_sources(targets: &str, keyring: bool) -> Option<(String, Vec<String>)> {
    let options = if keyring { format!("[signed-by={KEYRING}] ") } else { String::new() };
    let mut lines = Vec::new();
    let mut release = None;
    for line in targets.lines() {
        let fields: Vec<&str> = line.split('|').collect();
        let [origin, codename, uri, suite, component] = fields[..] else { continue };
        if !origin.eq_ignore_ascii_case("debian") || component != "main" {
            continue;
        }
        if !codename.contains('-') {
            release.get_or_insert_with(|| codename.to_owned());
        }
        lines.push(format!("deb {options}{uri} {suite} {component}"));
    }
    lines.sort();
    lines.dedup();
    // Backports and other releases would bring other versions in.
    let release = release?;
    let ours = [release.clone(), format!("{release}-updates"), format!("{release}-security")];
    lines.retain(|l| l.split(' ').rev().nth(1).is_some_and(|suite| ours.iter().any(|o| o == suite)));
    Some((release, lines))
}

/// Versions of a base's packages and of everything they may need.
fn closure(build: &Build<'_>, packages: &[&str]) -> Result<Vec<String>> {
    let mut essential = command("dpkg-query");
    let essential = build
        .log
        .output("list essential packages", essential.args(["-W", "-f", "${Essential} ${Package}\n"]))?;
    let mut depends = command("apt-cache");
    depends.args([
        "depends",
        "--recurse",
        "--no-recommends",
        "--no-suggests",
        "--no-conflicts",
        "--no-breaks",
    ]);
    depends.args(["--no-replaces", "--no-enhances"]).args(packages).arg("apt");
    depends.args(essential.lines().filter_map(|l| l.strip_prefix("yes ")));
    let depends = build.log.output("list what the base needs", &mut depends)?;
    let mut names: Vec<&str> =
        depends.lines().filter(|l| l.starts_with(|c: char| c.is_ascii_alphanumeric())).collect();
    names.sort_unstable();
    let policy = build.log.output("ask apt for versions", command("apt-cache").arg("policy").args(names))?;
    Ok(parse_policy(&policy))
}

fn parse_policy(text: &str) -> Vec<String> {
    let mut versions = Vec::new();
    let mut package = "";
    for line in text.lines() {
        if let Some(name) = line.strip_suffix(':').filter(|l| !l.starts_with(' ')) {
            package = name;
        } else if let Some(version) = line.trim().strip_prefix("Candidate: ") {
            versions.push(format!("{package} {version}"));
        }
    }
    versions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_comes_from_the_metapackage() {
        let text = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\nDepends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n";
        let expected = ("linux-image-6.1.0-56-cloud-amd64".to_owned(), "6.1.192-2".to_owned());
        assert_eq!(parse_kernel(text), Some(expected));
        assert_eq!(parse_kernel("Depends: libc6 (= 1)\n"), None);
        assert_eq!(parse_kernel(""), None);
    }

    #[test]
    fn only_debian_main_of_the_release_is_a_source() {
        let text = "Debian|bookworm|http://deb.debian.org/debian/|bookworm|main\n\
                    Debian|bookworm|http://deb.debian.org/debian/|bookworm|contrib\n\
                    Debian Backports|bookworm-backports|http://deb.debian.org/debian/|bookworm-backports|main\n\
                    Debian|bookworm-security|http://deb.debian.org/debian-security/|bookworm-security|main\n\
                    . nodistro|nodistro|https://deb.nodesource.com/node_20.x/|nodistro|main\n";
        let (release, sources) = parse_sources(text, false).unwrap();
        assert_eq!(release, "bookworm");
        let expected = [
            "deb http://deb.debian.org/debian-security/ bookworm-security main",
            "deb http://deb.debian.org/debian/ bookworm main",
        ];
        assert_eq!(sources, expected);
        assert_eq!(parse_sources("Ubuntu|noble|http://x/|noble|main\n", true), None);
    }

    #[test]
    fn policy_gives_candidates() {
        let text = "apt:\n  Installed: 2.6.1\n  Candidate: 2.6.2\n  Version table:\n     2.6.2 500\nbc:\n  Candidate: 1.07\n";
        assert_eq!(parse_policy(text), ["apt 2.6.2", "bc 1.07"]);
    }
}
