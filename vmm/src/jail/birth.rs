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

/// Closes what was inherited, but for the void's descriptors, if there are any: those are taken.
///
/// # Errors
/// The void's descriptors were not inherited, or there is no `/proc`.
pub fn take(void: Option<Numbers>) -> io::Result<Option<Void>> {
    let kept = void.map(|Numbers { mounts, network }| [mounts, network]);
    for number in inherited()? {
        if kept.is_none_or(|kept| !kept.contains(&number)) {
            // Owned, and so closed.
            own(number)?;
        }
    }
    let Some([mounts, network]) = kept else { return Ok(None) };
    Ok(Some(Void::from_parts(own(mounts)?, own(network)?)))
}

/// The descriptors that survived an exec, standard ones aside.
fn inherited() -> io::Result<Vec<RawFd>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        numbers.extend(number.filter(|number| *number > 2 && survives_exec(*number).is_ok_and(|it| it)));
    }
    Ok(numbers)
}

fn survives_exec(number: RawFd) -> io::Result<bool> {
    // SAFETY: asks only; a descriptor that is not open is an error.
    match unsafe { libc::fcntl(number, libc::F_GETFD) } {
        -1 => Err(io::Error::last_os_error()),
        flags => Ok(flags & libc::FD_CLOEXEC == 0),
    }
}

/// Takes an inherited descriptor, once.
fn own(number: RawFd) -> io::Result<OwnedFd> {
    if !survives_exec(number)? {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("descriptor {number} was not inherited"),
        ));
    }
    // SAFETY: it is open and would survive an exec. Whatever this process opens itself (the standard library, rustix, KVM's crates) closes on
    // exec, so this one was inherited, and no value owns it: an owner is made only here, of a descriptor that closes on exec from then on.
    let owned = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC)?;
    Ok(owned)
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

    #[test]
    fn what_this_process_opened_itself_is_not_taken() {
        use std::os::fd::AsRawFd as _;
        let file = std::fs::File::open("/proc/self/status").unwrap();
        assert!(!inherited().unwrap().contains(&file.as_raw_fd()));
        assert!(own(file.as_raw_fd()).is_err());
        assert!(own(1_000_000).is_err());
    }
}
