//! Child processes whose output goes to a log: nobody needs to see it while all is well, and its end is part of the error when it isn't.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, IoContext as _, Result};
use crate::progress;

/// How much of a log an error shows: some 25 lines.
const TAIL: u64 = 2500;

/// A log file that child processes append to.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Starts an empty log.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).doing("create", parent)?;
        }
        // Removed first: an older build may still be writing into the old one.
        let _ = std::fs::remove_file(path);
        let file = File::options().append(true).create(true).open(path).doing("create", path)?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a command to its end, with no input and its output in the log.
    ///
    /// # Errors
    /// When it cannot be started or does not succeed.
    pub fn run(&self, what: &str, command: &mut Command) -> Result<()> {
        command.stdin(Stdio::null()).stdout(self.share()?);
        self.finish(what, command).map(drop)
    }

    /// The same, and returns what it wrote to its standard output.
    ///
    /// # Errors
    /// When it cannot be started or does not succeed.
    pub fn output(&self, what: &str, command: &mut Command) -> Result<String> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        self.finish(what, command).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The same as [`Log::run`], from one file into another.
    ///
    /// # Errors
    /// When a file cannot be opened, or the command cannot be started or does not succeed.
    pub fn filter(&self, what: &str, command: &mut Command, input: &Path, output: &Path) -> Result<()> {
        command.stdin(File::open(input).doing("open", input)?);
        command.stdout(File::create(output).doing("create", output)?);
        self.finish(what, command).map(drop)
    }

    fn finish(&self, what: &str, command: &mut Command) -> Result<Vec<u8>> {
        // A note for who reads the log; the log is worth no failure.
        let _ = writeln!(&self.file, "+ {command:?}");
        let child = command.stderr(self.share()?).spawn().map_err(|source| Error::Spawn {
            what: what.to_owned(),
            program: command.get_program().to_string_lossy().into_owned(),
            source,
        })?;
        let output = child.wait_with_output().doing("wait for", Path::new(command.get_program()))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(Error::Command {
            what: what.to_owned(),
            status: output.status.to_string(),
            log: self.path.clone(),
            tail: progress::tail(&self.path, TAIL).unwrap_or_default(),
        })
    }

    fn share(&self) -> Result<Stdio> {
        Ok(self.file.try_clone().doing("share", &self.path)?.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_shows_the_end_of_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let log = Log::create(&directory.path().join("logs/a.log")).unwrap();
        assert_eq!(log.output("say", Command::new("echo").arg("hello")).unwrap(), "hello\n");
        let error = log
            .run("break it", Command::new("sh").args(["-c", "echo because of this >&2; exit 3"]))
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("break it failed (exit status: 3)") && text.contains("because of this"),
            "{text}"
        );
        assert_eq!(error.exit_code(), 1);
        let error = log.run("nothing", &mut Command::new("/no/such/program")).unwrap_err();
        assert!(error.to_string().contains("/no/such/program"), "{error}");
    }
}
