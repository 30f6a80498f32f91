//! Lines on the console. Each is one write: other processes write there too, and what is written in pieces is torn apart.

use std::fmt;

/// Prints one line that begins with the program's name. A console that is gone is nobody's error.
pub fn line(text: fmt::Arguments<'_>) {
    let _ = rustix::io::write(rustix::stdio::stderr(), format!("net-demux: {text}\n").as_bytes());
}

/// [`line`] with a format string.
macro_rules! say {
    ($($text:tt)*) => { $crate::say::line(format_args!($($text)*)) };
}
pub(crate) use say;
