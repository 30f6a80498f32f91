//! What one peer asks for, request by request. Nothing here waits for a sliver: see [`super::gate`] for why.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use commonage_nodemgr_api::exec::{Command, Pty, Start, WindowSize};
use russh::keys::PublicKey;
use russh::server::{
    Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Response, Session, VerifiedPublicKey,
};
use russh::{Channel, ChannelId, ChannelOpenFailure, MethodKind, MethodSet, Sig};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use super::bridge::{self, Input, Output, STDERR};
use super::gate::{Gate, Held};
use super::turnstile::{Entry, Turnstile};
use super::{Limits, keys};
use crate::directory::{Directory, Login};

/// Most environment variables a session may set, and their most bytes in all: with the command they must fit a frame.
const MAX_ENV: (usize, usize) = (64, 16 * 1024);
/// Exit status of a session that is refused.
const REFUSED: u32 = 255;
/// Longest name of a terminal type, bytes.
const MAX_TERM: usize = 64;

/// Somebody who has connected.
pub(super) struct Visitor {
    peer: SocketAddr,
    directory: Arc<dyn Directory>,
    slices: Turnstile<String>,
    limits: Limits,
    gate: Gate,
    logged_in: Arc<Notify>,
    /// This connection's place among those of its slice.
    entry: Option<Entry<String>>,
    /// Whose slice, with which key, once that is proved.
    who: Option<(String, PublicKey)>,
    sessions: HashMap<ChannelId, Stage>,
    /// Ends every session of this connection when it is dropped.
    running: JoinSet<()>,
}

/// How far a session is.
enum Stage {
    /// Open; what the command gets is being told.
    Fresh { output: Arc<Output>, env: Vec<(String, String)>, pty: Option<Pty> },
    /// Its command was started.
    Running(UnboundedSender<(Input, Held)>),
}

impl Visitor {
    pub(super) fn new(
        peer: SocketAddr,
        directory: Arc<dyn Directory>,
        slices: Turnstile<String>,
        limits: Limits,
        gate: Gate,
        logged_in: Arc<Notify>,
    ) -> Self {
        let (entry, who, sessions, running) = (None, None, HashMap::new(), JoinSet::new());
        Self { peer, directory, slices, limits, gate, logged_in, entry, who, sessions, running }
    }

    /// The sliver of `slice`, if there is one and `key` is one of its keys.
    fn admit(&self, slice: &str, key: &PublicKey) -> Option<Login> {
        self.directory.login(slice).filter(|login| keys::contains(&login.ssh_keys, key))
    }

    fn input(&mut self, channel: ChannelId, input: Input) {
        if let Some(Stage::Running(sender)) = self.sessions.get(&channel) {
            let held = self.gate.hold(input.weight());
            // A command that has ended takes nothing.
            let _ = sender.send((input, held));
        }
    }

    /// Starts the one command a session may run.
    fn start(
        &mut self,
        channel: ChannelId,
        command: Command,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        let Some(Stage::Fresh { output, env, pty }) = self.sessions.get_mut(&channel) else {
            return session.channel_failure(channel);
        };
        let start = Start { command, env: std::mem::take(env), pty: pty.take() };
        let output = output.clone();
        // Keys that were taken away since the login count from now on; nothing that runs is ended for it.
        let Some((slice, login)) =
            self.who.as_ref().and_then(|(slice, key)| Some((slice, self.admit(slice, key)?)))
        else {
            return self.refuse(channel, "this key is no longer one of the slice's", session);
        };
        tracing::info!(peer = %self.peer, slice, pty = start.pty.is_some(), "SSH session");
        let (sender, receiver) = unbounded_channel();
        self.sessions.insert(channel, Stage::Running(sender));
        // Those that have ended are let go of here: nobody waits for them.
        while self.running.try_join_next().is_some() {}
        self.running.spawn(bridge::carry(login, start, receiver, output, self.gate.clone()));
        session.channel_success(channel)
    }

    /// Ends a session that was not to be, as a command does that explains itself and fails. A request that simply fails would tell nothing:
    /// OpenSSH's client leaves without showing what was said before.
    fn refuse(&mut self, channel: ChannelId, why: &str, session: &mut Session) -> Result<(), russh::Error> {
        if self.sessions.remove(&channel).is_none() {
            return session.channel_failure(channel);
        }
        session.channel_success(channel)?;
        session.extended_data(channel, STDERR, format!("commonage: {why}\r\n"))?;
        session.exit_status_request(channel, REFUSED)?;
        session.eof(channel)?;
        session.close(channel)
    }
}

/// What a client without a good key is told. It is the same whether the slice is here or not.
fn advice(user: &str) -> String {
    let user: String = user.chars().filter(|c| c.is_ascii_graphic()).take(40).collect();
    format!(
        "This key is not one of slice {user}'s, or {user} has no sliver on this node.\n\
         Log in as SLICE@node with a key of a user of the slice: `commonage ssh-key add FILE` adds one,\n\
         `commonage slice show SLICE` tells who its users are."
    )
}

fn rejected() -> Auth {
    Auth::Reject { proceed_with_methods: None, partial_success: false }
}

/// Rejected, and asking again is of no use.
fn rejected_for_good() -> Auth {
    Auth::Reject {
        proceed_with_methods: Some(MethodSet::from(&[MethodKind::PublicKey][..])),
        partial_success: false,
    }
}

fn window_size(cols: u32, rows: u32) -> WindowSize {
    let small = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    WindowSize { cols: small(cols), rows: small(rows) }
}

/// Signal numbers of x86 Linux, RFC 4254 §6.10 names.
fn signal_number(signal: &Sig) -> Option<u8> {
    Some(match signal {
        Sig::HUP => 1,
        Sig::INT => 2,
        Sig::QUIT => 3,
        Sig::ILL => 4,
        Sig::ABRT => 6,
        Sig::FPE => 8,
        Sig::KILL => 9,
        Sig::USR1 => 10,
        Sig::SEGV => 11,
        Sig::PIPE => 13,
        Sig::ALRM => 14,
        Sig::TERM => 15,
        Sig::Custom(name) if name == "USR2" => 12,
        Sig::Custom(_) => return None,
    })
}

impl Handler for Visitor {
    type Error = russh::Error;

    async fn auth_publickey_offered(
        &mut self,
        user: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, Self::Error> {
        Ok(if self.admit(user, offer.public_key).is_some() { Auth::Accept } else { rejected() })
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        if self.admit(user, key.public_key).is_none() {
            return Ok(rejected());
        }
        // The place held so far, if this is asked twice, is free for this very connection.
        self.entry = None;
        self.entry = self.slices.enter(user.to_owned(), self.limits.of_one_slice);
        if self.entry.is_none() {
            tracing::debug!(peer = %self.peer, slice = user, "rejected: the slice has too many connections");
            return Ok(rejected_for_good());
        }
        self.who = Some((user.to_owned(), key.public_key.clone()));
        Ok(Auth::Accept)
    }

    /// A client comes here after all its keys were rejected. It is shown a text and asked nothing, and rejected.
    async fn auth_keyboard_interactive<'a>(
        &'a mut self,
        user: &str,
        _submethods: &str,
        response: Option<Response<'a>>,
    ) -> Result<Auth, Self::Error> {
        Ok(match response {
            None => Auth::Partial {
                name: "".into(),
                instructions: advice(user).into(),
                prompts: Vec::new().into(),
            },
            Some(_) => rejected_for_good(),
        })
    }

    async fn auth_succeeded(&mut self, _session: &mut Session) -> Result<(), Self::Error> {
        self.logged_in.notify_one();
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        // A channel that was closed from here is not reported closed: its sessions are let go of now.
        self.sessions.retain(|_, stage| !matches!(stage, Stage::Running(sender) if sender.is_closed()));
        if self.sessions.len() >= self.limits.sessions {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        let id = channel.id();
        // Input comes by `data`: the channel's own queue, which would make everything wait, is let go of.
        let (_, output) = channel.split();
        self.sessions.insert(id, Stage::Fresh { output: Arc::new(output), env: Vec::new(), pty: None });
        reply.accept().await;
        Ok(())
    }

    async fn channel_close(&mut self, channel: ChannelId, _session: &mut Session) -> Result<(), Self::Error> {
        self.sessions.remove(&channel);
        Ok(())
    }

    async fn channel_eof(&mut self, channel: ChannelId, _session: &mut Session) -> Result<(), Self::Error> {
        self.input(channel, Input::Eof);
        Ok(())
    }

    async fn data(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        self.input(channel, Input::Data(data.to_vec()));
        Ok(())
    }

    fn adjust_window(&mut self, _channel: ChannelId, _current: u32) -> u32 {
        self.gate.window()
    }

    async fn pty_request(
        &mut self,
        channel: ChannelId,
        term: &str,
        col_width: u32,
        row_height: u32,
        _pix_width: u32,
        _pix_height: u32,
        _modes: &[(russh::Pty, u32)],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        match self.sessions.get_mut(&channel) {
            Some(Stage::Fresh { pty, .. }) if term.len() <= MAX_TERM && !term.contains('\0') => {
                *pty = Some(Pty { term: term.to_owned(), size: window_size(col_width, row_height) });
                session.channel_success(channel)
            }
            _ => session.channel_failure(channel),
        }
    }

    async fn env_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        value: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let Some(Stage::Fresh { env, .. }) = self.sessions.get_mut(&channel) else {
            return session.channel_failure(channel);
        };
        let bytes = |name: &str, value: &str| name.len().saturating_add(value.len());
        let total: usize = env.iter().map(|(n, v)| bytes(n, v)).sum();
        let fits = env.len() < MAX_ENV.0 && total.saturating_add(bytes(name, value)) <= MAX_ENV.1;
        let valid = !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0');
        if !fits || !valid {
            return session.channel_failure(channel);
        }
        env.push((name.to_owned(), value.to_owned()));
        session.channel_success(channel)
    }

    async fn shell_request(&mut self, channel: ChannelId, session: &mut Session) -> Result<(), Self::Error> {
        self.start(channel, Command::Shell, session)
    }

    async fn exec_request(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        match std::str::from_utf8(data) {
            Ok(line) => self.start(channel, Command::Line(line.to_owned()), session),
            Err(_) => session.channel_failure(channel),
        }
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let name: String = name.chars().filter(char::is_ascii_graphic).take(40).collect();
        match self.sessions.get(&channel) {
            Some(Stage::Fresh { .. }) => {
                let why = format!("there is no subsystem {name} here; copy with `tar` or `cat` through ssh");
                self.refuse(channel, &why, session)
            }
            _ => session.channel_failure(channel),
        }
    }

    async fn x11_request(
        &mut self,
        channel: ChannelId,
        _single_connection: bool,
        _auth_protocol: &str,
        _auth_cookie: &str,
        _screen_number: u32,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(channel)
    }

    async fn window_change_request(
        &mut self,
        channel: ChannelId,
        col_width: u32,
        row_height: u32,
        _pix_width: u32,
        _pix_height: u32,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        self.input(channel, Input::Resize(window_size(col_width, row_height)));
        Ok(())
    }

    async fn signal(
        &mut self,
        channel: ChannelId,
        signal: Sig,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        if let Some(number) = signal_number(&signal) {
            self.input(channel, Input::Signal(number));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_the_same_for_all_and_cannot_steer_a_terminal() {
        let text = advice("a_b\x1b[2J");
        assert!(text.contains("a_b[2J's") && !text.contains('\x1b'));
        assert!(advice(&"x".repeat(500)).len() < 300);
    }

    #[test]
    fn sizes_are_bounded() {
        assert_eq!(window_size(80, 100_000), WindowSize { cols: 80, rows: u16::MAX });
    }
}
