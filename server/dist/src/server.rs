//! `text-generation-server`: becomes `python -m kvrun` with the arguments it was given.
//!
//! The interpreter is the one installed beside this program, so that the server runs in the environment it was
//! installed into, activated or not. Because this process *becomes* Python, its id, its parent and its open files stay.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The environment is broken; nothing that the arguments could change (`sysexits.h`: internal software error).
const EXIT_BUG: u8 = 70;

fn main() -> ExitCode {
    let program = std::env::current_exe().unwrap_or_default();
    let beside = interpreter_beside(&program);
    let python = beside.clone().unwrap_or_else(|| PathBuf::from("python3"));
    let error = Command::new(&python)
        .args(["-m", "kvrun"])
        .args(std::env::args_os().skip(1))
        .exec();
    let place = match beside {
        Some(_) => String::new(),
        None => format!(
            " (there is none in {}, so python3 of PATH was tried)",
            program.parent().unwrap_or(Path::new("/")).display()
        ),
    };
    eprintln!(
        "text-generation-server needs a Python interpreter with the package kvrun; found {}{place}, which cannot be \
         started: {error}. Install the wheel into a virtual environment and call the program of that environment.",
        python.display(),
    );
    ExitCode::from(EXIT_BUG)
}

/// The interpreter in the folder of `program`, under one of the names that virtual environments use.
fn interpreter_beside(program: &Path) -> Option<PathBuf> {
    let folder = program.parent()?;
    ["python", "python3"]
        .map(OsStr::new)
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.exists())
}
