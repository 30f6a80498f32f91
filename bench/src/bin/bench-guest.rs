//! What runs inside guests, static and small: the first process of the guests that the node compares, and a command in slivers.
//!
//! As PID 1 it makes a base on a virtio disk look like one in persistent memory (QEMU's `microvm` has none) and becomes sliver-init; with
//! `bench=blk` on the kernel's command line it loads the disk instead. As a command, `bench-guest identity` tells what no two clones may
//! have in common.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use commonage_bench::figures::{GUEST, Rate};
use commonage_bench::identity::{CLOCK, CLOCK_SHIFT, Identity, SEQUENCE, SEQUENCE_SECRET};
use commonage_init::mounts::mount;
use rustix::fs::OFlags;
use rustix::mount::MountFlags;
use rustix::net::{self, AddressFamily, RecvFlags, SocketFlags, SocketType, ipproto};
use rustix::system::RebootCommand;

/// The sliver's init, beside this one in the initrd.
const SLIVER_INIT: &str = "/sliver-init";
/// Where a base is expected.
const PMEM: &str = "/dev/pmem0";
/// The disk that is loaded.
const DISK: &str = "/dev/vda";
/// Where a base may be when there is no persistent memory, in no certain order, and what it has at which offset: erofs's magic number.
const DISKS: [&str; 2] = ["/dev/vda", "/dev/vdb"];
const EROFS: (u64, [u8; 4]) = (1024, 0xe0f5_e1e2_u32.to_le_bytes());
/// Alignment of direct input and output, bytes.
const ALIGNMENT: usize = 4096;
/// Largest request, bytes.
const LARGE: usize = 1 << 20;
const SMALL: usize = 4096;
/// Where connections come from whose sequence numbers are looked at.
const FROM_PORT: u16 = 40_000;
/// How long a packet to this very machine may take.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

fn main() -> Result<()> {
    if std::process::id() != 1 {
        let mut arguments = std::env::args().skip(1);
        return match arguments.next().as_deref() {
            Some("identity") => identity(),
            other => bail!("{other:?} is no command; `identity` is"),
        };
    }
    let Err(error) = first_process();
    // A kernel whose first process exits panics, which says less.
    println!("{GUEST}failed: {error:#}");
    rustix::system::reboot(RebootCommand::Restart)?;
    Err(error)
}

fn first_process() -> Result<std::convert::Infallible> {
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, "mode=0755")?;
    mount("proc", "/proc", "proc", MountFlags::empty(), "")?;
    let command_line = std::fs::read_to_string("/proc/cmdline").context("cannot read /proc/cmdline")?;
    let said =
        |name: &str| command_line.split_whitespace().find_map(|w| w.strip_prefix(name)?.strip_prefix('='));
    if said("bench") == Some("blk") {
        let window = said("window_ms").and_then(|ms| ms.parse().ok()).unwrap_or(1000);
        let loads = blk(Duration::from_millis(window))?;
        println!("{GUEST}{}", serde_json::to_string(&loads)?);
        rustix::system::reboot(RebootCommand::Restart)?;
        bail!("the machine goes on after its reset");
    }
    if !Path::new(PMEM).exists() {
        let base = DISKS.iter().find(|disk| is_base(disk)).context("no disk is a base")?;
        symlink(base, PMEM).context("cannot name the base")?;
    }
    Err(Command::new(SLIVER_INIT).exec()).with_context(|| format!("cannot become {SLIVER_INIT}"))
}

fn is_base(disk: &str) -> bool {
    let (offset, wanted) = EROFS;
    let mut magic = [0; 4];
    let read = File::open(disk).and_then(|disk| disk.read_exact_at(&mut magic, offset));
    read.is_ok() && magic == wanted
}

/// A load: name, bytes a request, whether it writes, whether in order, how many at once.
type Load = (&'static str, usize, bool, bool, u64);
const LOADS: [Load; 6] = [
    ("sequential read", LARGE, false, true, 2),
    ("sequential write", LARGE, true, true, 2),
    ("random read", SMALL, false, false, 1),
    ("random write", SMALL, true, false, 1),
    ("random read, 8 at once", SMALL, false, false, 8),
    ("random write, 8 at once", SMALL, true, false, 8),
];

/// Runs every load on the disk for `window`, after a quarter of that which does not count: what was just started is slower.
fn blk(window: Duration) -> Result<BTreeMap<String, Rate>> {
    let flags = OFlags::DIRECT.bits().cast_signed();
    let disk = File::options().read(true).write(true).custom_flags(flags).open(DISK).context(DISK)?;
    let size = rustix::fs::seek(&disk, rustix::fs::SeekFrom::End(0))?;
    let measured = |load: &Load| {
        run(&disk, size, load, window / 4)?;
        run(&disk, size, load, window)
    };
    LOADS.iter().map(|load| Ok((load.0.to_owned(), measured(load)?))).collect()
}

fn run(disk: &File, size: u64, load: &Load, window: Duration) -> Result<Rate> {
    let &(_, block, write, in_order, at_once) = load;
    let (requests, turn) = (AtomicU64::new(0), AtomicU64::new(0));
    let blocks = size / block as u64;
    let start = Instant::now();
    let worker = |seed: u64| -> Result<()> {
        let mut room = vec![seed as u8 | 1; block + ALIGNMENT];
        let skip = room.as_ptr().align_offset(ALIGNMENT);
        let buffer = room.get_mut(skip..skip + block).context("the buffer cannot be aligned")?;
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        while start.elapsed() < window {
            let at = if in_order {
                turn.fetch_add(1, Ordering::Relaxed)
            } else {
                // xorshift: the same for every machine.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random
            };
            let offset = at % blocks * block as u64;
            let done = if write {
                rustix::io::pwrite(disk, buffer, offset)?
            } else {
                rustix::io::pread(disk, &mut *buffer, offset)?
            };
            anyhow::ensure!(done == block, "{done} of {block} bytes at {offset}");
            requests.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (1..=at_once).map(|seed| scope.spawn(move || worker(seed))).collect();
        workers.into_iter().try_for_each(|w| w.join().unwrap_or_else(|_| bail!("a thread panicked")))
    })?;
    let elapsed_us = start.elapsed().as_micros() as u64;
    let requests = requests.into_inner();
    Ok(Rate { requests, bytes: requests * block as u64, elapsed_us })
}

/// Tells what this sliver is, to be compared with other clones.
fn identity() -> Result<()> {
    let mut values = Identity::new();
    let mut file = |name: &str, path: &str| -> Result<()> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
        values.insert(name.to_owned(), text.trim().to_owned());
        Ok(())
    };
    file("machine-id", "/etc/machine-id")?;
    file("host name", "/proc/sys/kernel/hostname")?;
    file("SSH host key", "/etc/ssh/ssh_host_ed25519_key.pub")?;
    file("ports", "/proc/sys/net/ipv4/ip_local_port_range")?;
    file("MAC address", "/sys/class/net/eth0/address")?;
    file("random UUID", "/proc/sys/kernel/random/uuid")?;
    let mut random = [0; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    values.insert("random bytes".into(), random.iter().map(|b| format!("{b:02x}")).collect());
    let sequence = [initial_sequence(40_001)?, initial_sequence(40_002)?];
    let [(first, first_secret), (second, second_secret)] = sequence;
    values.insert(SEQUENCE.into(), format!("{first} {second}"));
    // The kernel adds the time to a number that a secret gives: without it, clones with one secret have one number.
    values.insert(SEQUENCE_SECRET.into(), format!("{first_secret} {second_secret}"));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    values.insert(CLOCK.into(), now.as_millis().to_string());
    let mut line = serde_json::to_vec(&values)?;
    line.push(b'\n');
    Ok(std::io::stdout().write_all(&line)?)
}

/// With which number the kernel would begin a connection from one fixed port of this machine to another, and that number less the part that
/// the clock gives. Nobody listens there: the refusal is as good.
fn initial_sequence(to: u16) -> Result<(u32, u32)> {
    let raw =
        net::socket_with(AddressFamily::INET, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    net::sockopt::set_socket_timeout(&raw, net::sockopt::Timeout::Recv, Some(ANSWER_WAIT))?;
    let local = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    let stream = net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    net::sockopt::set_socket_reuseaddr(&stream, true)?;
    net::bind(&stream, &local(FROM_PORT))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    match net::connect(&stream, &local(to)) {
        Err(rustix::io::Errno::CONNREFUSED) => {}
        other => bail!("connecting to a port where nobody listens: {other:?}"),
    }
    loop {
        let mut packet = [0; 128];
        let (length, _) = net::recv(&raw, &mut packet, RecvFlags::empty()).context("no packet was seen")?;
        let packet = packet.get(..length).unwrap_or_default();
        if let Some(sequence) = syn_of(packet, to) {
            return Ok((sequence, sequence.wrapping_sub((now.as_nanos() >> CLOCK_SHIFT) as u32)));
        }
    }
}

/// The sequence number of a packet that opens a connection to `to`.
fn syn_of(packet: &[u8], to: u16) -> Option<u32> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let tcp = packet.get(header..)?;
    let number = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let opens = tcp.get(13)? & 0x12 == 0x02;
    let ours = number(0)? == FROM_PORT && number(2)? == to && opens;
    let sequence = u32::from(number(4)?) << 16 | u32::from(number(6)?);
    ours.then_some(sequence)
}
