//! Output for people, or with `--json` for programs.

use std::io::Write as _;

use anyhow::Result;
use serde::Serialize;

/// Where answers go.
#[derive(Debug)]
pub struct Output {
    json: bool,
}

impl Output {
    /// For programs when `json`, else for people.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// One value: JSON either way, indented for people.
    pub fn value(&self, value: &impl Serialize) -> Result<()> {
        let text =
            if self.json { serde_json::to_string(value)? } else { serde_json::to_string_pretty(value)? };
        print(&text)
    }

    /// One value for programs, lines for people.
    pub fn told(&self, value: &impl Serialize, lines: &[String]) -> Result<()> {
        if self.json { self.value(value) } else { print(&lines.join("\n")) }
    }

    /// The values for programs, a table of `rows` under `head` for people.
    pub fn table<T: Serialize>(
        &self,
        values: &[T],
        head: &[&str],
        row: impl Fn(&T) -> Vec<String>,
    ) -> Result<()> {
        if self.json {
            return print(&serde_json::to_string(values)?);
        }
        let mut rows = vec![head.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>()];
        rows.extend(values.iter().map(row));
        let width = |column: usize| {
            rows.iter().filter_map(|r| r.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..head.len()).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells: Vec<String> =
                row.iter().zip(&widths).map(|(c, w)| format!("{c:w$}", w = *w)).collect();
            cells.join("  ").trim_end().to_owned()
        };
        print(&rows.iter().map(line).collect::<Vec<_>>().join("\n"))
    }

    /// News about long work, for people only.
    pub fn progress(&self, line: &str) {
        if !self.json {
            eprintln!("{line}");
        }
    }

    /// What went wrong, on standard error.
    pub fn error(&self, error: &anyhow::Error) {
        if self.json {
            eprintln!("{}", serde_json::json!({"error": format!("{error:#}")}));
        } else {
            eprintln!("commonage: {error:#}");
        }
    }
}

/// A closed standard output (`commonage … | head`) is an error like any other, not a panic.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}
