//! The bases of slivers: read-only erofs images that every sliver of a node maps through virtio-pmem with DAX.
//!
//! DAX wants every file's data in whole blocks, not compressed and not inline, and the device's length a multiple of 2 MiB.
//! `mini` is a static busybox; `agent` is that with PLC's agent; `debian` is Debian's minimal system, ready for apt. `containers`, which is no
//! part of a node, is a Debian with podman, Docker and the network's tools: the tests see in it that a sliver can do what its kernel promises.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Context;
use crate::apt::{self, Facts};
use crate::cache::{Build, Recipe};
use crate::error::{Error, IoContext as _, Result};
use crate::initramfs::Binaries;
use crate::packages::{self, Versions};

/// What `debian` has besides what is essential: enough to look at the network, serve and fetch files, and trust what HTTPS says.
pub const DEBIAN_PACKAGES: &[&str] =
    &["busybox-static", "ca-certificates", "iproute2", "netbase", "procps", "wget"];

/// What `containers` has besides what is essential.
pub const CONTAINER_PACKAGES: &[&str] = &[
    "aardvark-dns",
    "arptables",
    "bpftool",
    "busybox-static",
    "catatonit",
    "crun",
    "docker.io",
    "e2fsprogs",
    "ebtables",
    "ethtool",
    "fuse-overlayfs",
    "iproute2",
    "ipset",
    "iptables",
    "ipvsadm",
    "netavark",
    "nftables",
    "podman",
    "procps",
    "slirp4netns",
    "uidmap",
    "wireguard-tools",
];

/// Directories for the layers of containers. Their programs cannot keep those on an overlay, which a sliver's root is, so sliver-init mounts
/// parts of the disk itself here: see `root.rs` there.
const LAYERS: &[&str] = &["var/lib/containerd", "var/lib/containers", "var/lib/docker"];

/// What virtio-pmem maps at once.
const ALIGNMENT: u64 = 2 << 20;
const BUSYBOX: &str = "/bin/busybox";
/// No times and no random identifier, so that equal trees give equal images; no inline data, so that all of it is mapped with DAX.
const MKFS: &[&str] = &["-T0", "-U00000000-0000-4000-8000-000000000000", "-Enoinline_data", "--quiet"];

/// Directories of `mini`, and whether anyone may write there.
const DIRECTORIES: &[(&str, u32)] = &[
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("home", 0o755),
    ("proc", 0o755),
    ("root", 0o700),
    ("run", 0o755),
    ("sbin", 0o755),
    ("srv", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("usr/bin", 0o755),
    ("usr/sbin", 0o755),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
    ("var/www", 0o755),
];

/// Files of `mini`.
const FILES: &[(&str, &str)] = &[
    ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"),
    (
        "etc/profile",
        "export PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin\nexport PS1='\\h:\\w\\$ '\n",
    ),
    ("etc/protocols", "ip 0 IP\nicmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\n"),
    ("etc/services", "ssh 22/tcp\ndomain 53/tcp\ndomain 53/udp\nhttp 80/tcp\nhttps 443/tcp\n"),
    ("etc/shells", "/bin/sh\n"),
];

/// Builds all bases; returns them by file name.
///
/// # Errors
/// When a package cannot be had or an image not made.
pub fn build(
    context: &Context,
    versions: &Versions,
    facts: &Facts,
    binaries: &Binaries,
) -> Result<BTreeMap<String, PathBuf>> {
    let agent = binaries.get("plc-agent").ok_or_else(|| {
        Error::unexpected("build the base `agent`", "no package of the workspace makes plc-agent")
    })?;
    let bases = [
        ("base-mini.erofs", busybox(context, versions, "base-mini", None)?),
        ("base-agent.erofs", busybox(context, versions, "base-agent", Some(agent))?),
        ("base-debian.erofs", debian(context, versions, facts)?),
    ];
    Ok(bases.into_iter().map(|(name, path)| (name.to_owned(), path)).collect())
}

fn recipe(kind: &str, versions: &Versions) -> Recipe {
    Recipe::new(kind, 1).input("mkfs", format!("{} {}", versions.of("erofs-utils"), MKFS.join(" ")))
}

fn busybox(context: &Context, versions: &Versions, kind: &str, agent: Option<&PathBuf>) -> Result<PathBuf> {
    let mut recipe = recipe(kind, versions)
        .input("busybox", versions.of("busybox-static"))
        .input("files", format!("{DIRECTORIES:?} {FILES:?}"));
    if let Some(agent) = agent {
        recipe = recipe.file("plc-agent", agent)?;
    }
    let image = format!("{kind}.erofs");
    let entry = context.cache.get(&recipe, |build| {
        let root = build.scratch.join("root");
        stage(build, &root)?;
        if let Some(agent) = agent {
            install(agent, &root.join("usr/sbin/plc-agent"))?;
        }
        let mut mkfs = Command::new("mkfs.erofs");
        let output = build.out.join(&image);
        mkfs.args(MKFS).arg("--all-root").arg(&output).arg(&root);
        build.log.run("make an erofs image", &mut mkfs)?;
        pad(&output)
    })?;
    Ok(entry.path(&image))
}

/// Lays `mini` out in a directory.
fn stage(build: &Build<'_>, root: &Path) -> Result<()> {
    for (name, mode) in DIRECTORIES {
        let path = root.join(name);
        std::fs::create_dir_all(&path).doing("create", &path)?;
        chmod(&path, *mode)?;
    }
    chmod(root, 0o755)?;
    for (name, text) in FILES {
        let path = root.join(name);
        std::fs::write(&path, text).doing("write", &path)?;
        chmod(&path, 0o644)?;
    }
    install(Path::new(BUSYBOX), &root.join("bin/busybox"))?;
    let applets = build.log.output("list busybox's applets", Command::new(BUSYBOX).arg("--list-full"))?;
    for applet in applets.lines() {
        let path = root.join(applet);
        if path.exists() || applet == "linuxrc" {
            continue;
        }
        symlink(BUSYBOX, &path).doing("link", &path)?;
    }
    Ok(())
}

fn debian(context: &Context, versions: &Versions, facts: &Facts) -> Result<PathBuf> {
    let contents = Contents { packages: DEBIAN_PACKAGES, closure: &facts.base_packages };
    contents.base("base-debian", context, versions, facts)
}

/// The base `containers`, for tests alone: built when asked for.
///
/// # Errors
/// When a package cannot be had or the image not made.
pub fn containers(context: &Context) -> Result<PathBuf> {
    let versions = packages::ensure(context, &[packages::BUILD])?;
    let facts = apt::facts(context)?;
    let contents = Contents { packages: CONTAINER_PACKAGES, closure: &facts.container_packages };
    contents.base("base-containers", context, &versions, &facts)
}

/// What a base of Debian's packages is made of.
struct Contents<'a> {
    packages: &'a [&'a str],
    /// Versions of those and of all that they need.
    closure: &'a [String],
}

impl Contents<'_> {
    fn base(&self, kind: &str, context: &Context, versions: &Versions, facts: &Facts) -> Result<PathBuf> {
        let recipe = recipe(kind, versions)
            .input("builder", versions.of("mmdebstrap"))
            .input("include", self.packages.join(" "))
            .input("leave out", LEFT_OUT.join(" "))
            .input("directories", LAYERS.join(" "))
            .input("release", &facts.release)
            .input("sources", facts.sources.join("\n"))
            .input("packages", self.closure.join("\n"));
        let image = format!("{kind}.erofs");
        let entry = context.cache.get(&recipe, |build| bootstrap(build, facts, self.packages, &image))?;
        Ok(entry.path(&image))
    }
}

/// What dpkg does not unpack: nobody reads manuals in a sliver.
const LEFT_OUT: &[&str] = &[
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/man/*",
];

/// From an archive on standard input to an image on standard output, with all owners and attributes: as root, or as a user's own root.
const TAR_TO_EROFS: &str = r#"set -eu
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
mkdir "$d/root"
tar -x --xattrs --xattrs-include='*' --numeric-owner --exclude='./dev/*' --exclude=./etc/hostname \
  --exclude=./etc/resolv.conf --exclude=./etc/apt/apt.conf.d/99mmdebstrap -C "$d/root" >&2
mkfs.erofs "$@" "$d/image" "$d/root" >&2
cat "$d/image""#;

fn bootstrap(build: &Build<'_>, facts: &Facts, packages: &[&str], image: &str) -> Result<()> {
    let sources = build.scratch.join("sources.list");
    std::fs::write(&sources, facts.sources.join("\n") + "\n").doing("write", &sources)?;
    let archive = build.scratch.join("debian.tar");
    let mut mmdebstrap = apt::command("mmdebstrap");
    mmdebstrap.env("SOURCE_DATE_EPOCH", "0").args(["--variant=minbase", "--format=tar"]);
    mmdebstrap.arg(format!("--include={}", packages.join(",")));
    mmdebstrap.arg(format!("--customize-hook=cd \"$1\" && mkdir -p -m 0711 {}", LAYERS.join(" ")));
    mmdebstrap.args(LEFT_OUT.iter().map(|option| format!("--dpkgopt={option}")));
    for option in proxies(&build.log.output("ask apt for proxies", apt::command("apt-config").arg("dump"))?) {
        mmdebstrap.arg(format!("--aptopt={option}"));
    }
    mmdebstrap.arg(&facts.release).arg(&archive).arg(&sources);
    build.log.run("make a minimal Debian", &mut mmdebstrap)?;

    let image = build.out.join(image);
    let mut convert = if rustix::process::geteuid().is_root() {
        Command::new("sh")
    } else {
        let mut convert = Command::new("mmdebstrap");
        convert.args(["--unshare-helper", "sh"]);
        convert
    };
    convert.args(["-c", TAR_TO_EROFS, "tar-to-erofs"]).args(MKFS);
    build.log.filter("make an erofs image", &mut convert, &archive, &image)?;
    pad(&image)
}

/// The machine's own way to the mirrors, from `apt-config dump`.
fn proxies(config: &str) -> Vec<&str> {
    let ways = ["Acquire::http", "Acquire::https"];
    let wanted =
        |l: &&str| ways.iter().any(|w| l.starts_with(w)) && (l.contains("Proxy") || l.contains("CaInfo"));
    config.lines().filter(wanted).filter(|l| !l.ends_with("\"\";")).collect()
}

fn install(from: &Path, to: &Path) -> Result<()> {
    std::fs::copy(from, to).doing("copy", from)?;
    chmod(to, 0o755)
}

fn chmod(path: &Path, mode: u32) -> Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).doing("set permissions of", path)
}

fn pad(image: &Path) -> Result<()> {
    let file = File::options().write(true).open(image).doing("open", image)?;
    let length = file.metadata().doing("look at", image)?.len();
    file.set_len(length.next_multiple_of(ALIGNMENT)).doing("pad", image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_real_proxies_are_passed_on() {
        let config = "Acquire::http::Proxy \"http://cache:3142\";\nAcquire::https \"\";\nAcquire::http::Proxy::x \"\";\nAPT::Proxy \"no\";\n";
        assert_eq!(proxies(config), ["Acquire::http::Proxy \"http://cache:3142\";"]);
    }

    #[test]
    fn images_are_padded_for_dax() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (length, padded) in [(1, 2 << 20), (2 << 20, 2 << 20), ((2 << 20) + 1, 4 << 20)] {
            file.as_file().set_len(length).unwrap();
            pad(file.path()).unwrap();
            assert_eq!(file.path().metadata().unwrap().len(), padded);
        }
    }
}
