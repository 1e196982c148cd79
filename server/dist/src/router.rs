//! `text-generation-router`: the whole program lives in the crate `kvrun-router`.

use std::process::ExitCode;

fn main() -> ExitCode {
    kvrun_router::run_from_args()
}
