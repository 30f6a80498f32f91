//! Loads kernel modules: by name with what they depend on, and for every device that says what it is.
//!
//! Reads what `depmod` writes beside the modules: `modules.dep` (paths and dependencies), `modules.alias` (patterns of
//! device identities), `modules.softdep`, and what the kernel has built in. Modules must not be compressed. No program is run; a kernel that asks
//! user space for a module by itself (`/sbin/modprobe`) gets none, so soft dependencies are honoured here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use crate::error::{self, Error, Result};

/// How deep soft dependencies and aliases may lead to each other.
const MAX_DEPTH: usize = 8;

/// What `depmod` knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Index {
    /// Module name to its path and the paths of all it needs; the last of them must be loaded first.
    modules: BTreeMap<String, (String, Vec<String>)>,
    /// Pattern and module name.
    aliases: Vec<(String, String)>,
    /// Module name to what should be loaded before it.
    soft: BTreeMap<String, Vec<String>>,
    /// Compiled into the kernel: nothing to load.
    builtin: BTreeSet<String>,
    /// Aliases of those, as `crc32c` is one of `crc32c_generic`. Another module may have the same and be better.
    builtin_aliases: BTreeSet<String>,
}

impl Index {
    /// Parses `modules.dep`, `modules.alias`, `modules.softdep`, `modules.builtin` and `modules.builtin.modinfo`. Lines that make no
    /// sense are skipped.
    pub fn parse(dep: &str, alias: &str, softdep: &str, builtin: &str, modinfo: &str) -> Self {
        let mut index = Self::default();
        for line in dep.lines() {
            let Some((path, needs)) = line.split_once(':') else { continue };
            let needs = needs.split_whitespace().map(Into::into).collect();
            index.modules.insert(name_of(path), (path.into(), needs));
        }
        for line in alias.lines() {
            let mut words = line.split_whitespace();
            if let (Some("alias"), Some(pattern), Some(module)) = (words.next(), words.next(), words.next()) {
                index.aliases.push((normal(pattern), normal(module)));
            }
        }
        for line in softdep.lines() {
            let mut words = line.split_whitespace();
            let (Some("softdep"), Some(module)) = (words.next(), words.next()) else { continue };
            let before = words.skip_while(|w| *w != "pre:").skip(1).take_while(|w| *w != "post:");
            index.soft.entry(normal(module)).or_default().extend(before.map(normal));
        }
        index.builtin = builtin.lines().map(name_of).collect();
        // `crc32c_generic.alias=crc32c` and much else, each ended by a zero byte.
        let facts = modinfo.split('\0').filter_map(|fact| fact.split_once('.')?.1.strip_prefix("alias="));
        index.builtin_aliases = facts.map(normal).collect();
        index
    }

    /// The modules whose alias matches a device's identity (`pci:v00001AF4d…`).
    pub fn matching(&self, modalias: &str) -> Vec<&str> {
        let modalias = normal(modalias);
        let matching = self.aliases.iter().filter(|(pattern, _)| matches(pattern, &modalias));
        matching.map(|(_, module)| module.as_str()).collect()
    }

    /// The paths to load for a module or an alias of some, in order. Empty if nothing is known of it or it is built in.
    pub fn load_order(&self, wanted: &str) -> Vec<&str> {
        let mut order = Vec::new();
        self.add(&normal(wanted), &mut order, 0);
        order
    }

    /// Whether there is a module of this name, or the kernel has it built in, if only by that alias.
    pub fn knows(&self, name: &str) -> bool {
        let name = normal(name);
        self.modules.contains_key(&name)
            || self.builtin.contains(&name)
            || self.builtin_aliases.contains(&name)
    }

    fn add<'a>(&'a self, wanted: &str, order: &mut Vec<&'a str>, depth: usize) {
        if depth > MAX_DEPTH || self.builtin.contains(wanted) {
            return;
        }
        let Some((path, needs)) = self.modules.get(wanted) else {
            for module in self.matching(wanted) {
                self.add(module, order, depth + 1);
            }
            return;
        };
        for need in needs.iter().rev().chain([path]) {
            for before in self.soft.get(&name_of(need)).into_iter().flatten() {
                self.add(before, order, depth + 1);
            }
            if !order.contains(&need.as_str()) {
                order.push(need);
            }
        }
    }
}

/// Modules are named with underscores, files and aliases may have dashes. A pattern's ranges are left alone.
fn normal(name: &str) -> String {
    let mut in_range = false;
    let replaced = name.chars().map(|c| {
        in_range = (in_range || c == '[') && c != ']';
        if c == '-' && !in_range { '_' } else { c }
    });
    replaced.collect()
}

fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.strip_suffix(".ko").unwrap_or(file))
}

/// Whether `text` matches a shell pattern of `*`, `?`, `[a-z]` and plain characters (fnmatch without flags). Takes time
/// proportional to the product of the lengths, whatever the pattern.
pub fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    // Where to go back to: after the last star, one more character eaten by it.
    let mut back: Option<(usize, usize)> = None;
    loop {
        if pattern.get(p) == Some(&b'*') {
            p += 1;
            back = Some((p, t));
            continue;
        }
        match text.get(t) {
            None if p == pattern.len() => return true,
            Some(&c) => {
                if let Some(next) = one(pattern, p, c) {
                    (p, t) = (next, t + 1);
                    continue;
                }
            }
            None => return false,
        }
        let Some((star, eaten)) = back.filter(|(_, eaten)| *eaten < text.len()) else { return false };
        back = Some((star, eaten + 1));
        (p, t) = (star, eaten + 1);
    }
}

/// Matches one character against the pattern at `p`; where the pattern goes on.
fn one(pattern: &[u8], p: usize, c: u8) -> Option<usize> {
    match *pattern.get(p)? {
        b'?' => Some(p + 1),
        b'[' => {
            let end = p + 1 + pattern.get(p + 1..)?.iter().position(|b| *b == b']')?;
            let mut set = pattern.get(p + 1..end)?;
            let mut hit = false;
            while let [first, rest @ ..] = set {
                if let [b'-', last, rest @ ..] = rest {
                    hit |= (*first..=*last).contains(&c);
                    set = rest;
                } else {
                    hit |= *first == c;
                    set = rest;
                }
            }
            hit.then_some(end + 1)
        }
        plain => (plain == c).then_some(p + 1),
    }
}

/// Loads modules of the running kernel.
pub struct Modules {
    directory: PathBuf,
    index: Index,
    /// Paths that were tried, so that each failure is told once.
    tried: BTreeSet<String>,
}

impl Modules {
    /// Reads the index of the running kernel's modules in `/lib/modules`.
    ///
    /// # Errors
    /// When there is none.
    pub fn open() -> Result<Self> {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let directory = Path::new("/lib/modules").join(release);
        let optional = |name| error::read(directory.join(name)).unwrap_or_default();
        let index = Index::parse(
            &error::read(directory.join("modules.dep"))?,
            &error::read(directory.join("modules.alias"))?,
            &optional("modules.softdep"),
            &optional("modules.builtin"),
            &optional("modules.builtin.modinfo"),
        );
        Ok(Self { directory, index, tried: BTreeSet::new() })
    }

    /// Loads a module by name (or all of an alias), with what it needs. One that the kernel has built in is a success.
    ///
    /// # Errors
    /// When it is not there or the kernel refuses it.
    pub fn load(&mut self, name: &str) -> Result<()> {
        if !self.index.knows(name) && self.index.load_order(name).is_empty() {
            let why = format!("not in {}", self.directory.display());
            return Err(Error::Malformed { what: format!("module {name}"), why });
        }
        let failed = self.insert(name);
        failed.into_iter().next().map_or(Ok(()), Err)
    }

    /// Loads what a device's identity asks for. Devices without a driver are usual; failures are returned to be told.
    pub fn load_for(&mut self, modalias: &str) -> Vec<Error> {
        let wanted: Vec<String> = self.index.matching(modalias).into_iter().map(Into::into).collect();
        wanted.iter().flat_map(|name| self.insert(name)).collect()
    }

    /// Loads drivers for all devices that the kernel knows now. New ones announce themselves ([`crate::uevent`]).
    pub fn coldplug(&mut self) -> Vec<Error> {
        let mut modaliases = BTreeSet::new();
        find_modaliases(Path::new("/sys/devices"), &mut modaliases, 0);
        modaliases.iter().flat_map(|modalias| self.load_for(modalias)).collect()
    }

    fn insert(&mut self, wanted: &str) -> Vec<Error> {
        let mut failed = Vec::new();
        let order: Vec<String> = self.index.load_order(wanted).into_iter().map(Into::into).collect();
        for path in order {
            if !self.tried.insert(path.clone()) {
                continue;
            }
            let full = self.directory.join(&path);
            let done = File::open(&full).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO));
            let done = done.and_then(|file| rustix::system::finit_module(file, c"", 0));
            match done {
                // ENODEV: the module looked for its hardware and found none, as those of CPU features do.
                Ok(()) | Err(Errno::EXIST | Errno::NODEV) => {}
                Err(e) => failed.push(Error::Io { what: format!("load module {path}"), source: e.into() }),
            }
        }
        failed
    }
}

/// Collects all `modalias` files below; the tree of devices has no links upwards that this would follow.
fn find_modaliases(directory: &Path, found: &mut BTreeSet<String>, depth: usize) {
    if depth > 32 {
        return;
    }
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => find_modaliases(&entry.path(), found, depth + 1),
            Ok(kind) if kind.is_file() && entry.file_name() == "modalias" => {
                found.extend(std::fs::read_to_string(entry.path()).ok().map(|text| text.trim().to_owned()));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DEP: &str = "\
kernel/drivers/net/virtio_net.ko: kernel/drivers/net/net_failover.ko kernel/net/core/failover.ko
kernel/drivers/net/net_failover.ko: kernel/net/core/failover.ko
kernel/net/core/failover.ko:
kernel/fs/ext4/ext4.ko: kernel/lib/libcrc32c.ko kernel/fs/jbd2/jbd2.ko
kernel/lib/libcrc32c.ko:
kernel/fs/jbd2/jbd2.ko:
kernel/arch/x86/crypto/crc32c-intel.ko:
kernel/crypto/crc32c_generic.ko:
garbage";
    const ALIAS: &str = "\
# Aliases extracted from modules themselves.
alias virtio:d00000001v* virtio_net
alias crypto-crc32c crc32c_generic
alias crc32c crc32c-intel
alias crc32c crc32c_generic
alias pci:v00008086d0000[0-9A]*sv* e1000";
    const SOFT: &str = "softdep ext4 pre: crc32c post: nothing\nsoftdep loop1 pre: loop2";

    const MODINFO: &str =
        "sha256_generic.alias=crypto-sha256\0sha256_generic.license=GPL\0garbage\0\0proc.alias=crc32c\0";

    fn index() -> Index {
        Index::parse(DEP, ALIAS, SOFT, "kernel/fs/proc.ko\n", MODINFO)
    }

    #[test]
    fn orders_dependencies_first() {
        let net = [
            "kernel/net/core/failover.ko",
            "kernel/drivers/net/net_failover.ko",
            "kernel/drivers/net/virtio_net.ko",
        ];
        assert_eq!(index().load_order("virtio-net"), net);
        let ext4 = index();
        let ext4 = ext4.load_order("ext4");
        assert_eq!(ext4.last(), Some(&"kernel/fs/ext4/ext4.ko"));
        assert!(ext4.contains(&"kernel/arch/x86/crypto/crc32c-intel.ko"));
        assert!(ext4.contains(&"kernel/crypto/crc32c_generic.ko"));
        assert!(index().load_order("proc").is_empty() && index().knows("proc"));
        assert!(index().load_order("nothing").is_empty() && !index().knows("nothing"));
    }

    #[test]
    fn an_alias_of_what_is_built_in_is_known_and_leads_to_better_modules() {
        assert!(index().knows("crypto-sha256") && index().load_order("crypto-sha256").is_empty());
        let better = ["kernel/arch/x86/crypto/crc32c-intel.ko", "kernel/crypto/crc32c_generic.ko"];
        assert!(index().knows("crc32c"));
        assert_eq!(index().load_order("crc32c"), better);
    }

    #[test]
    fn soft_dependencies_may_be_circular() {
        let dep = "a.ko:\nb.ko:\n";
        let index = Index::parse(dep, "", "softdep a pre: b\nsoftdep b pre: a", "", "");
        let order = index.load_order("a");
        assert_eq!(order.len(), 2);
    }

    #[test]
    fn finds_drivers_by_identity() {
        assert_eq!(index().matching("virtio:d00000001v00001AF4"), ["virtio_net"]);
        assert_eq!(index().matching("pci:v00008086d0000A123sv1"), ["e1000"]);
        assert!(index().matching("pci:v00008086d0000B123sv1").is_empty());
    }

    #[test]
    fn matches_as_fnmatch() {
        for (pattern, text, expected) in [
            ("", "", true),
            ("*", "", true),
            ("a*b*c", "axxbyyc", true),
            ("a*b*c", "axxbyy", false),
            ("?", "", false),
            ("[a-c]x", "bx", true),
            ("[a-c]x", "dx", false),
            ("[abc", "a", false),
            ("*feature:*00C2*", "cpu:type:x86,feature:,0001,00C2,", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    proptest! {
        #[test]
        fn a_text_with_stars_put_in_matches(parts in proptest::collection::vec("[a-z]{0,5}", 1..6)) {
            prop_assert!(matches(&parts.join("*"), &parts.concat()));
            prop_assert!(matches(&parts.join("*"), &parts.join("zz")));
        }

        #[test]
        fn matching_ends(pattern in "[a*?\\[\\]-]{0,40}", text in "[ab\\[-]{0,40}") {
            matches(&pattern, &text);
        }

        #[test]
        fn parsing_anything_is_harmless(dep in ".{0,200}", alias in ".{0,200}", soft in ".{0,200}") {
            Index::parse(&dep, &alias, &soft, "", &dep).load_order("a");
        }
    }
}
