//! Whether `docs/threat-model.md` says what is: the tests that it names exist, and `unsafe` is where it says.

use std::path::{Path, PathBuf};

use commonage_images::Context;

fn workspace() -> PathBuf {
    Context::from_env().unwrap().workspace
}

/// What stands between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn every_test_that_it_names_exists() {
    let workspace = workspace();
    let text = std::fs::read_to_string(workspace.join("docs/threat-model.md")).unwrap();
    let mut named = 0;
    for (file, test) in quoted(&text).filter_map(|quoted| quoted.split_once("::")) {
        let source = std::fs::read_to_string(workspace.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        let lines: Vec<_> = source.lines().map(str::trim).collect();
        let at = lines.iter().position(|line| line.contains(&format!("fn {test}(")));
        let at = at.unwrap_or_else(|| panic!("{file} has no {test}"));
        let before = lines.get(at.saturating_sub(3)..at).unwrap_or_default();
        assert!(before.iter().any(|line| line.contains("test]")), "{test} in {file} is no test");
        named += 1;
    }
    assert!(named > 20, "only {named} tests are named");
}

/// Adds the files under `directory` that have unsafe code outside of tests.
fn unsafe_files(workspace: &Path, directory: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            unsafe_files(workspace, &path, found);
            continue;
        }
        let name = path.strip_prefix(workspace).unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let has =
            ["unsafe {", "unsafe impl", "unsafe fn", "unsafe extern"].iter().any(|it| code.contains(it));
        if has && !name.ends_with("_test.rs") {
            found.push(name);
        }
    }
}

#[test]
fn unsafe_code_is_where_it_says() {
    let workspace = workspace();
    let text = std::fs::read_to_string(workspace.join("docs/threat-model.md")).unwrap();
    let (_, list) = text.split_once("## Where the monitor is unsafe").unwrap();
    let (list, _) = list.split_once("\n## ").unwrap();
    let mut listed: Vec<_> =
        quoted(list).filter(|name| name.starts_with("vmm/src/")).map(str::to_owned).collect();
    let mut found = Vec::new();
    unsafe_files(&workspace, &workspace.join("vmm/src"), &mut found);
    listed.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, listed);
}
