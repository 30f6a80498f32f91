//! Laying files: whole or not at all, with their mode, whatever was there before. One that is as it should be is left alone.
//!
//! Paths are absolute and have no `..`; parents are made (0755). Symbolic links among the parents are followed: this is
//! the tenant's own root, and a base may have `/var/run` as one. The last component is replaced, never followed.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

use commonage_init::error::Context as _;

use crate::error::{Error, Result};

/// Writes `contents` to `path` under `root` (`/` in a sliver).
///
/// # Errors
/// The path is not one that is laid, or the file cannot be written.
pub fn lay(root: &Path, path: &str, mode: u32, contents: &[u8]) -> Result<()> {
    let target = root.join(relative(path)?);
    if is_laid(&target, mode, contents) {
        return Ok(());
    }
    let what = || format!("write {path}");
    let parent = target.parent().unwrap_or(root);
    fs::create_dir_all(parent).what(what)?;
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".commonage-new");
    let new = parent.join(name);
    let write = || -> io::Result<()> {
        // A leftover of a machine that was cut off.
        match fs::remove_file(&new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(contents)?;
        file.set_permissions(Permissions::from_mode(mode & 0o7777))?;
        fs::rename(&new, &target)
    };
    Ok(write().what(what)?)
}

/// Whether there is exactly such a file.
fn is_laid(target: &Path, mode: u32, contents: &[u8]) -> bool {
    let alike = |there: fs::Metadata| {
        let size = u64::try_from(contents.len()).ok();
        there.is_file() && Some(there.len()) == size && there.permissions().mode() & 0o7777 == mode & 0o7777
    };
    fs::symlink_metadata(target).is_ok_and(alike) && fs::read(target).is_ok_and(|there| there == contents)
}

/// The path without its root.
fn relative(path: &str) -> Result<PathBuf> {
    let refuse = |why| Err(Error::Path { path: path.chars().take(200).collect(), why });
    let given = Path::new(path);
    if !given.is_absolute() {
        return refuse("it is not absolute");
    }
    if path.contains('\0') {
        return refuse("it contains a NUL");
    }
    if path.ends_with('/') || given.file_name().is_none() {
        return refuse("it names no file");
    }
    let mut relative = PathBuf::new();
    for component in given.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => relative.push(name),
            Component::ParentDir | Component::Prefix(_) => return refuse("it contains `..`"),
        }
    }
    Ok(relative)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn files_get_parents_mode_and_contents_and_replace_links() {
        let dir = tempfile::tempdir().unwrap();
        lay(dir.path(), "/a/b/c", 0o640, b"one").unwrap();
        lay(dir.path(), "/a/b/c", 0o755, b"two").unwrap();
        let c = dir.path().join("a/b/c");
        assert_eq!(fs::read(&c).unwrap(), b"two");
        assert_eq!(fs::metadata(&c).unwrap().permissions().mode() & 0o7777, 0o755);
        std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
        lay(dir.path(), "/link", 0o600, b"three").unwrap();
        assert!(fs::symlink_metadata(dir.path().join("link")).unwrap().is_file());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn what_is_laid_already_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(dir.path().join("a")).unwrap());
        lay(dir.path(), "/a", 0o644, b"one").unwrap();
        let first = inode();
        lay(dir.path(), "/a", 0o644, b"one").unwrap();
        assert_eq!(inode(), first);
        // Kept open, so that its number is not used again.
        let _kept = fs::File::open(dir.path().join("a")).unwrap();
        lay(dir.path(), "/a", 0o600, b"one").unwrap();
        assert_ne!(inode(), first);
        lay(dir.path(), "/a", 0o600, b"two").unwrap();
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"two");
    }

    #[test]
    fn odd_paths_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["", "/", "a", "./a", "/a/../b", "/..", "/a/", "/a/..", "/a\0b", "//"] {
            assert!(matches!(lay(dir.path(), path, 0o600, b""), Err(Error::Path { .. })), "{path:?}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    proptest! {
        #[test]
        fn no_path_leaves_the_root(path in "[/.a\0]{0,12}") {
            if let Ok(relative) = relative(&path) {
                prop_assert!(relative.components().all(|c| matches!(c, Component::Normal(_))));
                prop_assert!(relative.file_name().is_some());
            }
        }
    }
}
