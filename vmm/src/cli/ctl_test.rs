//! The client against a server that is played line by line.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use commonage_vmm::control::channel;
use commonage_vmm_api::ExitReason;

use super::*;

/// Takes one connection and plays `part`.
fn machine(socket: &Path, part: impl FnOnce(UnixStream) + Send + 'static) -> JoinHandle<()> {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || part(listener.accept().unwrap().0))
}

fn request(reader: &mut impl BufRead) -> Request {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

#[test]
fn stop_waits_for_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control");
    let exited = Response::Exited { reason: ExitReason::Halt, console: "bye".into() };
    let answer = exited.clone();
    let machine = machine(&socket, move |stream| {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        assert_eq!(request(&mut reader), Request::Wait);
        assert_eq!(request(&mut reader), Request::Stop { grace_ms: 3000 });
        for response in [Response::Stopping, answer] {
            channel::send(&stream, &response, &[], channel::Patience::Yes).unwrap();
        }
    });
    assert_eq!(execute(&socket, Command::Stop { grace: 3 }).unwrap(), Some(exited));
    machine.join().unwrap();
}

#[test]
fn a_snapshot_passes_two_files_and_names_them_when_they_are_whole() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control");
    let to = directory.path().join("some/snapshot");
    let seen = to.clone();
    let machine = machine(&socket, move |stream| {
        let (mut line, mut files) = ([0; 64], Vec::<OwnedFd>::new());
        let count = channel::receive(&stream, &mut line, &mut files).unwrap();
        assert_eq!(serde_json::from_slice::<Request>(&line[..count]).unwrap(), Request::Snapshot);
        for (fd, content) in files.into_iter().zip(["state", "memory"]) {
            File::from(fd).write_all(content.as_bytes()).unwrap();
        }
        assert!(!seen.join(STATE).exists());
        channel::send(&stream, &Response::Done, &[], channel::Patience::Yes).unwrap();
    });
    let command = Command::Snapshot { directory: to.clone() };
    assert_eq!(execute(&socket, command).unwrap(), Some(Response::Done));
    machine.join().unwrap();
    for name in [STATE, MEMORY] {
        assert_eq!(std::fs::read_to_string(to.join(name)).unwrap(), name);
    }
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 2);
}

#[test]
fn a_refusal_is_an_error_and_leaves_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control");
    let machine = machine(&socket, |stream| {
        assert_eq!(request(&mut BufReader::new(&stream)), Request::Snapshot);
        let refusal = Response::Error { message: "it runs; pause it first".into() };
        channel::send(&stream, &refusal, &[], channel::Patience::Yes).unwrap();
    });
    let to = directory.path().join("snapshot");
    let error = execute(&socket, Command::Snapshot { directory: to.clone() }).unwrap_err();
    assert_eq!(error.to_string(), "it runs; pause it first");
    machine.join().unwrap();
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 0);
}

#[test]
fn a_machine_that_is_gone_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control");
    let error = execute(&socket, Command::Status).unwrap_err().to_string();
    assert!(error.contains("is the machine running"), "{error}");
    let machine = machine(&socket, drop);
    let error = execute(&socket, Command::Wait).unwrap_err().to_string();
    assert!(error.contains("does not answer"), "{error}");
    machine.join().unwrap();
}
