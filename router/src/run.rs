//! The life of the process: flags, listeners, engine, drain.

use std::ffi::OsString;
use std::future::Future;
use std::io::{self, IsTerminal, Read};
use std::net::{SocketAddr, TcpListener as StdListener};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use kvrun_text::{ChatTemplates, Tokenizer, TokenizerPool};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::api::auth::Keys;
use crate::api::{self, App};
use crate::args::Args;
use crate::engine::{Engine, EngineOptions};
use crate::{control, inherited, server};

/// Time for connections to close once every answer is done.
const CLOSING: Duration = Duration::from_secs(5);
/// Texts that may wait for a tokenizer thread.
const TOKENIZER_QUEUE: usize = 256;
/// Longest time that one text may wait for such a thread, and then be worked on.
const TOKENIZING: Duration = Duration::from_secs(2);

/// The process cannot go on; the code says why to whoever started it.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct Fatal {
    code: u8,
    message: String,
}

impl Fatal {
    fn new(code: u8, message: impl ToString) -> Self {
        Self {
            code,
            message: message.to_string(),
        }
    }

    fn config(message: impl ToString) -> Self {
        Self::new(10, message)
    }

    fn files(message: impl ToString) -> Self {
        Self::new(11, message)
    }
}

/// Open listeners.
pub struct Listeners {
    /// For the API.
    pub http: TcpListener,
    /// For /metrics alone, if wanted.
    pub metrics: Option<TcpListener>,
}

/// Serves until `shutdown` is done, then drains: new requests get 503, open answers have `grace` to finish.
pub async fn run(
    listeners: Listeners,
    app: App,
    grace: Duration,
    shutdown: impl Future<Output = ()>,
) {
    let stop = CancellationToken::new();
    let mut serving = tokio::task::JoinSet::new();
    serving.spawn(server::serve(
        listeners.http,
        api::routes(&app),
        stop.clone(),
    ));
    if let Some(listener) = listeners.metrics {
        serving.spawn(server::serve(
            listener,
            api::metrics_routes(&app),
            stop.clone(),
        ));
    }
    shutdown.await;
    tracing::info!(grace_seconds = grace.as_secs(), "draining");
    app.engine.drain(grace).await;
    stop.cancel();
    let closed = async { while serving.join_next().await.is_some() {} };
    if tokio::time::timeout(CLOSING, closed).await.is_err() {
        tracing::warn!("some connections did not close in time");
    }
}

/// The whole program `text-generation-router`.
pub fn run_from_args() -> ExitCode {
    ExitCode::from(run_with(std::env::args_os()))
}

/// The same with other arguments, the program's name first; gives the exit code.
pub fn run_with(args: impl IntoIterator<Item = OsString>) -> u8 {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            // Where even this cannot be written, the code has to do.
            let _ = error.print();
            return if error.use_stderr() { 10 } else { 0 };
        }
    };
    if let Err(error) = log(&args) {
        eprintln!("{error}");
        return error.code;
    }
    match start(args) {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!(exit_code = error.code, "{error}");
            error.code
        }
    }
}

fn log(args: &Args) -> Result<(), Fatal> {
    let filter = tracing_subscriber::EnvFilter::try_new(&args.log_level).map_err(|error| {
        Fatal::config(format!(
            "LOG_LEVEL `{}` is not understood: {error}",
            args.log_level
        ))
    })?;
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    let set = if args.json_output {
        logs.json().try_init()
    } else {
        logs.try_init()
    };
    set.map_err(|error| Fatal::new(70, error))
}

fn start(args: Args) -> Result<(), Fatal> {
    let keys = args.keys().map_err(Fatal::config)?;
    let admin_keys = args.admin_keys().map_err(Fatal::config)?;
    let adapters = args.adapters().map_err(Fatal::config)?;
    let (http, metrics) = bind(&args, &keys)?;
    let control = match args.control_fd {
        Some(number) => Some(inherited::take(number).map_err(Fatal::config)?),
        None => None,
    };
    if let Some(number) = args.death_fd {
        end_with(inherited::take(number).map_err(Fatal::config)?)
            .map_err(|error| Fatal::new(70, error))?;
    }
    for flag in args.obsolete() {
        tracing::info!(flag, "this flag has no effect any more; it can be left out");
    }
    let tokenizer = Tokenizer::load(&args.tokenizer_name).map_err(Fatal::files)?;
    let templates = ChatTemplates::load(&args.tokenizer_name).map_err(Fatal::files)?;
    let workers = args.validation_workers;
    let text = TokenizerPool::start(tokenizer, workers, TOKENIZER_QUEUE, TOKENIZING)
        .map_err(|error| Fatal::new(70, error))?;
    let options = EngineOptions {
        sockets: args.sockets(),
        step_tokens: args.max_batch_prefill_tokens.unwrap_or(0),
        step_rows: args.max_batch_size,
        max_total_tokens: args.max_total_tokens.unwrap_or(0),
        pool_tokens: args.max_batch_total_tokens.unwrap_or(0),
        adapter_bytes: 0,
        queue_requests: args.max_concurrent_requests.max(1),
        queue_tokens: 0,
        share_prefixes: args.share_prefix_cache,
        speculate: args.speculate,
        overlap: args.overlap,
        adapters,
        control: control::channel(control),
    };
    let settings = args.settings(keys, admin_keys);
    let grace = Duration::from_secs(args.graceful_termination_timeout);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Fatal::new(70, error))?;
    runtime.block_on(async {
        let bug = |error: io::Error| Fatal::new(70, error);
        let listeners = Listeners {
            http: TcpListener::from_std(http).map_err(bug)?,
            metrics: metrics
                .map(TcpListener::from_std)
                .transpose()
                .map_err(bug)?,
        };
        let mut terminate = signal(SignalKind::terminate()).map_err(bug)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(bug)?;
        // The page must exist before the engine counts anything.
        crate::metrics::install();
        let app = App::new(Engine::start(options), text, templates, settings);
        let (stop, engine) = (CancellationToken::new(), app.engine.clone());
        let stopped = stop.clone().cancelled_owned();
        let watch = tokio::spawn(async move {
            let mut next = async || {
                tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            };
            next().await;
            stop.cancel();
            next().await;
            tracing::warn!("second signal: open answers end now");
            engine.drain(Duration::ZERO).await;
        });
        run(listeners, app, grace, stopped).await;
        watch.abort();
        Ok(())
    })
}

fn bind(args: &Args, keys: &Keys) -> Result<(StdListener, Option<StdListener>), Fatal> {
    let http = match args.http_fd {
        Some(number) => StdListener::from(inherited::take(number).map_err(Fatal::config)?),
        None => listen(args.address(keys).map_err(Fatal::config)?)?,
    };
    let address = http.local_addr().map_err(Fatal::config)?;
    let metrics = match args.prometheus_port {
        Some(port) => Some(listen(SocketAddr::new(address.ip(), port))?),
        None => None,
    };
    for listener in std::iter::once(&http).chain(&metrics) {
        listener
            .set_nonblocking(true)
            .map_err(|error| Fatal::new(70, error))?;
    }
    tracing::info!(%address, "listening");
    Ok((http, metrics))
}

fn listen(address: SocketAddr) -> Result<StdListener, Fatal> {
    StdListener::bind(address).map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::AddrInUse => "; stop the other server or pick another --port",
            _ => "",
        };
        Fatal::new(13, format!("cannot listen on {address}: {error}{advice}"))
    })
}

/// Ends the process when the other end of `pipe` closes: nothing may outlive the launcher.
fn end_with(pipe: std::os::fd::OwnedFd) -> io::Result<()> {
    let mut pipe = std::fs::File::from(pipe);
    std::thread::Builder::new()
        .name("launcher-watch".to_owned())
        .spawn(move || {
            let mut byte = [0];
            while !matches!(pipe.read(&mut byte), Ok(0)) {}
            std::process::exit(70);
        })?;
    Ok(())
}
