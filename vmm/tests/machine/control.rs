//! The control socket of whole machines: the guest's connections, the console, the end that the guest is asked for.
//!
//! Where a guest needs more than a shell, this program itself is in its initrd, and one of the tests below is its guest's half.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use commonage_vmm_api::POWER_PORT;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

use super::*;

const STREAMS: usize = 150;

/// A machine with a vsock whose init runs the guest's half `part`, then `script`.
fn machine_with_guest(part: &str, script: &str) -> Machine {
    let mut machine = Machine::new("");
    let script = format!(
        "ifconfig lo up\nulimit -n 1024\nIN_GUEST=1 guest --ignored --exact --nocapture control::{part}\n{script}"
    );
    let itself = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    std::fs::write(machine.path("initrd"), initrd(&script, &[("guest", &itself)])).unwrap();
    machine.config.memory_mib = 192;
    machine.config.vsock = Some(VsockConfig { cid: 3, path: machine.path("vsock.sock") });
    machine
}

fn in_guest() -> bool {
    std::env::var_os("IN_GUEST").is_some()
}

/// In the guest: connects to the host's port as soon as somebody accepts.
fn connect_to_host(port: u32) -> VsockStream {
    loop {
        match VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port) {
            Ok(stream) => return stream,
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "refused, or what else?"),
        }
        std::thread::yield_now();
    }
}

/// On the host: the guest's next connection.
fn accept(accepting: &UnixStream, machine: &Machine) -> (u32, UnixStream) {
    let (response, mut descriptors) = answer_with_descriptors(accepting);
    let Response::Connection { port } = response else { panic!("{response:?}: {}", machine.console()) };
    assert_eq!(descriptors.len(), 1);
    (port, descriptors.remove(0).into())
}

/// On the host: connects to the guest's port.
fn connect_to_guest(machine: &Machine, port: u32) -> BufReader<UnixStream> {
    let mut stream = UnixStream::connect(machine.path("vsock.sock")).unwrap();
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, format!("OK {port}\n"), "{}", machine.console());
    reader
}

/// Not a test: the guest's half of [`streams_go_both_ways_over_vsock`].
#[test]
#[ignore = "runs inside a guest"]
fn guest_with_streams() {
    if !in_guest() {
        return;
    }
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, 808).unwrap();
    let mut host = connect_to_host(806);
    host.write_all(b"listening").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes.reverse();
    stream.write_all(&bytes).unwrap();
    stream.shutdown(std::net::Shutdown::Both).unwrap();
    let mut answer = String::new();
    host.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "that is all");

    // Many at a time, each with its number there and back.
    let mut many: Vec<VsockStream> = (0..STREAMS).map(|_| connect_to_host(5000)).collect();
    for (number, stream) in many.iter_mut().enumerate() {
        stream.write_all(&(number as u32).to_le_bytes()).unwrap();
    }
    for (number, stream) in many.iter_mut().enumerate().rev() {
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(u32::from_le_bytes(answer), number as u32 + 1);
    }
    println!("VSOCK DONE");
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn streams_go_both_ways_over_vsock() {
    let machine = machine_with_guest("guest_with_streams", "");
    let mut child = machine.start();
    let ending = machine.connect(&mut child);
    ask(&ending, &Request::Wait);
    let accepting = machine.connect(&mut child);
    ask(&accepting, &Request::Accept);
    let (port, mut from_guest) = accept(&accepting, &machine);
    assert_eq!(port, 806);
    let mut bytes = Vec::new();
    from_guest.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"listening");

    let mut to_guest = connect_to_guest(&machine, 808);
    let sent: Vec<u8> = (0..1_000_000u32).map(|at| (at % 251) as u8).collect();
    to_guest.get_mut().write_all(&sent).unwrap();
    to_guest.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    let mut back = Vec::new();
    to_guest.read_to_end(&mut back).unwrap();
    back.reverse();
    assert!(back == sent, "{} bytes came back, {} were sent", back.len(), sent.len());
    from_guest.write_all(b"that is all").unwrap();
    drop(from_guest);

    let mut many: Vec<UnixStream> = (0..STREAMS).map(|_| accept(&accepting, &machine).1).collect();
    let client = machine.connect(&mut child);
    ask(&client, &Request::Metrics);
    let Response::Metrics(metrics) = answer(&client) else { panic!("no metrics") };
    assert!(metrics.vsock_connections >= STREAMS as u64, "{metrics:?}");
    assert!(metrics.private_kib > metrics.vmm_private_kib && metrics.vmm_private_kib > 0, "{metrics:?}");
    for stream in &mut many {
        let mut number = [0; 4];
        stream.read_exact(&mut number).unwrap();
        stream.write_all(&(u32::from_le_bytes(number) + 1).to_le_bytes()).unwrap();
    }
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(machine.console().contains("VSOCK DONE"), "{}", machine.console());
}

/// Reads what the console says until it has said `words`.
pub fn hear(console: &mut UnixStream, heard: &mut String, words: &str) {
    let mut buffer = [0; 4096];
    while !heard.contains(words) {
        let count = console.read(&mut buffer).unwrap();
        assert_ne!(count, 0, "the console ended before {words:?}: {heard}");
        heard.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
}

/// Attaches to the console.
pub fn attach(machine: &Machine, child: &mut Child) -> UnixStream {
    let mut console = machine.connect(child);
    ask(&console, &Request::Console);
    // Byte by byte: what follows the line is the console's.
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        console.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    assert_eq!(serde_json::from_slice::<Response>(&line).unwrap(), Response::Console);
    console
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn a_console_is_attached_and_typed_on_and_left() {
    let machine = Machine::new(
        "echo first words\nread line\necho \"serial: <$line>\"\n\
         exec 3<>/dev/hvc0\necho prompt: >&3\nread line <&3\necho \"virtio: <$line>\" >&3\n\
         read line <&3\nreboot -f",
    );
    let mut child = machine.start();
    let ending = machine.connect(&mut child);
    ask(&ending, &Request::Wait);
    let mut console = attach(&machine, &mut child);
    let mut heard = String::new();
    hear(&mut console, &mut heard, "first words");
    console.write_all(b"one\n").unwrap();
    hear(&mut console, &mut heard, "serial: <one>");
    hear(&mut console, &mut heard, "prompt:");
    console.write_all(b"two\n").unwrap();
    hear(&mut console, &mut heard, "virtio: <two>");
    drop(console);

    let (mut one, mut other) = (attach(&machine, &mut child), attach(&machine, &mut child));
    for console in [&mut one, &mut other] {
        let mut history = String::new();
        hear(console, &mut history, "virtio: <two>");
        assert!(history.contains("first words") && history.contains("serial: <one>"), "{history}");
    }
    other.write_all(b"three\n").unwrap();
    let Response::Exited { reason, console } = answer(&ending) else { panic!("no end") };
    assert_eq!(reason, ExitReason::Reboot);
    assert!(console.contains("virtio: <two>"), "{console}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(machine.console().contains("virtio: <two>"), "{}", machine.console());
}

/// Not a test: the guest's half of those below.
#[test]
#[ignore = "runs inside a guest"]
fn guest_that_is_asked_to_leave() {
    if !in_guest() {
        return;
    }
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, POWER_PORT).unwrap();
    let mut host = connect_to_host(5000);
    host.write_all(b"ready").unwrap();
    listener.accept().unwrap();
}

/// Starts a machine with [`guest_that_is_asked_to_leave`] and `script`, lets it get ready, stops it with `grace_ms`, and tells why it ended.
fn stop(script: &str, grace_ms: u32) -> ExitReason {
    let machine = machine_with_guest("guest_that_is_asked_to_leave", script);
    let mut child = machine.start();
    let client = machine.connect(&mut child);
    let accepting = machine.connect(&mut child);
    ask(&accepting, &Request::Accept);
    let mut ready = [0; 5];
    accept(&accepting, &machine).1.read_exact(&mut ready).unwrap();
    ask(&client, &Request::Wait);
    ask(&client, &Request::Stop { grace_ms });
    let mut lines = BufReader::new(&client).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap());
    assert_eq!(lines.next(), Some(Response::Stopping));
    let Some(Response::Exited { reason, .. }) = lines.next() else { panic!("{}", machine.console()) };
    child.wait().unwrap();
    reason
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn a_guest_that_is_asked_to_leave_has_its_grace() {
    let long = 600_000;
    assert_eq!(stop("reboot -f", long), ExitReason::Reboot, "it left by itself");
    assert_eq!(stop("while :; do sleep 1000; done", 1000), ExitReason::Stopped, "it did not");
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn a_guest_where_nobody_listens_has_no_grace() {
    let mut machine = Machine::new("echo up\nwhile :; do sleep 1000; done");
    machine.config.vsock = Some(VsockConfig { cid: 3, path: machine.path("vsock.sock") });
    let mut child = machine.start();
    let mut console = attach(&machine, &mut child);
    hear(&mut console, &mut String::new(), "up");
    let client = machine.connect(&mut child);
    let asked = Instant::now();
    ask(&client, &Request::Stop { grace_ms: 600_000 });
    assert_eq!(answer(&client), Response::Stopping);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(300));
}

/// Runs `sliver-vmm ctl` and returns its exit status and what it printed.
fn ctl(machine: &Machine, arguments: &[&str]) -> (Option<i32>, String) {
    let binary = std::env::var_os("SLIVER_VMM").unwrap_or_else(|| env!("CARGO_BIN_EXE_sliver-vmm").into());
    let mut command = Command::new(binary);
    let output = command.arg("ctl").arg(machine.path("control.sock")).args(arguments).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn a_person_can_ask_and_tell_a_machine() {
    let machine = Machine::new("echo up\nwhile :; do sleep 1000; done");
    let mut child = machine.start();
    hear(&mut attach(&machine, &mut child), &mut String::new(), "up");
    let (status, said) = ctl(&machine, &["status"]);
    assert!(status == Some(0) && said.starts_with("running, process "), "{said}");
    let (status, said) = ctl(&machine, &["--json", "metrics"]);
    let Response::Metrics(metrics) = serde_json::from_str(&said).unwrap() else { panic!("{said}") };
    assert!(status == Some(0) && metrics.private_kib > 0, "{said}");
    let (status, said) = ctl(&machine, &["snapshot", machine.path("snapshot").to_str().unwrap()]);
    assert!(status == Some(1) && said.contains("pause"), "it runs: {said}");
    let (status, said) = ctl(&machine, &["stop"]);
    assert!(status == Some(0) && said.starts_with("stopped; its console said last:\n  "), "{said}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let (status, said) = ctl(&machine, &["status"]);
    assert!(status == Some(1) && said.contains("is the machine running"), "{said}");
}

/// Not a test: the guest's half of the one below. It goes on twice: once where it was, and once in a machine that started from its snapshot.
#[test]
#[ignore = "runs inside a guest"]
fn guest_that_is_saved() {
    if !in_guest() {
        return;
    }
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, 808).unwrap();
    let mut host = connect_to_host(5000);
    host.write_all(b"ready").unwrap();
    let mut word = [0; 5];
    match host.read_exact(&mut word) {
        Ok(()) => println!("IT WENT ON: {}", String::from_utf8_lossy(&word)),
        Err(error) => println!("IT WAS RESET: {:?}", error.kind()),
    }
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"I listen still").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    // Until the host has read it: afterwards the machine ends as if its power were cut.
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn a_saved_machine_keeps_its_streams_and_one_restored_from_it_is_told_that_they_are_gone() {
    let mut machine = machine_with_guest("guest_that_is_saved", "");
    let snapshot = machine.path("snapshot");
    let goes_on = |machine: &Machine, mut child: Child, with: &str| {
        let mut said = String::new();
        connect_to_guest(machine, 808).read_to_string(&mut said).unwrap();
        assert_eq!(said, "I listen still", "{}", machine.console());
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert!(machine.console().contains(with), "{}", machine.console());
        std::fs::remove_file(machine.path("console.log")).unwrap();
    };
    let mut child = machine.start();
    let accepting = machine.connect(&mut child);
    ask(&accepting, &Request::Accept);
    let mut from_guest = accept(&accepting, &machine).1;
    let mut ready = [0; 5];
    from_guest.read_exact(&mut ready).unwrap();
    assert_eq!(ctl(&machine, &["pause"]), (Some(0), "done\n".into()));
    assert!(ctl(&machine, &["status"]).1.starts_with("paused"));
    assert_eq!(ctl(&machine, &["snapshot", snapshot.to_str().unwrap()]), (Some(0), "done\n".into()));
    assert_eq!(ctl(&machine, &["resume"]), (Some(0), "done\n".into()));
    from_guest.write_all(b"go on").unwrap();
    goes_on(&machine, child, "IT WENT ON: go on");

    let file = |name| snapshot.join(name);
    machine.config.start = Start::Restore { state: file("state"), memory: file("memory"), prefault: None };
    let mut child = machine.start();
    drop(machine.connect(&mut child)); // its sockets are there
    goes_on(&machine, child, "IT WAS RESET: ConnectionReset");
}
