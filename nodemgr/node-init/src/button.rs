//! The power button, as the kernel's input devices report it.

use std::{
    fs::{self, File},
    io::Read as _,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::fs::{Mode, OFlags};

/// `struct input_event`: two longs of time, then type, code (16 bits each) and value.
const EVENT: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// All power buttons: firmware often shows two.
pub struct Buttons(Vec<File>);

impl Buttons {
    /// Opens those that are there; none is no error.
    pub fn open() -> Self {
        let entries = fs::read_dir("/sys/class/input").into_iter().flatten().flatten();
        let events = entries.filter_map(|e| {
            let name = e.file_name().into_string().ok().filter(|n| n.starts_with("event"))?;
            let device = fs::read_to_string(e.path().join("device/name")).ok()?;
            device.contains("Power Button").then_some(name)
        });
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = |name| rustix::fs::open(format!("/dev/input/{name}"), flags, Mode::empty()).ok();
        Self(events.filter_map(open).map(File::from).collect())
    }

    /// What to wait for.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd)
    }

    /// Whether one was pressed since the last time.
    pub fn pressed(&mut self) -> bool {
        let mut pressed = false;
        self.0.retain_mut(|device| {
            let mut event = [0; EVENT];
            loop {
                match device.read(&mut event) {
                    Ok(EVENT) => pressed |= is_press(&event),
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return true,
                    // Gone: kept, it would be readable for ever.
                    _ => return false,
                }
            }
        });
        pressed
    }
}

fn is_press(event: &[u8; EVENT]) -> bool {
    let [.., t0, t1, c0, c1, v0, v1, v2, v3] = *event;
    u16::from_ne_bytes([t0, t1]) == EV_KEY
        && u16::from_ne_bytes([c0, c1]) == KEY_POWER
        && u32::from_ne_bytes([v0, v1, v2, v3]) == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_a_press() {
        let mut event = [0; EVENT];
        event[16] = 1;
        event[18] = 116;
        event[20] = 1;
        assert!(is_press(&event));
        event[20] = 0;
        assert!(!is_press(&event), "a release");
        event[20] = 1;
        event[18] = 30;
        assert!(!is_press(&event), "another key");
    }
}
