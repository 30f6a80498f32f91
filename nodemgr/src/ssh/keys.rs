//! Whether a key is one of a slice's.
//!
//! A line that carries options is skipped: they ask for restrictions (`command=`, `from=`) that are not enforced here, and a key
//! that was meant to do little must not open everything.

use std::str::FromStr as _;

use russh::keys::PublicKey;
use russh::keys::ssh_key::authorized_keys::Entry;

/// Whether `key` is in `lines`, each as in OpenSSH's `authorized_keys`. Comments, and lines that mean nothing, are ignored.
pub(super) fn contains<'a>(lines: impl IntoIterator<Item = &'a String>, key: &PublicKey) -> bool {
    lines
        .into_iter()
        .flat_map(|lines| lines.lines())
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .filter_map(|line| Entry::from_str(line).ok())
        .any(|entry| entry.config_opts().is_empty() && entry.public_key().key_data() == key.key_data())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti";
    const OTHER: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

    fn listed(line: &str) -> bool {
        contains(&[line.to_owned()], &PublicKey::from_openssh(KEY).unwrap())
    }

    #[test]
    fn comments_are_ignored_and_options_are_not() {
        assert!(listed(KEY));
        assert!(listed(&format!("  {KEY} somebody's laptop\n")));
        assert!(listed(&format!("# mine\n\n{KEY} a\n")));
        assert!(contains(&[OTHER.to_owned(), KEY.to_owned()], &PublicKey::from_openssh(KEY).unwrap()));
        for line in ["", "nonsense", OTHER, "ssh-ed25519 AAAA", "ssh-ed25519"] {
            assert!(!listed(line), "{line}");
        }
        assert!(!listed(&format!("# {KEY}")));
        assert!(!listed(&format!("command=\"/bin/backup\" {KEY}")));
        assert!(!listed(&format!("from=\"192.0.2.0/24\",no-pty {KEY}")));
    }

    proptest! {
        #[test]
        fn hostile_lines_never_panic(line in ".{0,200}") {
            prop_assert!(!listed(&line));
        }
    }
}
