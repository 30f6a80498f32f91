//! `POST /v1/slivers/{slice}/exec`: one command, run to its end, its output kept up to a bound.

use std::time::Duration;

use commonage_isolation_api::SliceName;
use commonage_nodemgr_api::Bytes;
use commonage_nodemgr_api::error::{ApiError, Code};
use commonage_nodemgr_api::exec::{Command, Frame, MAX_PAYLOAD, Start};
use commonage_nodemgr_api::http::{Exec, ExecResult, SliverState};

use crate::exec::{ExecClient, ExecError, ExecReader, ExecWriter};
use crate::manager::Manager;

/// Most output kept of each stream, bytes.
const MAX_OUTPUT: usize = 256 * 1024;
const DEFAULT_TIMEOUT_S: u32 = 60;
const MAX_TIMEOUT_S: u32 = 300;

/// Runs a command in a sliver that `caller` bound.
pub async fn run(
    manager: &Manager,
    caller: &SliceName,
    slice: &SliceName,
    ask: Exec,
) -> Result<ExecResult, ApiError> {
    let Exec { argv, stdin, timeout_s } = ask;
    manager.book().bound_by(caller, slice)?;
    let timeout_s = timeout_s.unwrap_or(DEFAULT_TIMEOUT_S);
    if !(1..=MAX_TIMEOUT_S).contains(&timeout_s) {
        return Err(ApiError::new(
            Code::Invalid,
            format!("timeout_s is {timeout_s}; it must be 1 to {MAX_TIMEOUT_S}"),
        )
        .hint("run longer commands in the background"));
    }
    let start = Start { command: Command::Argv(argv), ..Start::default() };
    check(&start)?;
    if manager.status(slice) == SliverState::Pending {
        return Err(ApiError::new(Code::Conflict, format!("the sliver of {slice} has not begun"))
            .hint("wait for its interval to begin: GET /v1/slivers says how far it is"));
    }
    let vsock = manager.paths(slice).vsock();
    let whole = async {
        let (writer, reader) = ExecClient::start(&vsock, start).await.map_err(failed)?;
        // The command may end without reading its input: that is no error, and what was not sent does not matter.
        let (_, result) = tokio::join!(feed(writer, &stdin.0), collect(reader));
        result
    };
    tokio::time::timeout(Duration::from_secs(timeout_s.into()), whole).await.unwrap_or_else(|_| {
        Err(ApiError::new(
            Code::Unavailable,
            format!("the command did not end within {timeout_s} s and was hung up"),
        )
        .hint("give it a longer timeout_s, or run it in the background"))
    })
}

fn check(start: &Start) -> Result<(), ApiError> {
    let Command::Argv(argv) = &start.command else { return Ok(()) };
    let invalid = |message: &str| {
        Err(ApiError::new(Code::Invalid, message).hint("argv is the program, then its arguments"))
    };
    if argv.first().is_none_or(String::is_empty) {
        return invalid("argv names no program");
    }
    if argv.iter().any(|a| a.contains('\0')) {
        return invalid("argv has a zero byte");
    }
    if Frame::Start(start.clone()).encode().is_err() {
        return invalid("argv is longer than 64 KiB; send data as stdin");
    }
    Ok(())
}

async fn feed(mut writer: ExecWriter, stdin: &[u8]) -> (ExecWriter, Result<(), ExecError>) {
    for chunk in stdin.chunks(MAX_PAYLOAD) {
        if let Err(e) = writer.send(Frame::Stdin(chunk.to_vec())).await {
            return (writer, Err(e));
        }
    }
    let sent = writer.send(Frame::StdinEof).await;
    // Handed back rather than dropped: closing this half early could be taken for a hang-up.
    (writer, sent)
}

async fn collect(mut reader: ExecReader) -> Result<ExecResult, ApiError> {
    let mut result =
        ExecResult { exit: 0, stdout: Bytes::default(), stderr: Bytes::default(), truncated: false };
    while let Some(frame) = reader.next().await.map_err(failed)? {
        match frame {
            Frame::Stdout(bytes) => result.truncated |= keep(&mut result.stdout.0, &bytes),
            Frame::Stderr(bytes) => result.truncated |= keep(&mut result.stderr.0, &bytes),
            Frame::Exit(exit) => return Ok(ExecResult { exit, ..result }),
            Frame::Error(message) => {
                let message: String = message.chars().take(400).collect();
                return Err(ApiError::new(
                    Code::Invalid,
                    format!("the command could not be started: {message}"),
                )
                .hint("argv[0] must be a program in the sliver"));
            }
            _ => {}
        }
    }
    Err(ApiError::new(Code::Unavailable, "the sliver ended while the command ran")
        .hint("try again when it runs again"))
}

/// Appends what fits; true if something did not.
fn keep(all: &mut Vec<u8>, more: &[u8]) -> bool {
    let room = MAX_OUTPUT.saturating_sub(all.len()).min(more.len());
    all.extend_from_slice(more.get(..room).unwrap_or_default());
    room < more.len()
}

fn failed(e: ExecError) -> ApiError {
    ApiError::new(Code::Unavailable, e.to_string())
        .hint("GET /v1/slivers says how far the sliver is; try again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_kept_up_to_the_bound() {
        let mut all = vec![0; MAX_OUTPUT - 2];
        assert!(!keep(&mut all, b"ab"));
        assert!(keep(&mut all, b"c"));
        assert_eq!(all.len(), MAX_OUTPUT);
    }

    #[test]
    fn commands_that_cannot_be_are_refused() {
        let argv = |argv: &[&str]| Start {
            command: Command::Argv(argv.iter().map(|a| (*a).to_owned()).collect()),
            ..Start::default()
        };
        for bad in [argv(&[]), argv(&[""]), argv(&["a\0b"]), argv(&["a", &"x".repeat(70_000)])] {
            assert_eq!(check(&bad).unwrap_err().code, Code::Invalid);
        }
        check(&argv(&["true"])).unwrap();
    }
}
