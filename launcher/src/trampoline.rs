//! The first thing every child does: tie its life to the launcher's, then become the program it was started for.
//!
//! The launcher starts itself as `launcher __child PARENT PROGRAM ARGS...`. Between fork and exec only unsafe code
//! could run in the launcher; in a process of its own the same is plain code.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::getppid;

use crate::failure::Code;

/// The first argument that makes a launcher a child.
pub const CHILD: &str = "__child";

/// Becomes the program named in `arguments` (parent's process id, program, its arguments); returns only on failure.
pub fn run(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let parent = arguments
        .next()
        .and_then(|text| text.to_str()?.parse::<i32>().ok());
    let (Some(parent), Some(program)) = (parent, arguments.next()) else {
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
    let error = Command::new(&program).args(arguments).exec();
    eprintln!(
        "{} cannot be started: {error}; the text-generation-* programs belong into one folder",
        program.display()
    );
    ExitCode::from(Code::Bug as u8)
}
