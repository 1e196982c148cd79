//! `kvrun-fake-shard`: the fake as a process, with the flags of a real shard, for tests of whole process trees.

use clap::Parser;
use kvrun_fake_shard::{Faults, Options, Watch, serve, service};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// Serve the shard protocol with made-up tokens.
#[derive(Parser)]
#[command(name = "kvrun-fake-shard", version)]
struct Args {
    /// `serve MODEL_DIR`, as for the real shard; the folder's config.json gives vocabulary and positions.
    words: Vec<String>,
    #[arg(long)]
    uds_path: PathBuf,
    #[arg(long, default_value_t = 0)]
    rank: u32,
    #[arg(long, default_value_t = 1)]
    world_size: u32,
    #[arg(long, default_value = "fake")]
    model_id: String,
    #[arg(long, default_value_t = 16)]
    page_tokens: u32,
    /// Pages it grants at most.
    #[arg(long, default_value_t = 4096)]
    pages: u64,
    #[arg(long, default_value_t = 32_000)]
    vocabulary: u32,
    /// Microseconds added to every step.
    #[arg(long, default_value_t = 0)]
    step_delay_us: u64,
    /// Accepted and without effect here.
    #[command(flatten)]
    real: RealArgs,
}

/// Flags that only mean something to a shard with a model.
#[derive(clap::Args)]
struct RealArgs {
    #[arg(long, hide = true)]
    rendezvous: Option<String>,
    #[arg(long, hide = true)]
    device: Option<String>,
    #[arg(long, hide = true)]
    cuda_memory_fraction: Option<String>,
    #[arg(long, hide = true)]
    cuda_graphs: Option<String>,
    #[arg(long, hide = true)]
    strict_kernels: bool,
    #[arg(long, hide = true)]
    attention: Option<String>,
    #[arg(long, hide = true)]
    dtype: Option<String>,
    #[arg(long, hide = true)]
    kv_cache_dtype: Option<String>,
    #[arg(long, hide = true)]
    quantize: Option<String>,
    #[arg(long, hide = true)]
    activation_dtype: Option<String>,
    #[arg(long, hide = true)]
    packed_cache: Option<String>,
    #[arg(long, hide = true)]
    num_threads: Option<String>,
    #[arg(long, hide = true)]
    kv_cache_bytes: Option<String>,
    #[arg(long, hide = true)]
    adapter_bytes: Option<String>,
    #[arg(long, hide = true)]
    json_output: bool,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvrun-fake-shard: {error}");
            ExitCode::from(70)
        }
    }
}

fn run(args: Args) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut options = Options {
        rank: args.rank,
        world: args.world_size,
        model_id: args.model_id,
        vocabulary: args.vocabulary,
        page_tokens: args.page_tokens,
        pages: args.pages,
        in_flight: 2,
        ..Default::default()
    };
    if let [_, folder, ..] = args.words.as_slice() {
        options = options.with_model(folder.as_ref())?;
    }
    let faults = Arc::new(Faults::default());
    faults.step_delay(Duration::from_micros(args.step_delay_us));
    let watch = Arc::new(Watch::default());
    let shard = service::Shard::new(
        Arc::new(options),
        faults,
        watch,
        Arc::new(|| std::process::abort()),
    );
    let _ = std::fs::remove_file(&args.uds_path);
    let listener = std::os::unix::net::UnixListener::bind(&args.uds_path)?;
    listener.set_nonblocking(true)?;
    watch_death_pipe();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(serve(listener, shard))
}

/// Exits when the pipe named by `KVRUN_DEATH_FD` closes, that is when the launcher is gone.
fn watch_death_pipe() {
    let Some(fd) = std::env::var("KVRUN_DEATH_FD")
        .ok()
        .and_then(|fd| fd.parse::<u32>().ok())
    else {
        return;
    };
    std::thread::spawn(move || {
        let mut byte = [0];
        // A socket cannot be opened again this way; then the death signal alone ends this process.
        let Ok(mut pipe) = std::fs::File::open(format!("/proc/self/fd/{fd}")) else {
            return;
        };
        let _ = std::io::Read::read(&mut pipe, &mut byte);
        std::process::exit(0);
    });
}
