//! Whole machines that are paused, saved, and start from what was saved.
//!
//! The guest answers each line that is typed with the same line behind `GOT`, so that a test knows when it lives and what it remembers.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Instant;

use commonage_vmm::control::channel::Patience;
use commonage_vmm_api::{Metrics, RunState};

use super::*;

/// Remembers what it is told: `is X` answers with X and what came before it, `disk` and `mac` with what the kernel knows, `load` runs a while.
const GUEST: &str = "mkdir -p /sys; mount -t sysfs none /sys; last=nothing; echo READY\n\
    while read -r word rest; do case $word in\n\
    is) echo \"GOT $rest after $last\"; last=$rest;;\n\
    disk) echo GOT $(cat /sys/block/vda/size) sectors;;\n\
    read) echo GOT $(dd if=/dev/vda bs=512 skip=$rest count=1 2>/dev/null | md5sum);;\n\
    mac) echo GOT $(cat /sys/class/net/eth0/address);;\n\
    uptime) read up _ < /proc/uptime; echo GOT ${up%.*} seconds;;\n\
    spread) for cpu in 0 1 2 3 4 5 6 7; do ( while :; do :; done ) & done; echo GOT spread;;\n\
    fill) mkdir -p /full; mount -t tmpfs none /full; for n in $(seq $rest); do echo $n; cat /bin/busybox; done > /full/file; echo GOT $(md5sum < /full/file);;\n\
    sum) echo GOT $(md5sum < /full/file);;\n\
    run) echo GOT $(eval $rest);;\n\
    esac; done";

/// A running machine that answers.
pub struct Talking<'m> {
    machine: &'m Machine,
    child: Child,
    control: UnixStream,
    console: BufReader<UnixStream>,
}

impl<'m> Talking<'m> {
    pub fn start(machine: &'m Machine) -> Self {
        let mut child = machine.start();
        let control = machine.connect(&mut child);
        let console = machine.connect(&mut child);
        ask(&console, &Request::Console);
        let mut console = BufReader::new(console);
        let mut line = String::new();
        console.read_line(&mut line).unwrap();
        assert_eq!(serde_json::from_str::<Response>(&line).unwrap(), Response::Console);
        Self { machine, child, control, console }
    }

    /// Reads the console until a line contains `what`; returns the line.
    pub fn hear(&mut self, what: &str) -> String {
        loop {
            let mut line = Vec::new();
            let count = self.console.read_until(b'\n', &mut line).unwrap();
            let line = String::from_utf8_lossy(&line).into_owned();
            if count == 0 {
                let mut last_words = String::new();
                self.child.stderr.take().unwrap().read_to_string(&mut last_words).unwrap();
                panic!(
                    "the machine ended before it said {what:?}: {last_words}; its console: {}",
                    self.machine.console()
                );
            }
            if line.contains(what) {
                return line;
            }
        }
    }

    /// What the guest answers to `line`.
    pub fn say(&mut self, line: &str) -> String {
        self.console.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        let answer = self.hear("GOT");
        answer.split_once("GOT").unwrap().1.trim().to_owned()
    }

    pub fn ask(&self, request: &Request) -> Response {
        ask(&self.control, request);
        answer(&self.control)
    }

    pub fn done(&self, request: &Request) {
        assert_eq!(self.ask(request), Response::Done, "{request:?}");
    }

    fn with_files(&self, request: &Request, files: &[&File]) -> Response {
        let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        channel::send(&self.control, request, &files, Patience::Yes).unwrap();
        answer(&self.control)
    }

    /// Pauses and saves to the machine's directory.
    fn save(&self) {
        self.done(&Request::Pause);
        let files = ["state", "memory"].map(|name| File::create(self.machine.path(name)).unwrap());
        assert_eq!(self.with_files(&Request::Snapshot, &[&files[0], &files[1]]), Response::Done);
    }

    fn metrics(&self) -> Box<Metrics> {
        match self.ask(&Request::Metrics) {
            Response::Metrics(metrics) => metrics,
            other => panic!("{other:?}"),
        }
    }

    pub fn stop(mut self) {
        self.ask(&Request::Stop { grace_ms: 0 });
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

/// A test that fails leaves nothing running.
impl Drop for Talking<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Jailed if that is possible, with every device but a base.
fn machine_with_all_devices() -> Machine {
    let mut machine = Machine::new(GUEST);
    machine.config.disk = Some(disk(file(&machine.path("disk"), &[1; 1 << 20])));
    machine.config.net = Some(NetConfig { mac: MAC });
    machine.config.vsock = Some(VsockConfig { cid: 3, path: machine.path("vsock.sock") });
    machine.config.balloon = true;
    let root = rustix::process::geteuid().is_root();
    machine.config.jail = root.then_some(JailConfig { uid: UID });
    machine
}

/// A machine that starts from what `template` saved, with files of its own.
fn clone_of(template: &Machine) -> Machine {
    let mut clone = Machine::new("");
    let own = clone.config.clone();
    clone.config = MachineConfig {
        start: Start::Restore {
            state: template.path("state"),
            memory: template.path("memory"),
            prefault: None,
        },
        console: own.console,
        control: own.control,
        ..template.config.clone()
    };
    if let Some(disk) = &mut clone.config.disk {
        disk.path = file(&clone.directory.path().join("disk"), &[2; 3 << 20]);
    }
    if let Some(vsock) = &mut clone.config.vsock {
        vsock.path = clone.directory.path().join("vsock.sock");
    }
    clone
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn a_paused_machine_does_nothing_and_a_resumed_one_goes_on() {
    let machine = Machine::new("i=0; while :; do i=$((i+1)); echo TICK $i; done");
    let mut talking = Talking::start(&machine);
    talking.hear("TICK");
    for _ in 0..100 {
        talking.done(&Request::Pause);
        let exits = talking.metrics().vcpus;
        assert!(matches!(talking.ask(&Request::Status), Response::Status { state: RunState::Paused, .. }));
        assert_eq!(talking.metrics().vcpus, exits);
        talking.done(&Request::Resume);
        assert!(matches!(talking.ask(&Request::Status), Response::Status { state: RunState::Running, .. }));
    }
    // Twice is as good as once.
    talking.done(&Request::Resume);
    talking.done(&Request::Pause);
    talking.done(&Request::Pause);
    talking.done(&Request::Resume);
    let exits = talking.metrics().vcpus[0].exits;
    while talking.metrics().vcpus[0].exits == exits {}
    talking.hear("TICK");
    // An idle guest is asleep in the kernel: it is called out of there, too.
    talking.stop();
    let machine = Machine::new(GUEST);
    let mut talking = Talking::start(&machine);
    talking.hear("READY");
    for round in 0..20 {
        talking.done(&Request::Pause);
        talking.done(&Request::Resume);
        assert!(talking.say(&format!("is {round}")).starts_with(&format!("{round} after ")));
    }
    talking.done(&Request::Pause);
    talking.stop();
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn clones_remember_what_the_template_did_and_nothing_of_each_other() {
    let template = machine_with_all_devices();
    let mut talking = Talking::start(&template);
    talking.hear("READY");
    assert_eq!(talking.say("is template"), "template after nothing");
    assert_eq!(talking.say("disk"), "2048 sectors");
    // Not while it runs.
    let scratch = File::create(template.path("scratch")).unwrap();
    let refused = talking.with_files(&Request::Snapshot, &[&scratch, &scratch]);
    assert!(matches!(&refused, Response::Error { message } if message.contains("pause it")), "{refused:?}");
    talking.save();
    // It goes on as if nothing had been.
    talking.done(&Request::Resume);
    assert_eq!(talking.say("is going on"), "going on after template");
    talking.save();
    talking.stop();

    let mut clones = [(); 2].map(|()| clone_of(&template));
    clones[1].config.net = Some(NetConfig { mac: [2, 0, 0, 1, 0, 7] });
    let mut talking: Vec<_> = clones.iter().map(Talking::start).collect();
    for (at, clone) in talking.iter_mut().enumerate() {
        assert_eq!(clone.say(&format!("is {at}")), format!("{at} after going on"));
        assert_eq!(clone.say("is again"), format!("again after {at}"));
        // The kernel heard that the disk is another, and reads it.
        while clone.say("disk") != "6144 sectors" {}
        clone.say("read 5000");
        let metrics = clone.metrics();
        println!(
            "clone {at}: {} KiB private, {} KiB of them the process's own; {:?}",
            metrics.private_kib, metrics.vmm_private_kib, metrics.vcpus
        );
        assert!(metrics.vmm_private_kib <= 1024, "{} KiB", metrics.vmm_private_kib);
        assert!(metrics.private_kib <= 8192, "{} KiB", metrics.private_kib);
        assert!(metrics.disk.read_bytes >= 512);
    }
    talking.into_iter().for_each(Talking::stop);

    // A clone is saved in turn, and starts again from pages of its own and the template's.
    let mut first = Talking::start(&clones[0]);
    assert_eq!(first.say("is clone"), "clone after going on");
    first.save();
    first.stop();
    let second = clone_of(&clones[0]);
    let mut talking = Talking::start(&second);
    assert_eq!(talking.say("is second"), "second after clone");
    talking.stop();
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn pages_that_a_clone_touched_are_a_hint_for_the_next() {
    let template = machine_with_all_devices();
    let mut talking = Talking::start(&template);
    talking.hear("READY");
    talking.say("is template");
    let list = File::create(template.path("prefault")).unwrap();
    let refused = talking.with_files(&Request::Touched, &[&list]);
    assert!(matches!(refused, Response::Error { .. }), "{refused:?}");
    talking.save();
    talking.stop();
    let mut clone = clone_of(&template);
    let mut talking = Talking::start(&clone);
    talking.say("is clone");
    assert_eq!(talking.with_files(&Request::Touched, &[&list]), Response::Done);
    talking.stop();
    let length = list.metadata().unwrap().len();
    assert!(length > 100, "{length} bytes");
    let Start::Restore { prefault, .. } = &mut clone.config.start else { panic!() };
    *prefault = Some(template.path("prefault"));
    let mut talking = Talking::start(&clone);
    assert_eq!(talking.say("is next"), "next after template");
    talking.stop();
    let (with, without) = (clone.config.clone(), clone_of(&template).config);
    let mut times = [&with, &without].map(|config| (config, Vec::new()));
    for _ in 0..12 {
        for (config, times) in &mut times {
            clone.config.start = config.start.clone();
            let started = Instant::now();
            let mut talking = Talking::start(&clone);
            assert_eq!(talking.say("is timed"), "timed after template");
            times.push(started.elapsed());
            talking.stop();
        }
    }
    let [with_list, without_list] = times.map(|(_, mut times)| {
        times.sort_unstable();
        times[times.len() / 2]
    });
    println!("median from start to answer: {with_list:?} with the list of pages, {without_list:?} without");
    clone.config = with;
    // A damaged hint is none.
    std::fs::write(template.path("prefault"), b"nonsense").unwrap();
    let mut talking = Talking::start(&clone);
    assert_eq!(talking.say("is last"), "last after template");
    talking.stop();
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn snapshots_that_do_not_fit_are_refused_with_the_reason() {
    let template = machine_with_all_devices();
    let mut talking = Talking::start(&template);
    talking.hear("READY");
    talking.save();
    talking.stop();
    let good = clone_of(&template);
    let refused = |machine: &Machine, reason: &str| {
        let output = machine.start().wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(reason), "{said:?} does not say {reason:?}");
    };
    let with = |change: &dyn Fn(&mut MachineConfig)| {
        let mut machine = clone_of(&template);
        change(&mut machine.config);
        machine
    };
    refused(&with(&|config| config.memory_mib = 65), "64 MiB of memory, this one has 65 MiB");
    refused(&with(&|config| config.vcpus = 2), "this one has 2 virtual processors");
    refused(&with(&|config| config.disk = None), "virtio devices");
    refused(
        &with(&|config| {
            config.disk = None;
            config.base = Some(template.path("disk"));
        }),
        "no base image",
    );
    refused(
        &with(&|config| {
            config.net = None;
            config.console = None;
            config.disk = None;
        }),
        "virtio devices",
    );

    let (state, memory) = (std::fs::read(template.path("state")).unwrap(), template.path("memory"));
    let put = |bytes: &[u8]| std::fs::write(template.path("state"), bytes).unwrap();
    put(&state[..state.len() - 1]);
    refused(&good, "it was truncated");
    put(&[]);
    refused(&good, "it is not a machine's state");
    for at in [9, 100, state.len() / 2, state.len() - 1] {
        let mut damaged = state.clone();
        damaged[at] ^= 0x10;
        put(&damaged);
        refused(&good, if at == 9 { "it has format" } else { "its checksum is wrong" });
    }
    put(&state);
    let length = std::fs::metadata(&memory).unwrap().len();
    let file = File::options().write(true).open(&memory).unwrap();
    file.set_len(length - 4096).unwrap();
    refused(&good, "it was truncated");
    file.set_len(length).unwrap();
    refused(&good, "it does not belong to this state");
    drop(file);
    let gone = with(&|config| {
        config.start = Start::Restore { state: "/nowhere".into(), memory: memory.clone(), prefault: None };
    });
    refused(&gone, "cannot open the snapshot's state /nowhere");
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn machines_of_two_and_eight_processors_boot_pause_and_clone() {
    for vcpus in [2, 8] {
        let mut template = machine_with_all_devices();
        template.config.vcpus = vcpus;
        template.config.memory_mib = 128;
        let mut talking = Talking::start(&template);
        talking.hear("READY");
        assert_eq!(talking.say("run grep -c ^processor /proc/cpuinfo"), vcpus.to_string());
        assert_eq!(talking.say("spread"), "spread");
        // All of them, busy, at once.
        for _ in 0..10 {
            talking.done(&Request::Pause);
            let exits = talking.metrics().vcpus;
            assert_eq!(exits.len(), usize::from(vcpus));
            assert_eq!(talking.metrics().vcpus, exits);
            talking.done(&Request::Resume);
        }
        assert_eq!(talking.say("is template"), "template after nothing");
        talking.save();
        talking.stop();
        let clone = clone_of(&template);
        let mut talking = Talking::start(&clone);
        assert_eq!(talking.say("is clone"), "clone after template");
        assert_eq!(talking.say("run grep -c ^cpu[0-9] /proc/stat"), vcpus.to_string());
        talking.stop();
    }
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn the_smallest_machine_has_memory_to_spare() {
    let mut machine = machine_with_all_devices();
    machine.config.memory_mib = commonage_vmm::layout::MIN_MEMORY_MIB;
    let mut talking = Talking::start(&machine);
    talking.hear("READY");
    let free: u64 =
        talking.say("run awk '/MemAvailable/{print $2}' /proc/meminfo").parse().unwrap_or_default();
    assert!(free > 1024, "{free} KiB");
    talking.stop();
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn memory_beyond_the_gap_is_used_and_saved() {
    let mut template = machine_with_all_devices();
    template.config.memory_mib = 4096;
    let base: Vec<u8> = (0..5000u32).map(|at| (at * 7 % 251) as u8).collect();
    template.config.base = Some(file(&template.path("base"), &base));
    let mut talking = Talking::start(&template);
    talking.hear("READY");
    let total: u64 = talking.say("run awk '/MemTotal/{print $2}' /proc/meminfo").parse().unwrap_or_default();
    assert!(total > 3900 << 10, "{total} KiB");
    let highest = talking.say("run grep 'System RAM' /proc/iomem | tail -n 1");
    assert!(highest.contains("100000000-13fffffff"), "{highest}");
    let sum = talking.say("fill 8");
    let head = talking.say("run head -c 5000 /dev/pmem0 | md5sum");
    talking.save();
    talking.stop();
    let clone = clone_of(&template);
    let mut talking = Talking::start(&clone);
    assert_eq!(talking.say("sum"), sum);
    assert_eq!(talking.say("run head -c 5000 /dev/pmem0 | md5sum"), head);
    talking.stop();
}
