//! The first thing every child does: tie its life to the launcher's, keep to its processors, then become the program it
//! was started for.
//!
//! The launcher starts itself as `launcher __child PARENT PROCESSORS PROGRAM ARGS...`. Between fork and exec only unsafe code
//! could run in the launcher; in a process of its own the same is plain code.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Pid, getppid};

use crate::failure::Code;
use crate::processors;

/// The first argument that makes a launcher a child.
pub const CHILD: &str = "__child";

/// Becomes the program named in `arguments` (parent's process id, the processors to keep to, program, its arguments); returns
/// only on failure.
pub fn run(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let parent = arguments
        .next()
        .and_then(|text| text.to_str()?.parse::<i32>().ok());
    let kept = arguments
        .next()
        .map(|text| processors::parse(&text.to_string_lossy()));
    let (Some(parent), Some(kept), Some(program)) = (parent, kept, arguments.next()) else {
        eprintln!("{CHILD} is for the launcher's own use");
        return ExitCode::from(Code::Bug as u8);
    };
    if let Err(error) = prctl::set_pdeathsig(Signal::SIGKILL) {
        eprintln!("the kernel does not tell of the launcher's death: {error}");
    }
    // The launcher may have died before the line above, and then no signal will ever come.
    if getppid().as_raw() != parent {
        return ExitCode::from(Code::Bug as u8);
    }
    // The launcher blocks the signals that it reads from a file; a blocked signal stays blocked across exec.
    if let Err(error) = SigSet::empty().thread_set_mask() {
        eprintln!("signals cannot be unblocked: {error}");
    }
    if let Err(error) = keep_to(&kept) {
        eprintln!(
            "this process may run anywhere, for the kernel does not keep it to its processors: {error}"
        );
    }
    let error = Command::new(&program).args(arguments).exec();
    eprintln!(
        "{} cannot be started: {error}; the text-generation-* programs belong into one folder",
        program.display()
    );
    ExitCode::from(Code::Bug as u8)
}

/// Threads that the program starts are kept to the same processors, and memory that they touch first comes from their node.
fn keep_to(processors: &[u32]) -> nix::Result<()> {
    if processors.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    for processor in processors {
        set.set(*processor as usize)?;
    }
    sched_setaffinity(Pid::from_raw(0), &set)
}
