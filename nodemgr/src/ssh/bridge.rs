//! One session: an SSH channel carried to a command in the sliver, both ways at once.

use std::sync::Arc;

use commonage_nodemgr_api::exec::{Frame, MAX_PAYLOAD, Start, WindowSize};
use russh::ChannelWriteHalf;
use russh::server::Msg;
use tokio::sync::mpsc::UnboundedReceiver;

use super::gate::{Gate, Held};
use crate::directory::Login;
use crate::exec::{ExecClient, ExecError, ExecReader, ExecWriter};

/// `SSH_EXTENDED_DATA_STDERR`, RFC 4254 §5.2.
pub(super) const STDERR: u32 = 1;
/// What `ssh` itself returns when it fails, not the command.
const FAILED: u32 = 255;
/// What shells return when a command cannot be run.
const CANNOT_RUN: u32 = 126;

/// The writing half of a session's channel.
pub(super) type Output = ChannelWriteHalf<Msg>;

/// What the peer sends to a command.
#[derive(Debug)]
pub(super) enum Input {
    Data(Vec<u8>),
    Eof,
    Resize(WindowSize),
    Signal(u8),
}

impl Input {
    /// What it counts for at the gate, bytes.
    pub(super) fn weight(&self) -> usize {
        const OVERHEAD: usize = 64;
        match self {
            Self::Data(bytes) => bytes.len().saturating_add(OVERHEAD),
            _ => OVERHEAD,
        }
    }
}

/// Runs the command and ends the channel. The command is hung up when `input` is closed (the peer closed the channel, or
/// is gone), or when this future is dropped.
pub(super) async fn carry(
    login: Login,
    start: Start,
    mut input: UnboundedReceiver<(Input, Held)>,
    output: Arc<Output>,
    gate: Gate,
) {
    let status = match ExecClient::start(&login.vsock, start).await {
        Ok((writer, reader)) => {
            tokio::select! {
                () = carry_input(&mut input, writer) => return,
                status = carry_output(reader, &output, &gate) => status,
            }
        }
        Err(e) => {
            let about = match e {
                ExecError::Frame(_) => "the command or its environment is too long".to_owned(),
                e => e.to_string(),
            };
            complain(&output, &about, &gate).await;
            FAILED
        }
    };
    // Input that still comes goes nowhere.
    drop(input);
    let _ = output.exit_status(status).await;
    let _ = output.eof().await;
    let _ = output.close().await;
}

/// Returns when the peer has closed the channel.
async fn carry_input(input: &mut UnboundedReceiver<(Input, Held)>, mut writer: ExecWriter) {
    let mut taken = true;
    while let Some((next, _held)) = input.recv().await {
        // A command that has ended takes nothing; its output says how.
        taken = taken && send(&mut writer, next).await.is_ok();
    }
}

async fn send(writer: &mut ExecWriter, input: Input) -> Result<(), ExecError> {
    match input {
        Input::Data(bytes) => {
            for chunk in bytes.chunks(MAX_PAYLOAD) {
                writer.send(Frame::Stdin(chunk.to_vec())).await?;
            }
            Ok(())
        }
        Input::Eof => writer.send(Frame::StdinEof).await,
        Input::Resize(size) => writer.send(Frame::Resize(size)).await,
        Input::Signal(number) => writer.send(Frame::Signal(number)).await,
    }
}

/// Returns the command's exit status.
async fn carry_output(mut reader: ExecReader, output: &Output, gate: &Gate) -> u32 {
    loop {
        let sent = match reader.next().await {
            Ok(Some(Frame::Stdout(bytes))) => {
                let _blocked = gate.block_output();
                output.data_bytes(bytes).await
            }
            Ok(Some(Frame::Stderr(bytes))) => {
                let _blocked = gate.block_output();
                output.extended_data_bytes(STDERR, bytes).await
            }
            Ok(Some(Frame::Exit(status))) => return status.try_into().unwrap_or(FAILED),
            Ok(Some(Frame::Error(message))) => {
                complain(output, &message, gate).await;
                return CANNOT_RUN;
            }
            Ok(Some(_)) => {
                complain(output, "the sliver's init broke the exec protocol", gate).await;
                return FAILED;
            }
            Ok(None) => {
                complain(output, "the sliver's machine ended", gate).await;
                return FAILED;
            }
            Err(e) => {
                complain(output, &e.to_string(), gate).await;
                return FAILED;
            }
        };
        if sent.is_err() {
            return FAILED;
        }
    }
}

/// Tells the peer what went wrong, on its standard error. Lines end as terminals want them.
pub(super) async fn complain(output: &Output, message: &str, gate: &Gate) {
    let _blocked = gate.block_output();
    // The text may come from a hostile guest: it must not steer the reader's terminal.
    let message: String = message.chars().filter(|c| !c.is_control()).collect();
    let _ = output.extended_data_bytes(STDERR, format!("commonage: {message}\r\n").into_bytes()).await;
}
