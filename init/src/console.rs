//! Lines on the console: `node-init: phase modules`.
//!
//! Every line is one `write`, so lines of processes that share the console are never torn apart.

use std::{fmt, fs::File, os::fd::AsFd as _};

use crate::error::{Context as _, Result};

/// Makes `/dev/console` this process's standard input, output and error, so that children inherit it.
///
/// # Errors
/// When there is no console.
pub fn take() -> Result<()> {
    let console = File::options().read(true).write(true).open("/dev/console");
    let console = console.what(|| "open /dev/console".into())?;
    let fd = console.as_fd();
    rustix::stdio::dup2_stdin(fd)
        .and_then(|()| rustix::stdio::dup2_stdout(fd))
        .and_then(|()| rustix::stdio::dup2_stderr(fd))
        .what(|| "make /dev/console the standard output".into())
}

/// Prints one line that begins with `who`. Text from outside cannot move the cursor or start another line: control
/// characters are shown as dots. A console that is gone is nobody's error.
pub fn line(who: &str, text: fmt::Arguments<'_>) {
    let clean: String =
        text.to_string().chars().map(|c| if c.is_control() && c != '\t' { '.' } else { c }).collect();
    let _ = rustix::io::write(rustix::stdio::stderr(), format!("{who}: {clean}\n").as_bytes());
}

/// [`line`] with a format string: `say!("node-init", "up, {address}")`.
#[macro_export]
macro_rules! say {
    ($who:expr, $($text:tt)*) => { $crate::console::line($who, format_args!($($text)*)) };
}
