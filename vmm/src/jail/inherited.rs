//! Descriptors that the process was born with: standard input, output and error stay, and the [void](commonage_isolation::void)'s two if
//! it was told of them; all others are closed, whatever the parent forgot.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::str::FromStr;

use commonage_isolation::void::Void;

/// Numbers of the two inherited descriptors of a void, `MOUNT,NETWORK`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    mounts: RawFd,
    network: RawFd,
}

impl FromStr for Numbers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once(',').and_then(|(mounts, network)| {
            Some(Self { mounts: mounts.parse().ok()?, network: network.parse().ok()? })
        });
        numbers
            .filter(|n| n.mounts > 2 && n.network > 2 && n.mounts != n.network)
            .ok_or_else(|| "give two different descriptors above 2, as in 3,4".to_owned())
    }
}

/// Closes what was inherited, and takes the void's descriptors, if there are any. Must be called first of all in the process, and once: it takes
/// every descriptor above 2 for inherited.
///
/// # Errors
/// The void's descriptors are not open, or the kernel is older than 5.9.
pub fn take(void: Option<Numbers>) -> io::Result<Option<Void>> {
    let mut keep = void.map_or_else(Vec::new, |Numbers { mounts, network }| vec![mounts, network]);
    keep.sort_unstable();
    let mut first = 3;
    for kept in keep {
        close(first, kept - 1)?;
        first = kept + 1;
    }
    close(first, RawFd::MAX)?;
    let Some(Numbers { mounts, network }) = void else { return Ok(None) };
    Ok(Some(Void::from_parts(own(mounts)?, own(network)?)))
}

fn close(first: RawFd, last: RawFd) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: the process has just begun (see `take`): no value in it owns a descriptor above 2.
    match unsafe { libc::close_range(first as libc::c_uint, last as libc::c_uint, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn own(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no value owns it (see `take`), and it is open, or this fails.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and `take` does this once for each number, which differ.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_two_different_ones_above_standard_error() {
        assert_eq!("7,4".parse(), Ok(Numbers { mounts: 7, network: 4 }));
        for bad in ["", "3", "3,", "3,3", "2,3", "3,4,5", "-1,4", "a,b"] {
            assert!(bad.parse::<Numbers>().is_err(), "{bad:?}");
        }
    }
}
