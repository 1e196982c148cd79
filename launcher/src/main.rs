//! The launcher on its own, for the tests of this crate; `text-generation-launcher` is the same entry in `server/dist`.

use std::process::ExitCode;

fn main() -> ExitCode {
    kvrun_launcher::run_from_args()
}
