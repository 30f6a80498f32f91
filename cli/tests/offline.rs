//! What the command does without PLC: keys, signing, its own errors. What it does with PLC is tested on whole testbeds.

#![allow(clippy::unwrap_used, reason = "all of it is test code")]

use std::path::Path;
use std::process::{Command, Output};

use commonage_nodemgr_api::Bytes;
use commonage_plc_api::boot::{Script, Step, verify_script};
use commonage_plc_api::rest::PublishScript;

fn commonage(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_commonage"));
    command.current_dir(dir).env("COMMONAGE_PROFILE", dir.join("nowhere")).args(args).output().unwrap()
}

fn succeeds(dir: &Path, args: &[&str]) -> String {
    let output = commonage(dir, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Its exit status and what it said on standard error.
fn fails(dir: &Path, args: &[&str]) -> (i32, String) {
    let output = commonage(dir, args);
    assert!(!output.status.success(), "{args:?} succeeded");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

const SIGN: [&str; 8] = ["release", "sign", "--offline-key", "key.pem", "--name", "r1", "--out", "r1.json"];

#[test]
fn a_release_is_signed_off_line_with_a_key_that_is_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    succeeds(dir, &["offline-key", "create", "--out", "key.pem"]);
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(dir.join("key.pem")).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
    let (status, said) = fails(dir, &["offline-key", "create", "--out", "key.pem"]);
    assert!(status == 1 && said.contains("never overwritten"), "{status} {said}");

    std::fs::write(dir.join("k"), "kernel").unwrap();
    std::fs::write(dir.join("i"), "initramfs").unwrap();
    succeeds(dir, &[&SIGN[..], &["--file", "vmlinuz=k", "--file", "initramfs=i"]].concat());
    let release: PublishScript =
        serde_json::from_slice(&std::fs::read(dir.join("r1.json")).unwrap()).unwrap();
    let public: Bytes = serde_json::from_slice(&std::fs::read(dir.join("key.pem.pub")).unwrap()).unwrap();
    assert_eq!(release.offline_key, public);
    verify_script(&public.0, &release.script.0, &release.signature.0).unwrap();
    let script: Script = serde_json::from_slice(&release.script.0).unwrap();
    let Some(Step::Install { files }) = script.steps.get(1) else { panic!("{script:?}") };
    assert_eq!(files["vmlinuz"].size, 6);
    assert_eq!(files["vmlinuz"].sha256, sha256sum(&dir.join("k")));
}

fn sha256sum(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_release_needs_its_parts() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    succeeds(dir, &["offline-key", "create", "--out", "key.pem"]);
    std::fs::write(dir.join("k"), "kernel").unwrap();
    let (_, said) = fails(dir, &[&SIGN[..], &["--file", "vmlinuz=k"]].concat());
    assert!(said.contains("initramfs=PATH"), "{said}");
    let (status, said) = fails(dir, &[&SIGN[..], &["--file", "../vmlinuz=k"]].concat());
    assert!(status == 2 && said.contains("plain file name"), "{status} {said}");
    let (_, said) =
        fails(dir, &[&SIGN[..], &["--file", "vmlinuz=missing", "--file", "initramfs=k"]].concat());
    assert!(said.contains("cannot read missing"), "{said}");
    std::fs::write(dir.join("key.pem"), "nonsense").unwrap();
    let (_, said) = fails(dir, &[&SIGN[..], &["--file", "vmlinuz=k", "--file", "initramfs=k"]].concat());
    assert!(said.contains("commonage offline-key create"), "{said}");
}

#[test]
fn errors_say_what_to_do_and_come_as_json_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (status, said) = fails(dir.path(), &["slice", "list"]);
    assert!(status == 1 && said.contains("--profile"), "{status} {said}");
    let (_, said) = fails(dir.path(), &["--json", "slice", "list"]);
    let error: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert!(error["error"].as_str().unwrap().contains("commonage principal create"), "{said}");
    let (status, said) = fails(dir.path(), &["slice", "create", "Bad-Name"]);
    assert!(status == 2 && said.contains("is no slice name"), "{status} {said}");
    let (status, _) = fails(dir.path(), &["slice", "set-resources", "a_b", "--share", "1"]);
    assert_eq!(status, 2);
}

#[test]
fn completions_know_every_command() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let script = succeeds(dir.path(), &["completions", shell]);
        assert!(script.contains("instantiate") && script.contains("offline-key"), "{shell}");
    }
}
