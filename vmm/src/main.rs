//! `sliver-vmm`: one process, one sliver's virtual machine (`run`), a client of such a process's control socket
//! (`ctl`), and one of its guest's ports (`connect`).
#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

use clap::Parser;

/// Runs one virtual machine on KVM, and talks to one that runs.
///
/// A machine is one process: `sliver-vmm run` starts it and lasts as long as it does. With `--control SOCKET` it can be asked and told
/// things while it runs: `sliver-vmm ctl SOCKET …`.
#[derive(Parser)]
#[command(
    name = "sliver-vmm",
    version,
    after_help = "Example: sliver-vmm run --kernel vmlinux --initrd sliver-initrd --control /tmp/vm.sock\n\
                  then:    sliver-vmm ctl /tmp/vm.sock status"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Run(Box<cli::run::Arguments>),
    Ctl(cli::ctl::Arguments),
    Connect(cli::connect::Arguments),
}

fn main() -> ExitCode {
    if let Some(plain) = cli::run::Plain::recognise(std::env::args_os().skip(1)) {
        return plain.run();
    }
    match Arguments::parse().command {
        Command::Run(arguments) => cli::run::run(*arguments),
        Command::Ctl(arguments) => cli::ctl::run(arguments),
        Command::Connect(arguments) => cli::connect::run(arguments),
    }
}
