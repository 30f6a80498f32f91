//! The host's random source, by the system call alone: the crate `getrandom` opens `/dev/urandom` in a static program, and after the jail
//! nothing is opened any more.
#![forbid(unsafe_code)]

use std::io;

use rustix::rand::GetRandomFlags;

/// Fills `bytes`.
///
/// # Errors
/// The kernel has none (it is older than 3.17).
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        match rustix::rand::getrandom(&mut *rest, GetRandomFlags::empty()) {
            Ok(count) => rest = rest.split_at_mut_checked(count).map_or(&mut [], |(_, rest)| rest),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn all_of_it_is_random() {
        let (mut one, mut other) = ([0; 1000], [0; 1000]);
        super::fill(&mut one).unwrap();
        super::fill(&mut other).unwrap();
        super::fill(&mut []).unwrap();
        assert!(one.chunks(20).zip(other.chunks(20)).all(|(one, other)| one != other && one != [0; 20]));
    }
}
