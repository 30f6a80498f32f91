//! A process that has been taken over, behind the real walls: everything it might try is tried, behind each wall alone and behind both.
//! The jail takes root; the filters do not.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod attempts;
mod cost;
mod prisoner;

use std::ffi::CString;
use std::fs::File;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;

use attempts::{ATTEMPTS, World};
use commonage_isolation::void::Void;
use commonage_vmm::jail::Jail;
use commonage_vmm::jail::birth::{self, Place};
use commonage_vmm::seccomp::Filter;
use prisoner::{Fate, Prisoner, Walls, attempt, neighbour};
use tempfile::TempDir;

const UID: u32 = 100_001;
const OTHER_UID: u32 = 100_002;
const DISK_BYTES: u64 = 1 << 20;
static SECRET: [u8; 16] = *b"sixteen secrets!";

fn jail(uid: u32) -> Jail {
    Jail { uid: Some(uid), threads: 1, file_bytes: DISK_BYTES }
}

/// The outside, and what must live for it to be there.
struct Outside {
    world: World,
    void: Void,
    _directory: TempDir,
    _listeners: (UnixListener, UnixListener, TcpListener),
    _neighbours: [Option<Prisoner>; 2],
}

impl Outside {
    /// With neighbours in jails of their own if `jailed`: that takes root.
    fn new(jailed: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let c = |path: &Path| CString::new(path.as_os_str().as_bytes()).unwrap();
        // Permissions that forbid nothing: it is the walls that are tested.
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o777)).unwrap();
        std::fs::write(path("disk.img"), SECRET).unwrap();
        std::fs::set_permissions(path("disk.img"), PermissionsExt::from_mode(0o666)).unwrap();
        let socket = UnixListener::bind(path("api.sock")).unwrap();
        std::fs::set_permissions(path("api.sock"), PermissionsExt::from_mode(0o666)).unwrap();
        let name = format!("commonage-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let abstract_socket = UnixListener::bind_addr(&address).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let void = if jailed { Void::create().unwrap() } else { no_void() };
        let walls = |uid| Walls { jail: Some((jail(uid), Some(&void))), filter: None };
        let neighbours = [OTHER_UID, UID].map(|uid| if jailed { Some(neighbour(walls(uid))) } else { None });
        // SAFETY: no pointers are passed.
        let shared_memory = unsafe { libc::shmget(libc::IPC_PRIVATE, 4096, libc::IPC_CREAT | 0o666) };
        let world = World {
            disk: c(&path("disk.img")),
            socket: c(&path("api.sock")),
            abstract_name: [b"\0", name.as_bytes()].concat(),
            port: tcp.local_addr().unwrap().port(),
            neighbours: [0, 1].map(|at: usize| neighbours[at].as_ref().map_or(1, |prisoner| prisoner.pid)),
            host_mounts: File::open("/proc/self/ns/mnt").unwrap().into(),
            shared_memory,
            key: key().max(0),
            secret: &SECRET,
        };
        let listeners = (socket, abstract_socket, tcp);
        Self { world, void, _directory: directory, _listeners: listeners, _neighbours: neighbours }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // SAFETY: removes the segment that `new` made; no pointer is passed.
        unsafe { libc::shmctl(self.world.shared_memory, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}

/// Puts a key into the calling thread's keyring. Below 0 if the kernel has none.
fn key() -> libc::c_long {
    let (kind, name) = (c"user".as_ptr(), c"commonage-test".as_ptr());
    let keyring = libc::KEY_SPEC_THREAD_KEYRING;
    // SAFETY: the strings end in NUL and the payload is valid for its length.
    unsafe { libc::syscall(libc::SYS_add_key, kind, name, SECRET.as_ptr(), SECRET.len(), keyring) }
}

/// For tests that never enter it.
fn no_void() -> Void {
    let nothing = || OwnedFd::from(File::open("/dev/null").unwrap());
    Void::from_parts(nothing(), nothing())
}

fn filters() -> [(&'static str, Filter); 2] {
    [("event loop", Filter::event_loop().unwrap()), ("processor", Filter::vcpu().unwrap())]
}

#[test]
fn every_attempt_is_the_end_under_either_filter_alone() {
    let outside = Outside::new(false);
    for (kind, filter) in filters() {
        for one in ATTEMPTS {
            let walls = Walls { jail: None, filter: Some(&filter) };
            let fate = attempt(walls, || (one.run)(&outside.world));
            assert_eq!(fate, Fate::Killed(libc::SIGSYS), "{} ({kind})", one.name);
        }
    }
}

#[test]
#[ignore = "needs root"]
fn every_attempt_fails_in_the_jail_alone() {
    let outside = Outside::new(true);
    for one in ATTEMPTS.iter().filter(|one| !one.refusals.is_empty()) {
        let walls = Walls { jail: Some((jail(UID), Some(&outside.void))), filter: None };
        let fate = attempt(walls, || (one.run)(&outside.world));
        let refused = matches!(fate, Fate::Refused(errno) if one.refusals.contains(&errno));
        assert!(refused, "{}: {fate:?}, not one of {:?}", one.name, one.refusals);
    }
}

#[test]
#[ignore = "needs root"]
fn every_attempt_is_the_end_behind_both_walls() {
    let outside = Outside::new(true);
    for (kind, filter) in filters() {
        for one in ATTEMPTS {
            let walls = Walls { jail: Some((jail(UID), Some(&outside.void))), filter: Some(&filter) };
            let fate = attempt(walls, || (one.run)(&outside.world));
            assert_eq!(fate, Fate::Killed(libc::SIGSYS), "{} ({kind})", one.name);
        }
    }
}

#[test]
#[ignore = "needs root"]
fn a_jail_is_as_good_without_a_void_to_make_it_in() {
    let outside = Outside::new(true);
    for one in ATTEMPTS.iter().filter(|one| !one.refusals.is_empty()) {
        let walls = Walls { jail: Some((jail(UID), None)), filter: None };
        let fate = attempt(walls, || (one.run)(&outside.world));
        let refused = matches!(fate, Fate::Refused(errno) if one.refusals.contains(&errno));
        assert!(refused, "{}: {fate:?}, not one of {:?}", one.name, one.refusals);
    }
}

#[test]
#[ignore = "needs root"]
fn the_attempts_would_succeed_without_walls() {
    // Root outside can do nearly all of it, so a refusal above is a wall's doing. What would harm this machine is left out.
    let outside = Outside::new(true);
    let harmless = [
        "list the root",
        "open /proc",
        "open by /proc/self/fd",
        "read another sliver's disk",
        "write another sliver's disk",
        "look at another sliver's disk",
        "connect to a Unix socket",
        "connect to an abstract socket",
        "connect by TCP",
        "connect by UDP",
        "send raw frames",
        "hold a neighbour by a pidfd",
        "read a neighbour's memory",
        "join the host's mounts",
        "make a user namespace",
        "make a mount namespace",
        "learn the host's name",
        "attach shared memory",
        "lock memory",
    ];
    for name in harmless {
        let one = ATTEMPTS.iter().find(|one| one.name == name).unwrap();
        let fate = attempt(Walls { jail: None, filter: None }, || (one.run)(&outside.world));
        assert_eq!(fate, Fate::Free, "{name}");
    }
}

#[test]
#[ignore = "needs root"]
fn its_own_disk_cannot_grow() {
    let void = Void::create().unwrap();
    for (_, filter) in filters() {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(DISK_BYTES).unwrap();
        let grow = || {
            disk.write_all_at(b"the last byte", DISK_BYTES - 13).map_err(|_| libc::EIO)?;
            let tries = [disk.write_at(b"one more", DISK_BYTES).map(|_| ()), disk.set_len(DISK_BYTES + 1)];
            let grown = tries.iter().any(Result::is_ok);
            let why = tries.into_iter().find_map(|result| result.err()?.raw_os_error());
            if grown { Ok(()) } else { Err(why.unwrap_or(libc::EIO)) }
        };
        let walls = Walls { jail: Some((jail(UID), Some(&void))), filter: Some(&filter) };
        assert_eq!(attempt(walls, grow), Fate::Refused(libc::EFBIG));
        assert_eq!(disk.metadata().unwrap().len(), DISK_BYTES);
    }
}

#[test]
#[ignore = "needs root"]
fn the_signal_that_the_filter_leaves_reaches_nobody() {
    // tgkill calls processors' threads out of the guest. In its pid namespace a process is alone.
    let outside = Outside::new(true);
    let filter = Filter::event_loop().unwrap();
    let walls = Walls { jail: Some((jail(UID), Some(&outside.void))), filter: Some(&filter) };
    let fate = attempt(walls, || {
        let [first, second] = outside.world.neighbours.map(|pid| {
            // SAFETY: no pointers are passed.
            match unsafe { libc::syscall(libc::SYS_tgkill, pid, pid, libc::SIGRTMIN()) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
            }
        });
        first.or(second)
    });
    assert_eq!(fate, Fate::Refused(libc::ESRCH));
}

#[test]
#[ignore = "needs root"]
fn from_outside_a_jail_looks_locked() {
    let void = Void::create().unwrap();
    let prisoner = neighbour(Walls { jail: Some((jail(UID), Some(&void))), filter: None });
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", prisoner.pid)).unwrap();
    let status = read("status");
    for line in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(status.contains(&format!("{line}:\t0000000000000000")), "{status}");
    }
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    assert!(status.contains(&format!("Uid:\t{UID}\t{UID}\t{UID}\t{UID}")), "{status}");
    assert!(status.contains(&format!("Gid:\t{UID}\t{UID}\t{UID}\t{UID}")), "{status}");
    assert!(status.contains("Groups:\t \n") || status.contains("Groups:\t\n"), "{status}");
    assert!(status.lines().any(|line| line.starts_with("NSpid:") && line.ends_with("\t1")), "{status}");
    let mounts = read("mountinfo");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / / ro,nosuid,nodev,noexec"), "{mounts}");
    assert_eq!(std::fs::read_dir(format!("/proc/{}/root/", prisoner.pid)).unwrap().count(), 0);
    for namespace in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of("self"), of(&prisoner.pid.to_string()), "{namespace}");
    }
    let [user, own] = ["uid_map", "gid_map"].map(read);
    assert_eq!(user.split_whitespace().collect::<Vec<_>>(), ["100001", "100001", "1"]);
    assert_eq!(own.split_whitespace().collect::<Vec<_>>(), ["100001", "100001", "1"]);
}

#[test]
#[ignore = "needs root"]
fn where_pages_are_in_the_hosts_memory_is_not_told() {
    let page = Box::new([1u8; 8192]);
    let entry = |pagemap: File| {
        let mut entry = [0; 8];
        let address = (&raw const *page) as u64 + 4096;
        pagemap.read_exact_at(&mut entry, address / 4096 * 8).unwrap();
        u64::from_ne_bytes(entry)
    };
    let frame = |entry: u64| entry & ((1 << 55) - 1);
    let present = 1 << 63;
    let told = entry(File::open("/proc/self/pagemap").unwrap());
    assert!(told & present != 0 && frame(told) != 0, "root is told");
    let told = entry(commonage_vmm::jail::open_without_capabilities("/proc/self/pagemap").unwrap());
    assert!(told & present != 0 && frame(told) == 0, "{told:#x}");
}

#[test]
fn what_was_inherited_is_closed_and_what_is_its_own_is_taken() {
    let fate = Prisoner::born(false, || {
        // As descriptors are after an exec: open, and nobody's.
        let secret = File::open("/proc/self/status").map_err(|_| libc::EIO)?;
        // SAFETY: duplicates a descriptor that is open, at a number that nothing else gets.
        let inherited = unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&secret), libc::F_DUPFD, 500) };
        let group = tempfile::NamedTempFile::new().map_err(|_| libc::EIO)?;
        let void = "/proc/self/ns/mnt,/proc/self/ns/net".parse().map_err(|_| libc::EINVAL)?;
        let place = Place { void, group: Some(group.path().to_owned()) };
        let void = birth::settle(Some(&place)).map_err(|_| libc::EIO)?;
        // SAFETY: asks only.
        let open = unsafe { libc::fcntl(inherited, libc::F_GETFD) } != -1;
        let joined = std::fs::read(group.path()).is_ok_and(|said| said == b"0");
        let leads = rustix::process::getsid(None) == Ok(rustix::process::getpid());
        if !open && joined && leads && void.is_some() { Ok(()) } else { Err(libc::EBADF) }
    });
    assert_eq!(fate.fate(), Fate::Free);
}

#[test]
fn a_process_without_a_jail_still_gains_nothing_and_is_not_traced() {
    let walls = Walls { jail: Some((Jail { uid: None, threads: 1, file_bytes: 1 }, None)), filter: None };
    let prisoner = Prisoner::born(false, || {
        walls.build().map_err(|_| libc::EIO)?;
        let dumpable = rustix::process::dumpable_behavior().map_err(rustix::io::Errno::raw_os_error)?;
        let safe = rustix::thread::no_new_privs().is_ok_and(|on| on)
            && dumpable == rustix::process::DumpableBehavior::NotDumpable
            && rustix::process::getrlimit(rustix::process::Resource::Core).maximum == Some(0);
        if safe { Ok(()) } else { Err(libc::EPERM) }
    });
    assert_eq!(prisoner.fate(), Fate::Free);
}
