//! `text-generation-launcher`: the whole program lives in the crate `kvrun-launcher`.

use std::process::ExitCode;

fn main() -> ExitCode {
    kvrun_launcher::run_from_args()
}
