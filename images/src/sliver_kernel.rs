//! The kernel of slivers: Debian's `linux-source-6.12`, with the changes in `kernel/patches`, configured by `kernel/*.config` over `tinyconfig`.
//!
//! It is not Debian's packaged kernel because that takes seven seconds to boot as a nested guest and this one half a second.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Context;
use crate::cache::{Build, Recipe};
use crate::error::{Error, IoContext as _, Result};
use crate::packages::Versions;

const FRAGMENT_NAME: &str = "images/kernel/*.config";
const FRAGMENT: &str =
    concat!(include_str!("../kernel/sliver.config"), "\n", include_str!("../kernel/network.config"));
/// Changes to the source, each with its reason at its beginning, by name.
const PATCHES: &[(&str, &str)] = &[
    ("deferrable-housekeeping", include_str!("../kernel/patches/deferrable-housekeeping.patch")),
    ("no-fair-server", include_str!("../kernel/patches/no-fair-server.patch")),
    ("small-machines", include_str!("../kernel/patches/small-machines.patch")),
];
const SOURCE: &str = "/usr/src/linux-source-6.12.tar.xz";

/// Builds it; returns the stripped `vmlinux`.
///
/// # Errors
/// When the fragment asks for what this version doesn't have, or the build fails.
pub fn build(context: &Context, versions: &Versions) -> Result<PathBuf> {
    let recipe = Recipe::new("sliver-kernel", 2)
        .input("config", FRAGMENT)
        .input("patches", PATCHES.iter().map(|(_, text)| *text).collect::<String>())
        .input("source", versions.of("linux-source-6.12"))
        .input("compiler", versions.of("gcc"))
        .input("linker", versions.of("binutils"));
    Ok(context.cache.get(&recipe, compile)?.path("vmlinux"))
}

fn compile(build: &Build<'_>) -> Result<()> {
    let source = build.scratch.join("linux");
    std::fs::create_dir(&source).doing("create", &source)?;
    let mut tar = Command::new("tar");
    build.log.run(
        "unpack the kernel source",
        tar.args(["-xf", SOURCE, "--strip-components=1", "-C"]).arg(&source),
    )?;

    for (name, text) in PATCHES {
        let file = build.scratch.join(format!("{name}.patch"));
        std::fs::write(&file, text).doing("write", &file)?;
        let mut patch = Command::new("patch");
        // No fuzz: a patch that nearly fits may do something else than it says.
        patch.args(["--batch", "--forward", "--fuzz=0", "-p1", "-d"]).arg(&source).arg("-i").arg(&file);
        build.log.run(&format!("apply images/kernel/patches/{name}.patch"), &mut patch)?;
    }

    build.log.run("make tinyconfig", make(&source).arg("tinyconfig"))?;
    let path = source.join(".config");
    let config = std::fs::read_to_string(&path).doing("read", &path)?;
    std::fs::write(&path, format!("{config}\n{FRAGMENT}")).doing("write", &path)?;
    build.log.run("make olddefconfig", make(&source).arg("olddefconfig"))?;
    let config = std::fs::read_to_string(&path).doing("read", &path)?;
    let problems = lost(FRAGMENT, &config);
    if !problems.is_empty() {
        return Err(Error::KernelConfig { fragment: FRAGMENT_NAME, problems });
    }

    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    build.log.run("build the sliver kernel", make(&source).arg(format!("-j{jobs}")).arg("vmlinux"))?;
    let mut strip = Command::new("strip");
    strip.arg("--strip-all").arg("-o").arg(build.out.join("vmlinux")).arg(source.join("vmlinux"));
    build.log.run("strip the sliver kernel", &mut strip)?;
    let kept = build.out.join("config");
    std::fs::write(&kept, config).doing("write", &kept)
}

/// `make` in the source, telling neither time nor place in what it makes.
fn make(source: &Path) -> Command {
    let mut make = Command::new("make");
    make.arg("-C").arg(source).env("LC_ALL", "C.UTF-8");
    make.env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970");
    make.env("KBUILD_BUILD_USER", "commonage").env("KBUILD_BUILD_HOST", "commonage");
    // Flags of a make or cargo around us are not for the kernel.
    for variable in
        ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "CARGO_MAKEFLAGS", "CFLAGS", "LDFLAGS", "ARCH", "CROSS_COMPILE"]
    {
        make.env_remove(variable);
    }
    make
}

/// What the fragment says and the final configuration doesn't: Kconfig drops options whose dependencies fail without a word.
fn lost(fragment: &str, config: &str) -> Vec<String> {
    let have: BTreeSet<&str> = config.lines().map(str::trim).filter(|l| l.starts_with("CONFIG_")).collect();
    let is_set =
        |name: &str| have.iter().any(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')));
    let mut problems = Vec::new();
    for line in fragment.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        match line.split_once('=') {
            Some((name, "n")) if is_set(name) => problems.push(format!("{name} is on")),
            Some((_, "n")) => {}
            Some((name, value)) if !have.contains(line) => problems.push(format!("{name} is not {value}")),
            Some(_) => {}
            None => problems.push(format!("`{line}` is not an option")),
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_and_unwanted_options_are_named() {
        let fragment =
            "# comment\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_C=n\nCONFIG_D=n\n\nCONFIG_HZ=100\nnonsense\n";
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\nCONFIG_DX=y\nCONFIG_HZ=1000\n";
        let expected =
            ["CONFIG_B is not y", "CONFIG_C is on", "CONFIG_HZ is not 100", "`nonsense` is not an option"];
        assert_eq!(lost(fragment, config), expected);
        assert!(lost("CONFIG_A=y\nCONFIG_B=n\n", "CONFIG_A=y\n").is_empty());
    }

    #[test]
    fn our_fragment_names_each_option_once() {
        let mut seen = BTreeSet::new();
        for line in FRAGMENT.lines().filter(|l| l.starts_with("CONFIG_")) {
            let name = line.split('=').next();
            assert!(seen.insert(name), "{line} is there twice");
        }
        assert!(seen.len() > 100);
    }
}
