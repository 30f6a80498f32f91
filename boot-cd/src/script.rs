//! Runs a boot script. Only a verified one can be: [`run`] takes nothing else.
//!
//! Signed is not the same as sensible, so the whole script is checked before its first step touches a disk: names of
//! files are plain names, and the kernel to start is one that the script installs, so its hash was just checked.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use commonage_init::{mounts, say};
use commonage_plc_api::boot::{ImageFile, Script, Step, Verified};
use commonage_plc_client::Client;

use crate::{
    ME,
    boot::{Devices, Phase},
    disk,
    error::Result,
    install, kexec,
};

/// Where the image partition is mounted.
pub const IMAGE: &str = "/image";

/// Why a genuine script is not run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScriptError {
    /// A name that could lead out of the image partition, or collide with what boot-cd writes there.
    #[error("{0:?} is not a plain file name")]
    Name(String),
    /// Not a SHA-256.
    #[error("{file} has no SHA-256 in lower-case hexadecimal")]
    Hash {
        /// Which file.
        file: String,
    },
    /// A partition without a size.
    #[error("a partition step must want an image partition smaller than the disk")]
    Size,
    /// Installing without partitions, or starting what was not installed.
    #[error("step {step} needs {needs} in an earlier step")]
    Order {
        /// Counted from 1.
        step: usize,
        /// What is missing.
        needs: String,
    },
    /// The kernel command line holds a zero byte or a line break.
    #[error("the kernel command line is not one line of text")]
    Cmdline,
    /// The script does not end with starting a kernel.
    #[error("its last step, and only that, must be kexec")]
    End,
}

/// Checks that the steps make sense, one after the other.
pub fn check(script: &Script) -> Result<(), ScriptError> {
    let mut partitioned = false;
    let mut installed: Option<&BTreeMap<String, ImageFile>> = None;
    for (step, number) in script.steps.iter().zip(1..) {
        let order = |needs: &str| Err(ScriptError::Order { step: number, needs: needs.to_owned() });
        match step {
            Step::Partition { min_mib, image_mib } => {
                if *image_mib == 0 || image_mib >= min_mib {
                    return Err(ScriptError::Size);
                }
                partitioned = true;
            }
            Step::Install { files } => {
                if !partitioned {
                    return order("a partition step");
                }
                files.iter().try_for_each(|(name, file)| check_file(name, file))?;
                installed = Some(files);
            }
            Step::Kexec { kernel, initramfs, cmdline } => {
                for file in [kernel, initramfs] {
                    if !installed.is_some_and(|files| files.contains_key(file)) {
                        return order(&format!("the file {file:?} installed"));
                    }
                }
                if cmdline.chars().any(char::is_control) {
                    return Err(ScriptError::Cmdline);
                }
            }
        }
    }
    let kexecs = script.steps.iter().filter(|s| matches!(s, Step::Kexec { .. })).count();
    match script.steps.last() {
        Some(Step::Kexec { .. }) if kexecs == 1 => Ok(()),
        _ => Err(ScriptError::End),
    }
}

fn check_file(name: &str, file: &ImageFile) -> Result<(), ScriptError> {
    // Names with a dot in front are boot-cd's own (unfinished downloads); ext4's are at most 255 bytes, and those get 6 more.
    let plain = !name.is_empty()
        && name.len() <= 200
        && !name.starts_with('.')
        && name != "lost+found"
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+".contains(&b));
    if !plain {
        return Err(ScriptError::Name(name.into()));
    }
    let hash = file.sha256.len() == 64
        && file.sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if hash { Ok(()) } else { Err(ScriptError::Hash { file: name.into() }) }
}

/// Runs a script to its end: the next kernel is loaded and nothing is mounted any more.
pub async fn run(
    script: &Verified<Script>,
    node_config: &[u8],
    client: &Client,
    devices: &mut Devices,
    phase: Phase<'_>,
) -> Result<()> {
    let script = script.get();
    check(script)?;
    // A try before this one may have failed with the partition mounted.
    mounts::unmount(IMAGE)?;
    let mut image = None;
    let mut installed = &BTreeMap::new();
    for step in &script.steps {
        match step {
            Step::Partition { min_mib, image_mib } => {
                phase("partition");
                image = Some(disk::partition(*min_mib, *image_mib, devices)?);
            }
            Step::Install { files } => {
                phase("install");
                disk::mount_image(needed(&image)?, IMAGE)?;
                let done = install::install(IMAGE.as_ref(), files, client).await;
                let unmounted = mounts::unmount(IMAGE);
                done?;
                unmounted?;
                installed = files;
            }
            Step::Kexec { kernel, initramfs, cmdline } => {
                phase("kexec");
                disk::mount_image(needed(&image)?, IMAGE)?;
                let kernel = named(installed, kernel)?;
                let done =
                    kexec::load(IMAGE.as_ref(), kernel, named(installed, initramfs)?, cmdline, node_config);
                let unmounted = mounts::unmount(IMAGE);
                done?;
                unmounted?;
                say!(ME, "starting {} of release {}", kernel.0, script.release);
            }
        }
    }
    Ok(())
}

/// The image partition, which [`check`] made sure an earlier step found.
fn needed(image: &Option<PathBuf>) -> Result<&Path, ScriptError> {
    image.as_deref().ok_or(ScriptError::Order { step: 1, needs: "a partition step".into() })
}

/// An installed file by its name, which [`check`] made sure is among them.
fn named<'a>(
    installed: &'a BTreeMap<String, ImageFile>,
    name: &'a str,
) -> Result<(&'a str, &'a ImageFile), ScriptError> {
    let missing = || ScriptError::Order { step: 1, needs: format!("the file {name:?} installed") };
    Ok((name, installed.get(name).ok_or_else(missing)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file() -> ImageFile {
        ImageFile { sha256: "a".repeat(64), size: 1 }
    }

    fn partition() -> Step {
        Step::Partition { min_mib: 2_000, image_mib: 1_000 }
    }

    fn install(names: &[&str]) -> Step {
        Step::Install { files: names.iter().map(|n| ((*n).to_owned(), file())).collect() }
    }

    fn kexec() -> Step {
        Step::Kexec {
            kernel: "vmlinuz".into(),
            initramfs: "initramfs".into(),
            cmdline: "console=ttyS0".into(),
        }
    }

    fn checked(steps: Vec<Step>) -> Result<(), ScriptError> {
        check(&Script { release: "test".into(), steps })
    }

    #[test]
    fn accepts_a_release() {
        assert_eq!(
            checked(vec![partition(), install(&["vmlinuz", "initramfs", "base-debian.erofs"]), kexec()]),
            Ok(())
        );
    }

    #[test]
    fn refuses_senseless_order() {
        let both = || install(&["vmlinuz", "initramfs"]);
        assert_eq!(checked(vec![]), Err(ScriptError::End));
        assert_eq!(checked(vec![partition(), both()]), Err(ScriptError::End));
        assert_eq!(checked(vec![partition(), both(), kexec(), kexec()]), Err(ScriptError::End));
        assert_eq!(checked(vec![partition(), both(), kexec(), both()]), Err(ScriptError::End));
        assert!(matches!(checked(vec![both(), kexec()]), Err(ScriptError::Order { step: 1, .. })));
        assert!(matches!(checked(vec![partition(), kexec()]), Err(ScriptError::Order { step: 2, .. })));
        let without = vec![partition(), both(), install(&["vmlinuz"]), kexec()];
        assert!(matches!(checked(without), Err(ScriptError::Order { step: 4, .. })));
        let all = Step::Partition { min_mib: 10, image_mib: 10 };
        assert_eq!(checked(vec![all, both(), kexec()]), Err(ScriptError::Size));
    }

    #[test]
    fn refuses_a_second_line_for_the_kernel() {
        let kexec =
            Step::Kexec { kernel: "a".into(), initramfs: "a".into(), cmdline: "quiet\0init=/bin/sh".into() };
        assert_eq!(checked(vec![partition(), install(&["a"]), kexec]), Err(ScriptError::Cmdline));
    }

    #[test]
    fn refuses_names_that_lead_elsewhere() {
        for name in [
            "",
            ".",
            "..",
            "../etc",
            "a/b",
            "/a",
            ".a.part",
            "lost+found",
            "a\0b",
            "a\nb",
            "ä",
            &"a".repeat(201),
        ] {
            assert_eq!(check_file(name, &file()), Err(ScriptError::Name(name.into())));
        }
        for sha256 in ["", "a", &"A".repeat(64), &"g".repeat(64), &"a".repeat(65)] {
            assert!(check_file("a", &ImageFile { sha256: sha256.into(), size: 1 }).is_err());
        }
    }

    proptest! {
        #[test]
        fn accepted_names_stay_in_their_directory(name in ".{0,20}") {
            if check_file(&name, &file()).is_ok() {
                let path = std::path::Path::new(IMAGE).join(&name);
                prop_assert_eq!(path.parent(), Some(IMAGE.as_ref()));
                prop_assert_eq!(path.file_name().and_then(|n| n.to_str()), Some(name.as_str()));
            }
        }
    }
}
