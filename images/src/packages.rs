//! The Debian packages that everything is built with and tested by: the one list of them.
//!
//! Their versions are part of the keys of what is made with them.

use std::collections::BTreeMap;
use std::process::Command;

use crate::error::{Error, Result};
use crate::progress::Task;
use crate::run::Log;
use crate::{Context, apt};

/// Needed to build images, and what for.
pub const BUILD: &[(&str, &str)] = &[
    ("linux-source-6.12", "the sliver kernel's source"),
    ("gcc", "the sliver kernel"),
    ("libc6-dev", "the sliver kernel's build tools"),
    ("binutils", "the sliver kernel"),
    ("make", "the sliver kernel"),
    ("patch", "the sliver kernel"),
    ("flex", "the sliver kernel"),
    ("bison", "the sliver kernel"),
    ("bc", "the sliver kernel"),
    ("libelf-dev", "the sliver kernel"),
    ("libssl-dev", "the sliver kernel"),
    ("xz-utils", "to unpack the source"),
    ("zstd", "to compress initramfs"),
    ("kmod", "depmod, for the node's kernel modules"),
    ("e2fsprogs", "mke2fs, for the node and its slivers' disks"),
    ("busybox-static", "the base `mini`"),
    ("mmdebstrap", "the base `debian`"),
    ("erofs-utils", "file systems of bases"),
    ("grub-common", "grub-mkrescue, for the CD"),
    ("grub-pc-bin", "a CD that boots by BIOS"),
    ("grub-efi-amd64-bin", "a CD that boots by UEFI"),
    ("xorriso", "the CD's file system"),
    ("mtools", "the CD's UEFI partition"),
];

/// Needed besides by those who are not root: `debian` is then made in a user namespace.
pub const UNPRIVILEGED: &[(&str, &str)] = &[("uidmap", "user namespaces for mmdebstrap")];

/// Needed besides to boot machines for the demo and the tests.
pub const MACHINES: &[(&str, &str)] = &[
    ("qemu-system-x86", "emulated nodes"),
    ("ovmf", "their UEFI firmware"),
    ("openssh-client", "to log in to slivers"),
    ("curl", "to fetch pages from slivers"),
];

/// Versions of installed packages, by name.
#[derive(Debug, Clone, Default)]
pub struct Versions(BTreeMap<String, String>);

impl Versions {
    /// `name version`, for recipes.
    pub fn of(&self, package: &str) -> String {
        format!("{package} {}", self.0.get(package).map_or("absent", String::as_str))
    }
}

/// Makes sure that all packages of these lists are installed: as root by installing them, otherwise by asking.
///
/// # Errors
/// [`Error::MissingPackages`] when some are missing and this process is not root; what apt-get says when it cannot install.
pub fn ensure(context: &Context, lists: &[&[(&str, &str)]]) -> Result<Versions> {
    let unprivileged = if rustix::process::geteuid().is_root() { &[][..] } else { UNPRIVILEGED };
    let lists = lists.iter().copied().chain([unprivileged]);
    let names: Vec<&str> = lists.flatten().map(|(name, _)| *name).collect();
    let log = Log::create(&context.cache.root().join("logs/packages.log"))?;
    let installed = query(&log, &names)?;
    let missing: Vec<String> =
        names.iter().filter(|n| !installed.0.contains_key(**n)).map(|n| (*n).to_owned()).collect();
    if missing.is_empty() {
        return Ok(installed);
    }
    if !rustix::process::geteuid().is_root() {
        return Err(Error::MissingPackages { packages: missing });
    }
    let task = Task::start("packages", Some(log.path()));
    let mut install = apt::command("apt-get");
    install.args(["install", "--yes", "--no-install-recommends"]).args(&missing);
    // Package lists may be absent (fresh machine) or out of date (a superseded version is gone from the mirror): then once more.
    if log.run("install packages", &mut install).is_err() {
        log.run("update package lists", apt::command("apt-get").arg("update"))?;
        log.run("install packages", &mut install)?;
    }
    task.done(&format!("installed {}", missing.join(" ")));
    query(&log, &names)
}

/// Which of these are installed. dpkg-query fails when it knows nothing of one of them, which is an answer too.
fn query(log: &Log, names: &[&str]) -> Result<Versions> {
    let mut command = Command::new("dpkg-query");
    command.args(["-W", "-f", "${Package}\t${db:Status-Status}\t${Version}\n"]).args(names);
    let output = command.output().map_err(|source| Error::Spawn {
        what: format!("look for packages (see {})", log.path().display()),
        program: "dpkg-query".into(),
        source,
    })?;
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

fn parse(text: &str) -> Versions {
    let installed = text.lines().filter_map(|line| {
        let mut fields = line.split('\t');
        match (fields.next(), fields.next(), fields.next()) {
            (Some(name), Some("installed"), Some(version)) => Some((name.to_owned(), version.to_owned())),
            _ => None,
        }
    });
    Versions(installed.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_count() {
        let versions =
            parse("gcc\tinstalled\t4:12.2.0-3\nmake\tconfig-files\t4.3-4.1\nbc\tnot-installed\t\n");
        assert_eq!(versions.of("gcc"), "gcc 4:12.2.0-3");
        assert_eq!(versions.0.len(), 1);
    }

    #[test]
    fn missing_packages_are_one_line_to_paste() {
        let error = Error::MissingPackages { packages: vec!["gcc".into(), "make".into()] };
        assert!(error.to_string().contains("apt-get install --no-install-recommends gcc make\n"));
        assert_eq!(error.exit_code(), 2);
    }
}
