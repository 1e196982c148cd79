//! A child process: started so that it cannot outlive the launcher, read from, signalled and reaped.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::commands::Invocation;
use crate::console::{Console, Tail};
use crate::failure::{Code, Failure};
use crate::{processors, trampoline};

/// The variable that holds the number of an open pipe whose other end only the launcher has: when it closes, the
/// launcher is gone.
pub const DEATH_FD: &str = "KVRUN_DEATH_FD";

/// What happens to a child's standard output; its standard error always goes to the console.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// To the console.
    Logged,
    /// To the launcher, which takes it with [`Process::take_output`].
    Taken,
}

/// A running child, the leader of its own process group.
pub struct Process {
    name: String,
    child: Child,
    tails: Vec<Tail>,
}

/// What every child is started with.
pub struct Spawner<'a> {
    /// The launcher's own program, which ties each child to the launcher before it becomes what it is to be.
    pub program: &'a Path,
    /// Read end of the pipe that closes when the launcher is gone.
    pub death: BorrowedFd<'a>,
    pub console: &'a Console,
}

impl Spawner<'_> {
    /// Starts a program that inherits the given files and no others.
    ///
    /// Only ever called on the main thread: the kernel takes the end of the thread that started a child for the end
    /// of its parent, and the files must not leak into a child that is started meanwhile.
    pub fn spawn(
        &self,
        name: &str,
        invocation: &Invocation,
        files: &[BorrowedFd<'_>],
        output: Output,
    ) -> Result<Process, Failure> {
        let failed = |error: &dyn std::fmt::Display| {
            Failure::system(format!("{name} cannot be started"), error)
        };
        let mut command = Command::new(self.program);
        command
            .arg(trampoline::CHILD)
            .arg(std::process::id().to_string())
            .arg(processors::list(&invocation.processors));
        command.arg(&invocation.program).args(&invocation.args);
        command
            .env_clear()
            .envs(invocation.variables.iter().map(|(key, value)| (key, value)));
        command.env(DEATH_FD, self.death.as_raw_fd().to_string());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);

        let inherited: Vec<_> = files.iter().chain([&self.death]).copied().collect();
        let child =
            with_open_files(&inherited, || command.spawn()).map_err(|error| failed(&error))?;
        let mut process = Process {
            name: name.to_owned(),
            child,
            tails: Vec::new(),
        };
        if let Some(pipe) = process.child.stderr.take() {
            process.tails.push(self.console.pump(name, pipe));
        }
        if let Some(pipe) = (output == Output::Logged)
            .then(|| process.child.stdout.take())
            .flatten()
        {
            process.tails.push(self.console.pump(name, pipe));
        }
        Ok(process)
    }
}

/// Runs `spawn` while a new process would inherit the files.
fn with_open_files<T>(
    files: &[BorrowedFd<'_>],
    spawn: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let set = |flag| {
        files
            .iter()
            .try_for_each(|file| fcntl(file.as_fd(), FcntlArg::F_SETFD(flag)).map(drop))
    };
    set(FdFlag::empty())?;
    let outcome = spawn();
    set(FdFlag::FD_CLOEXEC)?;
    outcome
}

impl Process {
    /// Its name in the log.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Its standard output, if that is to be read by the launcher.
    pub fn take_output(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Sends a signal to the process and to whatever it started.
    pub fn signal(&self, signal: Signal) {
        // It may have ended since; its group's number stays taken until it is reaped, so no stranger is hit.
        let _ended = killpg(self.pid(), signal);
    }

    /// How it ended, if it has. Whatever it started ends with it.
    pub fn reap(&mut self) -> Option<Ending> {
        let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
        match waitid(Id::Pid(self.pid()), peek) {
            Ok(WaitStatus::StillAlive) => return None,
            // Before the reaping, while the group's number is still its own.
            Ok(_) => self.signal(Signal::SIGKILL),
            Err(_) => {}
        }
        match self.child.wait() {
            Ok(status) => Some(Ending(status)),
            Err(_) => None,
        }
    }

    /// Its last lines, for the report of its death.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        self.tails
            .iter()
            .flat_map(|tail| tail.last(count))
            .collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal(Signal::SIGKILL);
            let _status = self.child.wait();
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ending(ExitStatus);

impl Ending {
    /// Whether it ended by itself, with nothing wrong.
    pub fn is_success(self) -> bool {
        self.0.success()
    }

    /// The meaning of its exit code, if no restart can mend it.
    pub fn permanent(self) -> Option<Code> {
        Code::permanent(self.0.code()?)
    }

    /// For a log line.
    pub fn describe(self) -> String {
        match (self.0.code(), self.0.signal()) {
            (Some(code), _) => format!("ended with exit code {code}"),
            (None, Some(number)) => {
                let name = Signal::try_from(number).map_or("unknown", Signal::as_str);
                let hint = if number == Signal::SIGKILL as i32 {
                    "; the kernel does this when memory runs out"
                } else {
                    ""
                };
                format!("was ended by signal {number} ({name}){hint}")
            }
            (None, None) => "ended".to_owned(),
        }
    }
}
