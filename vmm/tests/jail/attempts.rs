//! What a taken-over process tries, each as the system calls it would make. `Ok` is success, an error the number it was refused with.
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "raw system calls with arguments that are valid or meant to be refused"
)]

use std::ffi::{CStr, c_long};
use std::os::fd::{AsRawFd, OwnedFd};

use libc::*;

/// What there is outside to be had.
pub struct World {
    /// Another sliver's disk.
    pub disk: std::ffi::CString,
    /// A Unix socket where the node manager listens.
    pub socket: std::ffi::CString,
    /// An abstract one, as connect(2) wants it.
    pub abstract_name: Vec<u8>,
    /// A TCP port of the host.
    pub port: u16,
    /// Neighbours: of another user, and of the same user number.
    pub neighbours: [pid_t; 2],
    /// The host's mount namespace. No prisoner should have it; this one was lucky.
    pub host_mounts: OwnedFd,
    /// Shared memory that everybody may read.
    pub shared_memory: c_int,
    /// A key in the kernel's keeping; 0 if it keeps none.
    pub key: c_long,
    /// A secret in memory: every process here has it at the same address.
    pub secret: &'static [u8; 16],
}

/// One try.
pub struct Attempt {
    /// What.
    pub name: &'static str,
    /// How.
    pub run: fn(&World) -> Result<(), i32>,
    /// What the jail alone says to it; nothing if that is the filter's matter alone.
    pub refusals: &'static [i32],
}

const fn try_to(name: &'static str, refusals: &'static [i32], run: fn(&World) -> Result<(), i32>) -> Attempt {
    Attempt { name, run, refusals }
}

fn done(result: impl Into<c_long>) -> Result<(), i32> {
    value(result).map(|_| ())
}

fn value(result: impl Into<c_long>) -> Result<c_long, i32> {
    match result.into() {
        -1 => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(EIO)),
        value => Ok(value),
    }
}

fn open_for(path: &CStr, flags: c_int) -> Result<(), i32> {
    done(unsafe { open(path.as_ptr(), flags, 0o600) })
}

fn descriptor(result: c_int) -> Result<c_int, i32> {
    value(result).map(|_| result)
}

fn connect_to<T>(family: c_int, kind: c_int, address: &T, length: usize) -> Result<(), i32> {
    let socket = descriptor(unsafe { socket(family, kind, 0) })?;
    done(unsafe { connect(socket, std::ptr::from_ref(address).cast(), length as socklen_t) })
}

fn unix(name: &[u8]) -> Result<(), i32> {
    let mut address: sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = AF_UNIX as sa_family_t;
    for (to, from) in address.sun_path.iter_mut().zip(name) {
        *to = *from as c_char;
    }
    connect_to(AF_UNIX, SOCK_STREAM, &address, size_of::<sa_family_t>() + name.len())
}

fn inet(kind: c_int, port: u16) -> Result<(), i32> {
    let mut address: sockaddr_in = unsafe { std::mem::zeroed() };
    address.sin_family = AF_INET as sa_family_t;
    address.sin_port = port.to_be();
    address.sin_addr.s_addr = u32::from_be_bytes([127, 0, 0, 1]).to_be();
    connect_to(AF_INET, kind, &address, size_of::<sockaddr_in>())
}

/// Whether a directory has any entry, told by what there is beside `.` and `..`.
fn list(path: &CStr) -> Result<(), i32> {
    let directory = descriptor(unsafe { open(path.as_ptr(), O_RDONLY | O_DIRECTORY) })?;
    let mut entries = [0u8; 4096];
    let got = value(unsafe { syscall(SYS_getdents64, directory, entries.as_mut_ptr(), entries.len()) })?;
    // Two entries with names of up to two bytes are 24 bytes each.
    if got > 48 { Ok(()) } else { Err(ENOENT) }
}

fn each(neighbours: [pid_t; 2], try_one: impl Fn(pid_t) -> Result<(), i32>) -> Result<(), i32> {
    let [first, second] = neighbours.map(try_one);
    first.or(second)
}

fn bpf(command: c_int) -> Result<(), i32> {
    let attributes = [0u64; 16];
    done(unsafe { syscall(SYS_bpf, command, attributes.as_ptr(), size_of_val(&attributes)) })
}

/// The whole list.
pub const ATTEMPTS: &[Attempt] = &[
    // Files.
    try_to("list the root", &[ENOENT], |_| list(c"/")),
    try_to("create a file", &[EROFS], |_| open_for(c"/file", O_CREAT | O_WRONLY)),
    try_to("make a device", &[EROFS, EPERM], |_| {
        done(unsafe { mknod(c"/mem".as_ptr(), S_IFCHR | 0o600, makedev(1, 1)) })
    }),
    try_to("climb out of the root", &[ENOENT], |_| open_for(c"../../../../../etc/passwd", O_RDONLY)),
    try_to("open /proc", &[ENOENT], |_| open_for(c"/proc/self/status", O_RDONLY)),
    try_to("open by /proc/self/fd", &[ENOENT], |_| open_for(c"/proc/self/fd/0", O_RDWR)),
    try_to("open the memory of the machine", &[ENOENT], |_| open_for(c"/dev/mem", O_RDONLY)),
    try_to("open KVM again", &[ENOENT], |_| open_for(c"/dev/kvm", O_RDWR)),
    try_to("read another sliver's disk", &[ENOENT], |world| open_for(&world.disk, O_RDONLY)),
    try_to("write another sliver's disk", &[ENOENT], |world| open_for(&world.disk, O_RDWR)),
    try_to("look at another sliver's disk", &[ENOENT], |world| {
        let mut found: stat = unsafe { std::mem::zeroed() };
        done(unsafe { stat(world.disk.as_ptr(), &raw mut found) })
    }),
    try_to("open by a handle instead of a path", &[EPERM], |_| {
        let handle = [8u32, 1, 2, 0];
        done(unsafe { syscall(SYS_open_by_handle_at, AT_FDCWD, handle.as_ptr(), O_RDONLY) })
    }),
    // Sockets.
    try_to("connect to a Unix socket", &[ENOENT], |world| unix(world.socket.as_bytes_with_nul())),
    try_to("connect to an abstract socket", &[ECONNREFUSED], |world| unix(&world.abstract_name)),
    try_to("connect by TCP", &[ENETUNREACH], |world| inet(SOCK_STREAM, world.port)),
    try_to("connect by UDP", &[ENETUNREACH], |world| inet(SOCK_DGRAM, world.port)),
    try_to("send raw frames", &[EPERM], |_| done(unsafe { socket(AF_PACKET, SOCK_RAW, 0) })),
    try_to("raise the loopback interface", &[EPERM], |_| {
        let socket = descriptor(unsafe { socket(AF_INET, SOCK_DGRAM, 0) })?;
        let mut interface: ifreq = unsafe { std::mem::zeroed() };
        (interface.ifr_name[0], interface.ifr_name[1]) = (b'l' as c_char, b'o' as c_char);
        interface.ifr_ifru.ifru_flags = IFF_UP as c_short;
        done(unsafe { ioctl(socket, SIOCSIFFLAGS, &raw mut interface) })
    }),
    // Processes.
    try_to("fork without end", &[EAGAIN], |_| {
        (0..100).try_for_each(|_| match value(unsafe { fork() })? {
            0 => super::prisoner::forever(),
            _ => Ok(()),
        })
    }),
    try_to("run a shell", &[ENOENT], |_| {
        let arguments = [c"sh".as_ptr(), std::ptr::null()];
        done(unsafe { execv(c"/bin/sh".as_ptr(), arguments.as_ptr()) })
    }),
    try_to("kill a neighbour", &[ESRCH], |world| {
        each(world.neighbours, |pid| done(unsafe { kill(pid, SIGKILL) }))
    }),
    try_to("kill a neighbour's thread", &[ESRCH], |world| {
        each(world.neighbours, |pid| done(unsafe { syscall(SYS_tgkill, pid, pid, SIGKILL) }))
    }),
    try_to("kill everybody", &[ESRCH], |_| done(unsafe { kill(-1, SIGKILL) })),
    try_to("hold a neighbour by a pidfd", &[ESRCH], |world| {
        each(world.neighbours, |pid| done(unsafe { syscall(SYS_pidfd_open, pid, 0) }))
    }),
    try_to("trace a neighbour", &[ESRCH], |world| {
        each(world.neighbours, |pid| done(unsafe { ptrace(PTRACE_ATTACH, pid, 0, 0) }))
    }),
    try_to("read a neighbour's memory", &[ESRCH], |world| {
        let mut stolen = [0u8; 16];
        let here = iovec { iov_base: stolen.as_mut_ptr().cast(), iov_len: stolen.len() };
        let there = iovec { iov_base: world.secret.as_ptr().cast_mut().cast(), iov_len: stolen.len() };
        each(world.neighbours, |pid| {
            done(unsafe { process_vm_readv(pid, &raw const here, 1, &raw const there, 1, 0) } as c_long)
        })
    }),
    try_to("slow a neighbour down", &[ESRCH], |world| {
        each(world.neighbours, |pid| done(unsafe { setpriority(PRIO_PROCESS, pid as id_t, 19) }))
    }),
    // Namespaces and mounts.
    try_to("mount something", &[EPERM], |_| {
        let (name, at) = (c"tmpfs".as_ptr(), c"/".as_ptr());
        done(unsafe { mount(name, at, name, 0, std::ptr::null()) })
    }),
    try_to("make the root writable", &[EPERM], |_| {
        let at = c"/".as_ptr();
        done(unsafe { mount(std::ptr::null(), at, std::ptr::null(), MS_REMOUNT | MS_BIND, std::ptr::null()) })
    }),
    try_to("look under the root", &[EPERM], |_| done(unsafe { umount2(c"/".as_ptr(), MNT_DETACH) })),
    try_to("change the root", &[EPERM], |_| done(unsafe { chroot(c"/".as_ptr()) })),
    try_to("join the host's mounts", &[EPERM], |world| {
        done(unsafe { setns(world.host_mounts.as_raw_fd(), CLONE_NEWNS) })
    }),
    try_to("make a user namespace", &[ENOSPC, EPERM], |_| done(unsafe { unshare(CLONE_NEWUSER) })),
    try_to("make a mount namespace", &[EPERM], |_| done(unsafe { unshare(CLONE_NEWNS) })),
    try_to("make a network namespace", &[EPERM], |_| done(unsafe { unshare(CLONE_NEWNET) })),
    // Identity.
    try_to("become root", &[EINVAL, EPERM], |_| done(unsafe { syscall(SYS_setresuid, 0, 0, 0) })),
    try_to("become a neighbour", &[EINVAL, EPERM], |_| {
        let uid = super::OTHER_UID;
        done(unsafe { syscall(SYS_setresuid, uid, uid, uid) })
    }),
    try_to("join root's group", &[EPERM], |_| done(unsafe { syscall(SYS_setgroups, 1, [0u32].as_ptr()) })),
    try_to("take all capabilities", &[EPERM], |_| {
        let (header, sets) = ([0x2008_0522u32, 0], [u32::MAX; 6]);
        done(unsafe { syscall(SYS_capset, header.as_ptr(), sets.as_ptr()) })
    }),
    try_to("raise its limits", &[EPERM], |_| {
        let limit = rlimit { rlim_cur: RLIM_INFINITY, rlim_max: RLIM_INFINITY };
        done(unsafe { setrlimit(RLIMIT_FSIZE, &raw const limit) })
    }),
    try_to("run before everybody else", &[EPERM], |_| {
        let first = sched_param { sched_priority: 1 };
        done(unsafe { sched_setscheduler(0, SCHED_FIFO, &raw const first) })
    }),
    try_to("lock memory", &[EPERM, ENOMEM], |world| done(unsafe { mlock(world.secret.as_ptr().cast(), 16) })),
    // The host.
    try_to("learn the host's name", &[ENOENT], |_| {
        let mut name: utsname = unsafe { std::mem::zeroed() };
        done(unsafe { uname(&raw mut name) })?;
        if name.nodename[0] == 0 { Err(ENOENT) } else { Ok(()) }
    }),
    try_to("rename the host", &[EPERM], |_| done(unsafe { sethostname(c"mine".as_ptr(), 4) })),
    try_to("attach shared memory", &[EINVAL], |world| {
        match unsafe { shmat(world.shared_memory, std::ptr::null(), SHM_RDONLY) } as isize {
            -1 => done(-1i64),
            _ => Ok(()),
        }
    }),
    try_to("set the clock", &[EPERM], |_| {
        let now = timeval { tv_sec: 0, tv_usec: 0 };
        done(unsafe { settimeofday(&raw const now, std::ptr::null()) })
    }),
    try_to("read the kernel's log", &[EPERM], |_| {
        const READ_ALL: c_int = 3;
        const CLEAR: c_int = 5;
        let mut text = [0u8; 64];
        // Reading alone is a matter of the host's settings; clearing is not.
        done(unsafe { syscall(SYS_syslog, CLEAR, text.as_mut_ptr(), 0) })?;
        done(unsafe { syscall(SYS_syslog, READ_ALL, text.as_mut_ptr(), text.len()) })
    }),
    try_to("use input and output ports", &[EPERM, ENOSYS], |_| done(unsafe { syscall(SYS_iopl, 3) })),
    try_to("load a kernel module", &[EPERM, ENOSYS], |_| {
        done(unsafe { syscall(SYS_init_module, [0u8; 64].as_ptr(), 64, c"".as_ptr()) })
    }),
    try_to("forbid the reboot key", &[EPERM], |_| {
        done(unsafe { syscall(SYS_reboot, 0xfee1_deadu32, 0x2812_1969, 0, 0) })
    }),
    try_to("walk through everybody's BPF programs", &[EPERM, ENOSYS], |_| {
        const PROG_GET_NEXT_ID: c_int = 11;
        bpf(PROG_GET_NEXT_ID)
    }),
    try_to("watch everybody by performance counters", &[EPERM, EACCES, ENOSYS, ENOENT], |_| {
        const SOFTWARE_CPU_CLOCK: [u32; 4] = [1, 128, 0, 0]; // type, size, config
        let mut attributes = [0u32; 32];
        attributes[..4].copy_from_slice(&SOFTWARE_CPU_CLOCK);
        done(unsafe { syscall(SYS_perf_event_open, attributes.as_ptr(), -1, 0, -1, 0) })
    }),
    try_to("read a key of the node manager's", &[EACCES, EPERM, ENOKEY, ENOSYS], |world| {
        const READ: c_int = 11;
        let mut stolen = [0u8; 16];
        done(unsafe { syscall(SYS_keyctl, READ, world.key, stolen.as_mut_ptr(), stolen.len()) })
    }),
    // What the jail leaves, because there is nothing to do with it in there, and only the filter forbids.
    try_to("fork once", &[], |_| done(unsafe { fork() })),
    try_to("run a program from memory", &[], |_| {
        let memory = descriptor(unsafe { memfd_create(c"program".as_ptr(), 0) })?;
        done(unsafe { syscall(SYS_execveat, memory, c"".as_ptr(), 0, 0, AT_EMPTY_PATH) })
    }),
    try_to("make memory executable", &[], |_| {
        let (read, execute) = (PROT_READ, PROT_EXEC);
        let page = unsafe { mmap(std::ptr::null_mut(), 4096, read, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) };
        done(unsafe { mprotect(page, 4096, read | execute) })
    }),
    try_to("map executable memory", &[], |_| {
        let page = unsafe { mmap(std::ptr::null_mut(), 4096, PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) };
        if page == MAP_FAILED { done(-1i64) } else { Ok(()) }
    }),
    try_to("make a ring of its own", &[], |_| {
        let parameters = [0u32; 30];
        done(unsafe { syscall(SYS_io_uring_setup, 1, parameters.as_ptr()) })
    }),
    try_to("make a socket", &[], |_| done(unsafe { socket(AF_UNIX, SOCK_STREAM, 0) })),
    try_to("make a pair of other sockets", &[], |_| {
        let mut pair = [0; 2];
        done(unsafe { socketpair(AF_TIPC, SOCK_STREAM, 0, pair.as_mut_ptr()) })
    }),
    try_to("make another virtual machine", &[], |_| done(unsafe { ioctl(0, 0xae01, 0) })),
    try_to("type into the terminal it was started from", &[], |_| {
        done(unsafe { ioctl(0, TIOCSTI, c"x".as_ptr()) })
    }),
    try_to("watch page faults", &[], |_| done(unsafe { syscall(SYS_userfaultfd, 1) })),
    try_to("call by the numbers of x32", &[], |_| {
        const X32: c_long = 0x4000_0000;
        done(unsafe { syscall(X32 + SYS_getpid) })
    }),
];
