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
const MEMORY_ROUNDS: usize = 3;
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

/// Something that a process has made for itself.
struct Kind<'a> {
    name: &'static str,
    own_pids: bool,
    build: Box<dyn Fn() -> Result<(), i32> + Sync + 'a>,
}

fn kind<'a>(name: &'static str, own_pids: bool, build: impl Fn() -> Result<(), i32> + Sync + 'a) -> Kind<'a> {
    Kind { name, own_pids, build: Box::new(build) }
}

fn unshare(flags: UnshareFlags) -> Result<(), i32> {
    // SAFETY: no descriptors are unshared.
    unsafe { unshare_unsafe(flags) }.map_err(rustix::io::Errno::raw_os_error)
}

#[test]
#[ignore = "needs root"]
fn walls_take_little_memory() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let void = Void::create().unwrap();
    let (event_loop, vcpu) = (Filter::event_loop().unwrap(), Filter::vcpu().unwrap());
    let build = |walls: Walls<'_>| walls.build().map_err(|_| libc::EIO);
    let walls = |filter| Walls { jail: Some((jail(UID), Some(&void))), filter };
    let kinds = [
        kind("a jail, all in", true, || build(walls(None))),
        kind("a jail and a filter (event loop)", true, || build(walls(Some(&event_loop)))),
        kind("a jail and a filter (processor)", true, || build(walls(Some(&vcpu)))),
        kind("pid namespace", true, || Ok(())),
        kind("user namespace", false, || unshare(UnshareFlags::NEWUSER)),
        kind("ipc namespace", false, || unshare(UnshareFlags::NEWIPC)),
        kind("uts namespace", false, || unshare(UnshareFlags::NEWUTS)),
        kind("mount namespace, from the void", false, || {
            void.enter().map_err(|_| libc::EIO)?;
            unshare(UnshareFlags::NEWNS)
        }),
        // Last: the kernel takes its time to unmake these.
        kind("network namespace", false, || unshare(UnshareFlags::NEWNET)),
    ];
    // What the first ones take once and for all is taken here.
    memory_each(true, &kinds[1].build);
    let mut more: Vec<_> = kinds.iter().map(|_| Vec::new()).collect();
    for _ in 0..MEMORY_ROUNDS {
        let bare = memory_each(false, || Ok(()));
        for (kind, more) in kinds.iter().zip(&mut more) {
            more.push(memory_each(kind.own_pids, &kind.build) - bare);
        }
    }
    for (kind, more) in kinds.iter().zip(&mut more) {
        more.sort_unstable_by(f64::total_cmp);
        println!(
            "{}: {:.1} KiB ({:.1} to {:.1})",
            kind.name,
            more[MEMORY_ROUNDS / 2],
            more[0],
            more[MEMORY_ROUNDS - 1]
        );
    }
    // Other programs take and give memory meanwhile: a jail that takes too much does so each time.
    assert!(more[0][0] < 64.0, "a jail takes {:?} KiB", more[0]);
}
