//! Sets the system's clock and the one that survives it.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::time::{ClockId, Timespec};

use crate::error::{Context as _, Result};

/// Sets the system's clock.
///
/// # Errors
/// When the kernel refuses.
pub fn set(now: SystemTime) -> Result<()> {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let now = Timespec {
        tv_sec: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(since.subsec_nanos()),
    };
    rustix::time::clock_settime(ClockId::Realtime, now).what(|| "set the clock".into())
}

/// `struct rtc_time`: as `struct tm`, in UTC.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RtcTime {
    second: i32,
    minute: i32,
    hour: i32,
    day: i32,
    /// January is 0.
    month: i32,
    /// Since 1900.
    year: i32,
    week_day: i32,
    year_day: i32,
    daylight_saving: i32,
}

/// `_IOW('p', 0x0a, struct rtc_time)`.
const RTC_SET_TIME: libc::Ioctl = 0x4024_700a;

/// Copies the system's clock to the hardware clock, from which the next kernel takes it.
///
/// # Errors
/// When there is no hardware clock.
pub fn save_to_hardware() -> Result<()> {
    let what = || "set the hardware clock /dev/rtc0".into();
    let rtc = File::open("/dev/rtc0").what(what)?;
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let time = civil(since.as_secs());
    // SAFETY: RTC_SET_TIME reads one rtc_time, which outlives the call.
    let done = unsafe { libc::ioctl(rtc.as_raw_fd(), RTC_SET_TIME, &raw const time) };
    if done < 0 { Err(io::Error::last_os_error()).what(what) } else { Ok(()) }
}

/// Seconds since 1970 as a date of the Gregorian calendar (Hinnant's `civil_from_days`).
fn civil(seconds: u64) -> RtcTime {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, so that the leap day ends a year.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let month = if march_month < 10 { march_month + 2 } else { march_month - 10 };
    let year = era * 400 + year_of_era + u64::from(month < 2);
    let int = |n: u64| i32::try_from(n).unwrap_or(i32::MAX);
    RtcTime {
        second: int(rest % 60),
        minute: int(rest / 60 % 60),
        hour: int(rest / 3_600),
        day: int(day_of_year - (153 * march_month + 2) / 5 + 1),
        month: int(month),
        year: int(year) - 1900,
        // The kernel works these three out by itself.
        week_day: 0,
        year_day: 0,
        daylight_saving: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_calendar() {
        let date = |seconds| {
            let t = civil(seconds);
            (t.year + 1900, t.month + 1, t.day, t.hour, t.minute, t.second)
        };
        assert_eq!(date(0), (1970, 1, 1, 0, 0, 0));
        assert_eq!(date(951_782_400), (2000, 2, 29, 0, 0, 0));
        assert_eq!(date(951_868_799), (2000, 2, 29, 23, 59, 59));
        assert_eq!(date(951_868_800), (2000, 3, 1, 0, 0, 0));
        assert_eq!(date(1_767_225_599), (2025, 12, 31, 23, 59, 59));
        assert_eq!(date(4_107_542_400), (2100, 3, 1, 0, 0, 0));
    }
}
