//! Checks of what a sliver is configured with, so that a mistake is told at once and not by a sliver that fails to start.

use commonage_nodemgr_api::error::{ApiError, Code};
use commonage_nodemgr_api::http::{File, SliverConfig};

/// Most SSH keys of a sliver.
const MAX_KEYS: usize = 1024;
/// Longest SSH key, bytes.
const MAX_KEY: usize = 16 * 1024;
/// Most files of a sliver.
const MAX_FILES: usize = 1024;
/// Longest path, bytes (`PATH_MAX`).
const MAX_PATH: usize = 4095;

/// Checks every field; `bases` are those the node has.
///
/// # Errors
/// The first field that is wrong.
pub fn check(config: &SliverConfig, bases: &[String]) -> Result<(), ApiError> {
    if !bases.contains(&config.base) {
        let shown: String = config.base.chars().take(40).collect();
        return Err(invalid(format!("this node has no base {shown:?}; it has: {}", bases.join(", "))));
    }
    if config.ssh_keys.len() > MAX_KEYS {
        return Err(invalid(format!(
            "config.ssh_keys has {} keys; at most {MAX_KEYS}",
            config.ssh_keys.len()
        )));
    }
    for (i, key) in config.ssh_keys.iter().enumerate() {
        if key.len() > MAX_KEY || key.contains(['\n', '\r', '\0']) {
            return Err(invalid(format!("config.ssh_keys[{i}] is not one line of at most {MAX_KEY} bytes")));
        }
    }
    if config.boot_script.contains('\0') {
        return Err(invalid("config.boot_script has a zero byte".to_owned()));
    }
    if config.files.len() > MAX_FILES {
        return Err(invalid(format!("config.files has {} files; at most {MAX_FILES}", config.files.len())));
    }
    config.files.iter().enumerate().try_for_each(|(i, file)| check_file(i, file))
}

fn check_file(i: usize, File { path, mode, .. }: &File) -> Result<(), ApiError> {
    let named = path.strip_prefix('/').is_some_and(|rest| !rest.is_empty() && !rest.ends_with('/'));
    if !named || path.len() > MAX_PATH || path.contains('\0') || path.split('/').any(|part| part == "..") {
        return Err(invalid(format!("config.files[{i}].path is no absolute path of a file without \"..\"")));
    }
    if *mode > 0o7777 {
        return Err(invalid(format!(
            "config.files[{i}].mode is {mode:#o}; at most 0o7777 (decimal {})",
            0o7777
        )));
    }
    Ok(())
}

fn invalid(message: String) -> ApiError {
    ApiError::new(Code::Invalid, message).hint("correct that field and send the request again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use commonage_nodemgr_api::Bytes;

    #[test]
    fn each_mistake_names_its_field() {
        let bases = ["mini".to_owned()];
        let good = SliverConfig { base: "mini".into(), ..SliverConfig::default() };
        check(&good, &bases).unwrap();
        let file = |path: &str, mode| SliverConfig {
            files: vec![File { path: path.into(), mode, contents: Bytes(vec![]) }],
            ..good.clone()
        };
        check(&file("/etc/x", 0o600), &bases).unwrap();
        for (config, wanted) in [
            (SliverConfig { base: "../etc".into(), ..good.clone() }, "no base"),
            (SliverConfig { ssh_keys: vec!["a\nb".into()], ..good.clone() }, "ssh_keys[0]"),
            (SliverConfig { boot_script: "\0".into(), ..good.clone() }, "boot_script"),
            (file("etc/x", 0o600), "files[0].path"),
            (file("/etc/../x", 0o600), "files[0].path"),
            (file("/etc/", 0o600), "files[0].path"),
            (file("/x", 0o10000), "files[0].mode"),
        ] {
            let error = check(&config, &bases).unwrap_err();
            assert!(error.code == Code::Invalid && error.message.contains(wanted), "{error}");
        }
    }
}
