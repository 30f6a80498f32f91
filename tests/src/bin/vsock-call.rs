//! Runs inside a sliver: sends standard input to a vsock port of the host and prints what comes back. Tests use it to
//! say to the node manager what no well-behaved client would say.
#![forbid(unsafe_code)]

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

fn main() -> ExitCode {
    let port = std::env::args().nth(1).and_then(|p| p.parse().ok());
    let Some(port) = port else {
        eprintln!("usage: vsock-call PORT < REQUEST");
        return ExitCode::from(2);
    };
    match call(port) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vsock-call: host port {port}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn call(port: u32) -> std::io::Result<()> {
    let mut request = Vec::new();
    std::io::stdin().read_to_end(&mut request)?;
    let mut host = vsock::VsockStream::connect_with_cid_port(vsock::VMADDR_CID_HOST, port)?;
    let mut writer = host.try_clone()?;
    // In a thread of its own: a host that refuses a long body answers before it has read all of it.
    let sender = std::thread::spawn(move || writer.write_all(&request));
    let copied = std::io::copy(&mut host, &mut std::io::stdout());
    // The answer tells what became of the request.
    let _ = sender.join();
    match copied {
        // The host closes hard when bytes it refused are still on their way.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
        other => other.map(drop),
    }
}
