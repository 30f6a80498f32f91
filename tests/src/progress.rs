//! Named steps, each with its seconds, told to a person while they go on.

use std::time::Instant;

use anyhow::{Context as _, Result};

/// The steps so far.
#[derive(Debug, Default)]
pub struct Steps {
    done: Vec<(String, f64)>,
    quiet: bool,
}

impl Steps {
    /// Steps that are told on standard error, or not at all.
    pub fn new(quiet: bool) -> Self {
        Self { done: Vec::new(), quiet }
    }

    /// Does one step.
    ///
    /// # Errors
    /// The step's own, with its name.
    pub fn run<T>(&mut self, name: &str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        self.say(&format!("→ {name}"));
        let start = Instant::now();
        let value = step().with_context(|| format!("step {name:?} failed"))?;
        let seconds = start.elapsed().as_secs_f64();
        self.say(&format!("✓ {name} ({seconds:.1} s)"));
        self.done.push((name.to_owned(), seconds));
        Ok(value)
    }

    /// Tells something.
    pub fn say(&self, line: &str) {
        if !self.quiet {
            eprintln!("{line}");
        }
    }

    /// Each step's name and seconds, in order.
    pub fn done(&self) -> &[(String, f64)] {
        &self.done
    }
}
