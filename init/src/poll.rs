//! Waits until a descriptor is readable or a time has come.

use std::{
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
};

use crate::error::{Context as _, Result};

/// Waits until one of the descriptors is readable (or hung up), or until the deadline. Says for each whether it is.
///
/// # Errors
/// When the kernel refuses to wait.
pub fn wait(fds: &[BorrowedFd<'_>], deadline: Option<Instant>) -> Result<Vec<bool>> {
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    loop {
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        // Rounded up to a millisecond: waking early would only mean waking twice.
        let left = left.map(|d| d.saturating_add(Duration::from_micros(999)));
        let timeout = left.map(|d| Timespec {
            tv_sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(d.subsec_millis()) * 1_000_000,
        });
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Err(Errno::INTR) => {}
            done => {
                done.what(|| "wait for events".into())?;
                return Ok(polled.iter().map(|p| !p.revents().is_empty()).collect());
            }
        }
    }
}
