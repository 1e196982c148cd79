//! `text-generation-benchmark`: the whole program lives in the crate `kvrun-benchmark`.

use std::process::ExitCode;

fn main() -> ExitCode {
    kvrun_benchmark::run_from_args()
}
