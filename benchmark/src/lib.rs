//! `text-generation-benchmark`: asks a running server as its users do, and says how fast it answers.
//!
//! What lives here: load, samples, figures and their picture. What never does: anything of the server's own code.

mod args;
mod client;
mod load;
mod prompts;
mod report;
mod stats;
mod ui;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use tokio::sync::mpsc;

use args::Args;
use client::Failed;
use load::Update;
use stats::Figures;

/// A wrong flag, as in every program of the tree.
const EXIT_CONFIG: u8 = 10;
/// The server could not be reached, or failed every request.
const EXIT_FAILED: u8 = 1;

/// Runs the benchmark with the process's arguments and returns its exit code.
pub fn run_from_args() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _unread = error.print();
            return ExitCode::from(if error.use_stderr() { EXIT_CONFIG } else { 0 });
        }
    };
    if !args.url.starts_with("http://") {
        eprintln!(
            "--url {} does not begin with http://; put a proxy before a server that speaks TLS only",
            args.url
        );
        return ExitCode::from(EXIT_CONFIG);
    }
    match measure(&args) {
        Ok(figures) => {
            let _unread = std::io::stdout()
                .write_all(report::render(args.output, &args, &figures).as_bytes());
            let failed = figures.iter().find_map(|figures| figures.reason.as_ref());
            if let Some(reason) = failed {
                eprintln!("some requests failed, the first one with: {reason}");
            }
            ExitCode::from(if figures.iter().any(|figures| figures.requests > 0) {
                0
            } else {
                EXIT_FAILED
            })
        }
        Err(failed) => {
            eprintln!("{} cannot be measured: {failed}", args.url);
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn measure(args: &Args) -> Result<Vec<Figures>, Failed> {
    let runtime = tokio::runtime::Runtime::new().map_err(|error| Failed(error.to_string()))?;
    let (updates, received) = mpsc::unbounded_channel();
    if args.no_tui || !std::io::stdout().is_terminal() {
        let lines = runtime.spawn(say(received));
        let figures = runtime.block_on(load::run(args, &updates));
        drop(updates);
        let _said = runtime.block_on(lines);
        return figures;
    }
    let load = {
        let args = args.clone();
        runtime.spawn(async move { load::run(&args, &updates).await })
    };
    let figures = ui::show(args, received).map_err(|error| Failed(error.to_string()))?;
    if load.is_finished() {
        return runtime
            .block_on(load)
            .map_err(|error| Failed(error.to_string()))?;
    }
    // Left early: the requests under way are dropped with the runtime.
    runtime.shutdown_background();
    Ok(figures)
}

/// One line for each measurement, on standard error, so that the result alone is on standard output.
async fn say(mut updates: mpsc::UnboundedReceiver<Update>) {
    while let Some(update) = updates.recv().await {
        if let Update::Measured(figures) = update {
            eprintln!(
                "batch {:>4}: {:>8.1} tokens/s, first token {:.1} ms, between tokens {:.2} ms (p50)",
                figures.batch_size,
                figures.token_rate(),
                figures.first_token.p50,
                figures.between_tokens.p50,
            );
        }
    }
}
