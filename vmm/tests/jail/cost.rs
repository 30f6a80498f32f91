//! What the walls cost: time whatever the host has mounted, and kernel memory. Prints what `docs/decisions/` quotes.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use commonage_isolation::void::Void;
use commonage_vmm::seccomp::Filter;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, fsconfig_create,
    fsmount, fsopen, mount_bind, mount_change, move_mount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::prisoner::{Prisoner, Walls, forever, tell};
use crate::{UID, jail};

/// The tests here look at the whole machine: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

const MOUNTS: usize = 2000;
const ROUNDS: usize = 25;
const INSTANCES: usize = 500;
/// How long nothing may have become available.
const SETTLING: Duration = Duration::from_secs(1);

/// How long a fresh process takes to build `walls`: the least of several, which is what it takes when nothing else goes on.
fn build_time(walls: Walls<'_>) -> Duration {
    let times = (0..ROUNDS).map(|_| {
        let (ready, told) = rustix::pipe::pipe().unwrap();
        let prisoner = Prisoner::born(true, || {
            let start = Instant::now();
            walls.build().map_err(|_| libc::EIO)?;
            let took = u64::try_from(start.elapsed().as_nanos()).map_err(|_| libc::EIO)?;
            File::from(told).write_all(&took.to_ne_bytes()).map_err(|_| libc::EIO)
        });
        let mut nanoseconds = [0; 8];
        File::from(ready).read_exact(&mut nanoseconds).unwrap();
        drop(prisoner);
        Duration::from_nanos(u64::from_ne_bytes(nanoseconds))
    });
    times.min().unwrap()
}

/// Gives the calling thread a mount namespace of its own with many more mounts.
fn mount_many() {
    // SAFETY: no descriptors are unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let at = std::env::temp_dir();
    let configuration = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    fsconfig_create(&configuration).unwrap();
    let flags = (FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
    let many = fsmount(&configuration, flags.0, flags.1).unwrap();
    move_mount(&many, "", rustix::fs::CWD, &at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).unwrap();
    for number in 0..MOUNTS {
        let directory = at.join(number.to_string());
        std::fs::create_dir(&directory).unwrap();
        mount_bind(&directory, &directory).unwrap();
    }
}

#[test]
#[ignore = "needs root"]
fn a_jail_takes_no_longer_where_much_is_mounted() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let [few, many] = [false, true].map(|many| {
        let measure = move || {
            if many {
                mount_many();
            }
            let start = Instant::now();
            let void = Void::create().unwrap();
            let making = start.elapsed();
            let in_void = build_time(Walls { jail: Some((jail(UID), Some(&void))), filter: None });
            let by_itself = build_time(Walls { jail: Some((jail(UID), None)), filter: None });
            (making, in_void, by_itself)
        };
        std::thread::scope(|scope| scope.spawn(measure).join().unwrap())
    });
    println!("a void takes {:?}, with {MOUNTS} more mounts {:?}", few.0, many.0);
    println!("a jail in it takes {:?}, with {MOUNTS} more mounts {:?}", few.1, many.1);
    println!("a jail without a void takes {:?}, with {MOUNTS} more mounts {:?}", few.2, many.2);
    assert!(many.1 < few.1 * 2 + Duration::from_millis(1), "{few:?} {many:?}");
}

/// Memory that the machine could still give, KiB.
fn available() -> i64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Waits until what ended processes leave to the kernel's threads to clean up is cleaned up: until no more memory becomes available.
fn settled() -> i64 {
    let (mut most, mut since) = (available(), Instant::now());
    while since.elapsed() < SETTLING {
        std::thread::yield_now();
        let now = available();
        if now > most {
            (most, since) = (now, Instant::now());
        }
    }
    available()
}

/// What one of many processes takes that built something and live, KiB.
fn memory_each(own_pids: bool, build: impl Fn() -> Result<(), i32> + Sync) -> f64 {
    let before = settled();
    let prisoners: Vec<_> = (0..INSTANCES)
        .map(|_| {
            let (ready, told) = rustix::pipe::pipe().unwrap();
            let prisoner = Prisoner::born(own_pids, || {
                build()?;
                tell(told);
                forever()
            });
            assert_eq!(crate::prisoner::heard(ready), 1, "it ended early");
            prisoner
        })
        .collect();
    let after = available();
    drop(prisoners);
    (before - after) as f64 / INSTANCES as f64
}

#[test]
#[ignore = "needs root"]
fn walls_take_little_memory() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let void = Void::create().unwrap();
    let (event_loop, vcpu) = (Filter::event_loop().unwrap(), Filter::vcpu().unwrap());
    let jailed =
        || Walls { jail: Some((jail(UID), Some(&void))), filter: None }.build().map_err(|_| libc::EIO);
    let unshare = |flags| {
        move || {
            // SAFETY: no descriptors are unshared.
            unsafe { unshare_unsafe(flags) }.map_err(rustix::io::Errno::raw_os_error)
        }
    };
    // What the first ones take once and for all is taken here.
    memory_each(true, jailed);
    let bare = memory_each(false, || Ok(()));
    println!("a bare process: {bare:.1} KiB");
    println!("+ pid namespace: {:.1} KiB", memory_each(true, || Ok(())) - bare);
    for (name, flags) in
        [("user", UnshareFlags::NEWUSER), ("ipc", UnshareFlags::NEWIPC), ("uts", UnshareFlags::NEWUTS)]
    {
        println!("+ {name} namespace: {:.1} KiB", memory_each(false, unshare(flags)) - bare);
    }
    let in_void = memory_each(false, || {
        void.enter().map_err(|_| libc::EIO)?;
        unshare(UnshareFlags::NEWNS)()
    });
    println!("+ mount namespace, from the void: {:.1} KiB", in_void - bare);
    let jail = memory_each(true, jailed) - bare;
    println!("a jail, all in: {jail:.1} KiB");
    let filtered = memory_each(true, || {
        jailed()?;
        event_loop.install().map_err(|_| libc::EIO)
    });
    println!("+ a filter (event loop): {:.1} KiB", filtered - bare - jail);
    let filtered = memory_each(true, || {
        jailed()?;
        vcpu.install().map_err(|_| libc::EIO)
    });
    println!("+ a filter (processor): {:.1} KiB", filtered - bare - jail);
    // Last: the kernel takes its time to unmake these.
    println!("+ network namespace: {:.1} KiB", memory_each(false, unshare(UnshareFlags::NEWNET)) - bare);
    assert!(jail < 64.0, "a jail takes {jail:.1} KiB");
}
