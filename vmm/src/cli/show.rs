//! Answers as people read them.

use std::fmt::Write as _;
use std::io::Write as _;

use commonage_vmm_api::{ExitReason, Metrics, Response, RunState};

/// A whole answer, without a newline at its end.
pub fn response(response: &Response) -> String {
    match response {
        Response::Status { pid, uptime_ms, state } => {
            let state = match state {
                RunState::Running => "running",
                RunState::Paused => "paused",
            };
            let (seconds, tenths) = (uptime_ms / 1000, uptime_ms % 1000 / 100);
            let jailed = if *pid == 1 { " (in its own pid namespace)" } else { "" };
            format!("{state}, process {pid}{jailed}, up {seconds}.{tenths} s")
        }
        Response::Metrics(metrics) => metrics_table(metrics),
        Response::Done => "done".into(),
        Response::Stopping => "stopping".into(),
        Response::Exited { reason: why, console } if console.is_empty() => reason(why),
        Response::Exited { reason: why, console } => {
            format!("{}; its console said last:\n{}", reason(why), last_lines(console))
        }
        other => format!("{other:?}"),
    }
}

/// Why a machine ended, as a clause.
pub fn reason(reason: &ExitReason) -> String {
    match reason {
        ExitReason::Reboot => "the guest rebooted".into(),
        ExitReason::Halt => "the guest halted".into(),
        ExitReason::Panic => "the guest's kernel panicked".into(),
        ExitReason::TripleFault => "the guest crashed its processor (triple fault)".into(),
        ExitReason::Stopped => "stopped".into(),
        ExitReason::Failed { message } => message.clone(),
    }
}

/// The last ten lines.
fn last_lines(console: &str) -> String {
    let lines: Vec<&str> = console.lines().collect();
    let lines = lines.get(lines.len().saturating_sub(10)..).unwrap_or_default();
    lines.iter().map(|line| format!("  {}", printable(line))).collect::<Vec<_>>().join("\n")
}

/// Without control characters and sequences (ECMA-48): the guest's words shall not move the reader's cursor.
fn printable(line: &str) -> String {
    let mut rest = line.chars();
    let mut text = String::new();
    while let Some(c) = rest.next() {
        if c == '\u{1b}' {
            if rest.as_str().starts_with('[') {
                // Parameters, then one final character.
                rest.next();
                rest.by_ref().find(|c| ('@'..='~').contains(c));
            }
        } else if c == '\t' || !c.is_control() {
            text.push(c);
        }
    }
    text
}

/// Prints a line. Who reads only the first of many (`head`) is no reason to complain.
pub fn print(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

fn metrics_table(metrics: &Metrics) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<22}{value}");
    };
    row(
        "private memory",
        format!("{} KiB, {} KiB of it the process's own", metrics.private_kib, metrics.vmm_private_kib),
    );
    for (id, vcpu) in metrics.vcpus.iter().enumerate() {
        row(&format!("processor {id}"), format!("{} exits", vcpu.exits));
    }
    let disk = &metrics.disk;
    row(
        "disk",
        format!(
            "{} bytes read, {} written, {} requests, {} held back",
            disk.read_bytes, disk.written_bytes, disk.requests, disk.held_back
        ),
    );
    let ((sent, received), (sent_bytes, received_bytes)) = (metrics.net_frames, metrics.net_bytes);
    row(
        "network",
        format!("{sent} frames sent ({sent_bytes} bytes), {received} received ({received_bytes} bytes)"),
    );
    row("vsock", format!("{} connections", metrics.vsock_connections));
    row("balloon", format!("{} MiB", metrics.balloon_mib));
    if let Some(free) = metrics.guest_free_kib {
        row("free in the guest", format!("{free} KiB"));
    }
    row("reported free", format!("{} KiB taken back", metrics.reported_kib));
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_read_as_sentences() {
        let status = Response::Status { pid: 1, uptime_ms: 61_250, state: RunState::Paused };
        assert_eq!(response(&status), "paused, process 1 (in its own pid namespace), up 61.2 s");
        let console = "one\r\n\u{1b}[2;3Htwo\u{1b}[6n\u{7}\u{1b}\n".to_owned();
        let exited = Response::Exited { reason: ExitReason::Panic, console };
        assert_eq!(response(&exited), "the guest's kernel panicked; its console said last:\n  one\n  two");
        let metrics = Metrics { private_kib: 7, guest_free_kib: Some(9), ..Metrics::default() };
        let table = response(&Response::Metrics(Box::new(metrics)));
        assert!(table.contains("7 KiB") && table.contains("free in the guest     9 KiB"), "{table}");
    }
}
