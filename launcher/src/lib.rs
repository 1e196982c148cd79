//! `text-generation-launcher`: checks, downloads, plans, then starts and keeps a router and its model processes.
//!
//! The order is fixed, so that whatever is wrong is said before it costs time: flags, address, files, memory, processes.
//! What lives here: flags, the plan, child processes. What never does: tokens, tensors, HTTP.

mod adapters;
mod args;
mod commands;
mod console;
mod control;
mod control_group;
mod failure;
mod inspection;
mod listen;
mod machine;
mod place;
mod plan;
mod process;
mod processors;
mod report;
mod resolve;
mod restart;
mod run_directory;
mod settings;
mod shard_group;
mod signals;
mod supervise;
mod table;
mod threads;
mod trampoline;

use std::io::Write;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use args::{Args, Environment};
use commands::Site;
use console::Console;
use failure::{Code, Failure};
use place::Place;
use process::Spawner;
use resolve::Work;
use run_directory::RunDirectory;
use settings::Settings;
use signals::Signals;
use supervise::{End, Tree};
use threads::Threads;

/// Runs the launcher with the process's arguments and returns its exit code.
pub fn run_from_args() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|word| word == trampoline::CHILD) {
        return trampoline::run(words);
    }
    let started = Instant::now();
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _unread = error.print();
            return ExitCode::from(if error.use_stderr() {
                Code::Config as u8
            } else {
                0
            });
        }
    };
    let console = Console::new(args.operation.json_output);
    let outcome = catch_unwind(AssertUnwindSafe(|| launch(args, &console, started)));
    match outcome.unwrap_or_else(|_| {
        Err(Failure::new(
            Code::Bug,
            "the launcher has a fault; see above",
        ))
    }) {
        Ok(End::Drained) => ExitCode::SUCCESS,
        // As a shell counts a process that a signal ended.
        Ok(End::Interrupted(signal)) => ExitCode::from(128 + signal as u8),
        Err(failure) => {
            match failure.code {
                Code::Stopped => console.info(&failure.message),
                _ => console.error(format!(
                    "{} (exit code {})",
                    failure.message, failure.code as u8
                )),
            }
            ExitCode::from(failure.code as u8)
        }
    }
}

fn launch(args: Args, console: &Console, started: Instant) -> Result<End, Failure> {
    let environment = Environment::read();
    let only_facts = args.operation.env && args.model.model_id.is_none();
    if args.operation.env {
        show(&report::render(&report::machine(&environment)));
    }
    if only_facts {
        return Ok(End::Drained);
    }
    let settings = Settings::check(args, &environment)?;
    let listener = match settings.operation.plan {
        true => None,
        false => Some(listen::bind(&settings.hostname, settings.port)?),
    };
    let signals = Signals::take_over()?;
    raise_file_limit();
    let (death, _alive) =
        std::io::pipe().map_err(|error| Failure::system("no pipe to the children", error))?;
    let spawner = Spawner {
        program: &environment.program,
        death: death.as_fd(),
        console,
    };

    let machine = report::machine(&environment);
    let place = Place::choose(&settings, &machine)?;
    let threads = Threads::choose(settings.num_threads, &machine.processors, &place)?;
    let work = Work {
        environment: &environment,
        settings: &settings,
        shards: place.shards(),
        spawner: &spawner,
        signals: &signals,
    };
    let served = work.served()?;
    let inspection = work.inspection(&served)?;
    let plan = plan::make(&settings, &machine, place, threads, &inspection)?;
    let table = table::render(&settings, &machine, &inspection, &plan);
    let site = Site {
        environment: &environment,
        settings: &settings,
        plan: &plan,
        served: &served,
        run: Path::new("RUN"),
    };
    let Some(listener) = listener else {
        show(&(table + &table::render_processes(site)));
        return Ok(End::Drained);
    };
    console.info(&table);
    let run = RunDirectory::create(&environment.runtime)?;
    let site = Site {
        run: run.path(),
        ..site
    };
    let tree = Tree {
        site,
        listener: &listener,
        spawner: &spawner,
        console,
        started,
    };
    supervise::run(&tree, &signals)
}

/// Prints an answer. A reader that has gone is no failure.
fn show(text: &str) {
    let _unread = std::io::stdout().write_all(text.as_bytes());
}

/// A server holds a file for every open request; the usual soft limit of 1024 is a relic of `select`.
fn raise_file_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _kept_as_it_is = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
