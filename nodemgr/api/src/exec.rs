//! The framed protocol of one command inside a sliver: one vsock connection to guest port [`crate::guest::EXEC_PORT`], one command.
//!
//! A frame is one byte kind, four bytes big-endian length, then the payload, at most [`MAX_PAYLOAD`] bytes. The host sends [`Frame::Start`]
//! first, then input; the guest sends output and last either [`Frame::Exit`] or [`Frame::Error`]. A host that closes the
//! connection hangs the command up (SIGHUP to its group).

use serde::{Deserialize, Serialize};

/// Largest payload, bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// Bytes before the payload.
pub const HEADER: usize = 5;

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// What to run.
    pub command: Command,
    /// Environment beyond the default one.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// The terminal to run it on; pipes when absent.
    pub pty: Option<Pty>,
}

/// What to run, always as root, in root's home.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Root's login shell, interactive.
    #[default]
    Shell,
    /// A line for root's shell (`sh -c`).
    Line(String),
    /// Program and arguments.
    Argv(Vec<String>),
}

/// A terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pty {
    /// `TERM`.
    pub term: String,
    /// Its size.
    pub size: WindowSize,
}

/// A terminal's size, characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Host: what to run.
    Start(Start),
    /// Host: standard input.
    Stdin(Vec<u8>),
    /// Host: end of standard input.
    StdinEof,
    /// Host: the terminal has a new size.
    Resize(WindowSize),
    /// Host: send this signal (number) to the command.
    Signal(u8),
    /// Guest: standard output, or the terminal's.
    Stdout(Vec<u8>),
    /// Guest: standard error.
    Stderr(Vec<u8>),
    /// Guest: the command ended with this status; 128 + n when signal n ended it.
    Exit(i32),
    /// Guest: the command could not be started.
    Error(String),
}

/// Why bytes are no frame. The connection must be closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length is over [`MAX_PAYLOAD`].
    #[error("a frame of {0} bytes is longer than 65536")]
    TooLong(usize),
    /// No such kind.
    #[error("there is no frame of kind {0}")]
    Kind(u8),
    /// The payload is not what the kind says.
    #[error("the payload of a frame of kind {0} is malformed")]
    Payload(u8),
}

impl Frame {
    /// Payload length and kind from a header.
    ///
    /// # Errors
    /// The length is over [`MAX_PAYLOAD`].
    pub fn parse_header(header: [u8; HEADER]) -> Result<(u8, usize), FrameError> {
        let [kind, a, b, c, d] = header;
        let len = u32::from_be_bytes([a, b, c, d]) as usize;
        if len > MAX_PAYLOAD { Err(FrameError::TooLong(len)) } else { Ok((kind, len)) }
    }

    /// A frame from its kind and payload.
    ///
    /// # Errors
    /// The kind is unknown or the payload malformed.
    pub fn parse(kind: u8, payload: Vec<u8>) -> Result<Self, FrameError> {
        let bad = || FrameError::Payload(kind);
        Ok(match kind {
            0 => Self::Start(serde_json::from_slice(&payload).map_err(|_| bad())?),
            1 => Self::Stdin(payload),
            2 if payload.is_empty() => Self::StdinEof,
            3 => match payload[..] {
                [a, b, c, d] => Self::Resize(WindowSize {
                    cols: u16::from_be_bytes([a, b]),
                    rows: u16::from_be_bytes([c, d]),
                }),
                _ => return Err(bad()),
            },
            4 => match payload[..] {
                [n] => Self::Signal(n),
                _ => return Err(bad()),
            },
            5 => Self::Stdout(payload),
            6 => Self::Stderr(payload),
            7 => Self::Exit(i32::from_be_bytes(payload.try_into().map_err(|_| bad())?)),
            8 => Self::Error(String::from_utf8(payload).map_err(|_| bad())?),
            2 => return Err(bad()),
            _ => return Err(FrameError::Kind(kind)),
        })
    }

    /// The frame as bytes.
    ///
    /// # Errors
    /// The payload is over [`MAX_PAYLOAD`].
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        let (kind, payload) = match self {
            Self::Start(start) => (0, serde_json::to_vec(start).map_err(|_| FrameError::Payload(0))?),
            Self::Stdin(bytes) => (1, bytes.clone()),
            Self::StdinEof => (2, Vec::new()),
            Self::Resize(size) => (3, [size.cols.to_be_bytes(), size.rows.to_be_bytes()].concat()),
            Self::Signal(n) => (4, vec![*n]),
            Self::Stdout(bytes) => (5, bytes.clone()),
            Self::Stderr(bytes) => (6, bytes.clone()),
            Self::Exit(status) => (7, status.to_be_bytes().to_vec()),
            Self::Error(message) => (8, message.clone().into_bytes()),
        };
        if payload.len() > MAX_PAYLOAD {
            return Err(FrameError::TooLong(payload.len()));
        }
        let mut out = Vec::with_capacity(HEADER + payload.len());
        out.push(kind);
        out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        out.extend_from_slice(&payload);
        Ok(out)
    }
}

/// Cuts a stream of bytes into frames, however it arrives. Holds at most one frame and what was pushed last.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if it has arrived.
    ///
    /// # Errors
    /// The peer does not speak the protocol; nothing that follows makes sense.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some((header, rest)) = self.buffer.split_first_chunk::<HEADER>() else { return Ok(None) };
        let (kind, len) = Frame::parse_header(*header)?;
        let Some(payload) = rest.get(..len) else { return Ok(None) };
        let frame = Frame::parse(kind, payload.to_vec())?;
        self.buffer.drain(..HEADER + len);
        Ok(Some(frame))
    }

    /// Whether bytes of an incomplete frame wait.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn size() -> impl Strategy<Value = WindowSize> {
        (any::<u16>(), any::<u16>()).prop_map(|(cols, rows)| WindowSize { cols, rows })
    }

    fn start() -> impl Strategy<Value = Start> {
        let command = prop_oneof![
            Just(Command::Shell),
            any::<String>().prop_map(Command::Line),
            prop::collection::vec(any::<String>(), 0..4).prop_map(Command::Argv),
        ];
        let pty = prop::option::of((any::<String>(), size()).prop_map(|(term, size)| Pty { term, size }));
        let env = prop::collection::vec(any::<(String, String)>(), 0..4);
        (command, env, pty).prop_map(|(command, env, pty)| Start { command, env, pty })
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..2000);
        prop_oneof![
            start().prop_map(Frame::Start),
            bytes().prop_map(Frame::Stdin),
            Just(Frame::StdinEof),
            size().prop_map(Frame::Resize),
            any::<u8>().prop_map(Frame::Signal),
            bytes().prop_map(Frame::Stdout),
            bytes().prop_map(Frame::Stderr),
            any::<i32>().prop_map(Frame::Exit),
            any::<String>().prop_map(Frame::Error),
        ]
    }

    /// Whatever the bytes, decoding ends: with frames, with an error, or waiting for more.
    fn drain(decoder: &mut Decoder) -> Result<Vec<Frame>, FrameError> {
        std::iter::from_fn(|| decoder.next_frame().transpose()).collect()
    }

    proptest! {
        #[test]
        fn frames_survive_the_wire_however_it_cuts_them(frames in prop::collection::vec(frame(), 0..8), cut in 1usize..700) {
            let bytes: Vec<u8> = frames.iter().flat_map(|f| f.encode().unwrap()).collect();
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(cut) {
                decoder.push(piece);
                seen.extend(drain(&mut decoder).unwrap());
            }
            prop_assert_eq!(seen, frames);
            prop_assert!(decoder.is_empty());
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            drop(drain(&mut decoder));
        }

        #[test]
        fn hostile_payloads_never_panic(kind in 0u8..12, payload in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(frame) = Frame::parse(kind, payload) {
                prop_assert!(frame.encode().is_ok());
            }
        }

        #[test]
        fn a_length_over_the_limit_is_refused_before_its_bytes_come(kind in any::<u8>(), len in MAX_PAYLOAD as u32 + 1..) {
            let mut decoder = Decoder::default();
            decoder.push(&[&[kind][..], &len.to_be_bytes()].concat());
            prop_assert_eq!(decoder.next_frame(), Err(FrameError::TooLong(len as usize)));
        }
    }

    #[test]
    fn what_cannot_be_sent_is_refused() {
        assert_eq!(
            Frame::Stdin(vec![0; MAX_PAYLOAD + 1]).encode(),
            Err(FrameError::TooLong(MAX_PAYLOAD + 1))
        );
        assert!(Frame::Stdin(vec![0; MAX_PAYLOAD]).encode().is_ok());
    }
}
