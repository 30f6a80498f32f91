//! A process behind the walls: forked, so that it has one thread, and as process 1 of a pid namespace of its own, as the node manager makes machines'
//! processes. It then runs one function, which has been taken over by the worst tenant there is.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use commonage_isolation::void::Void;
use commonage_vmm::jail::Jail;
use commonage_vmm::seccomp::Filter;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Exit status of a prisoner whose walls could not be built, and of one that panicked.
const NO_WALLS: i32 = 255;
const PANICKED: i32 = 254;

/// What a prisoner is held by.
#[derive(Clone, Copy)]
pub struct Walls<'a> {
    /// The jail and the void to make it in.
    pub jail: Option<(Jail, Option<&'a Void>)>,
    /// The system calls that are left.
    pub filter: Option<&'a Filter>,
}

impl Walls<'_> {
    /// Builds them around the calling process.
    pub fn build(&self) -> io::Result<()> {
        if let Some((jail, void)) = &self.jail {
            jail.enter(*void).map_err(io::Error::other)?;
        }
        self.filter.map_or(Ok(()), Filter::install).map_err(io::Error::other)
    }
}

/// How a prisoner ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Fate {
    /// It got what it wanted.
    Free,
    /// It was told this error number.
    Refused(i32),
    /// This signal ended it.
    Killed(i32),
}

/// A prisoner's process; killed and waited for when dropped.
pub struct Prisoner {
    /// Its id in the caller's pid namespace.
    pub pid: libc::pid_t,
    ended: bool,
}

impl Prisoner {
    /// Forks. The child runs `life`, whose error number is its exit status.
    pub fn born(own_pids: bool, life: impl FnOnce() -> Result<(), i32> + Send) -> Self {
        let birth = || {
            if own_pids {
                // SAFETY: no descriptors are unshared, only where this thread's future children are counted.
                unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.unwrap();
            }
            // SAFETY: the child has this one thread. It goes on with what the C library keeps usable after a fork (memory), never returns
            // to the test runner, whose locks other threads may have held, and writes with system calls only.
            match unsafe { libc::fork() } {
                0 => {
                    let status = match catch_unwind(AssertUnwindSafe(life)) {
                        Ok(result) => result.err().unwrap_or(0),
                        Err(_) => PANICKED,
                    };
                    // SAFETY: ends the process without running anything of the runner's.
                    unsafe { libc::_exit(status) }
                }
                pid => pid,
            }
        };
        let pid = std::thread::scope(|scope| scope.spawn(birth).join().unwrap());
        assert!(pid > 0, "fork: {}", io::Error::last_os_error());
        Self { pid, ended: false }
    }

    /// Waits for its end.
    pub fn fate(mut self) -> Fate {
        let status = self.wait();
        if libc::WIFSIGNALED(status) {
            return Fate::Killed(libc::WTERMSIG(status));
        }
        match libc::WEXITSTATUS(status) {
            0 => Fate::Free,
            NO_WALLS => panic!("its walls could not be built (its standard error tells why)"),
            PANICKED => panic!("it panicked"),
            errno => Fate::Refused(errno),
        }
    }

    fn wait(&mut self) -> i32 {
        let mut status = 0;
        // SAFETY: `status` is valid for the call; the process is this one's child and not waited for yet.
        let pid = unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        assert_eq!(pid, self.pid);
        self.ended = true;
        status
    }
}

impl Drop for Prisoner {
    fn drop(&mut self) {
        if !self.ended {
            // SAFETY: it is a child that was not waited for, so the number is its own.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
            self.wait();
        }
    }
}

/// Runs `attempt` behind `walls`.
pub fn attempt(walls: Walls<'_>, attempt: impl FnOnce() -> Result<(), i32> + Send) -> Fate {
    let life = || {
        if let Err(error) = walls.build() {
            report(&format!("no walls: {error}\n"));
            return Err(NO_WALLS);
        }
        attempt()
    };
    Prisoner::born(walls.jail.is_some(), life).fate()
}

/// A prisoner that has done nothing and does nothing until it is dropped.
pub fn neighbour(walls: Walls<'_>) -> Prisoner {
    let (ready, told) = rustix::pipe::pipe().unwrap();
    let life = || {
        if let Err(error) = walls.build() {
            report(&format!("no walls: {error}\n"));
            return Err(NO_WALLS);
        }
        tell(told);
        forever()
    };
    let prisoner = Prisoner::born(walls.jail.is_some(), life);
    assert_eq!(heard(ready), 1, "it ended early");
    prisoner
}

/// Does nothing, for ever, by a call that all filters allow.
pub fn forever() -> ! {
    let word = std::sync::atomic::AtomicU32::new(0);
    loop {
        // SAFETY: the word is valid; nobody wakes it.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT,
                0,
                std::ptr::null::<libc::timespec>(),
            )
        };
    }
}

/// Says "ready", once, and keeps the pipe closed afterwards.
pub fn tell(pipe: OwnedFd) {
    File::from(pipe).write_all(b"!").unwrap();
}

/// How many bytes come until every writer is gone or one came.
pub fn heard(pipe: OwnedFd) -> usize {
    File::from(pipe).read(&mut [0; 1]).unwrap()
}

fn report(text: &str) {
    // SAFETY: the buffer is valid. Not `eprintln`: the runner's lock may be held by a thread that this process does not have.
    unsafe { libc::write(io::stderr().as_raw_fd(), text.as_ptr().cast(), text.len()) };
}
