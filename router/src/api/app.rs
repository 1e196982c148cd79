//! What every handler shares.

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvrun_text::{ChatTemplates, TokenizerPool};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::auth::Keys;
use super::error::{ApiError, Kind};
use super::request::Source;
use crate::engine::Engine;
use crate::images::{Fetcher, ImageSettings};

/// Adapters that requests bring and that are fetched and loaded at the same time.
const LOADS: usize = 4;

/// How the HTTP side behaves; fixed for the life of the server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of the base model.
    pub model_id: String,
    /// Its revision on the hub, when it came from there.
    pub model_revision: Option<String>,
    /// Longest prompt in tokens; `None` leaves room for one token of answer.
    pub max_input_tokens: Option<u32>,
    /// Most answers under way or waiting.
    pub max_concurrent_requests: usize,
    /// Most answers that `best_of` picks from.
    pub max_best_of: usize,
    /// Most stop strings of a request.
    pub max_stop_sequences: usize,
    /// Most alternatives per token on TGI's routes.
    pub max_top_n_tokens: u32,
    /// Most answers of one request, over all its prompts.
    pub max_client_batch_size: usize,
    /// Largest body in bytes.
    pub payload_limit: usize,
    /// Tokenizer threads.
    pub validation_workers: usize,
    /// Longest time a request may take.
    pub request_timeout: Duration,
    /// Which images are taken.
    pub images: ImageSettings,
    /// Who may ask.
    pub keys: Keys,
    /// Who may load, pin and unload adapters, and do all else; when there are none, whoever may ask.
    pub admin_keys: Keys,
    /// Origins whose pages may ask; none by default.
    pub cors_origins: Vec<String>,
    /// The folder beneath which adapters may be loaded over HTTP.
    pub lora_dir: Option<PathBuf>,
    /// Whether adapters may be fetched from the hub over HTTP.
    pub allow_dynamic_lora: bool,
    /// Where an adapter that is not loaded is loaded from when its request does not say; nowhere when `None`.
    pub default_adapter_source: Option<Source>,
    /// The program that fetches them: `text-generation-server`.
    pub download_program: PathBuf,
}

/// The parts of a running server. Cheap to clone.
#[derive(Clone)]
pub struct App(Arc<Parts>);

/// What an [`App`] is made of.
pub struct Parts {
    /// Makes tokens.
    pub engine: Engine,
    /// Makes text.
    pub text: TokenizerPool,
    /// Makes prompts of conversations.
    pub templates: ChatTemplates,
    /// Gets images.
    pub fetcher: Fetcher,
    /// How to behave.
    pub settings: Settings,
    /// The metrics page.
    pub page: PrometheusHandle,
    /// How long answers take these days.
    pub pace: Pace,
    /// When it was put together, in seconds since 1970.
    pub started: u64,
    /// Turns at loading adapters that requests bring.
    pub loads: Semaphore,
    permits: Arc<Semaphore>,
    absent_since: Mutex<Option<Instant>>,
}

impl Deref for App {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl App {
    /// Puts a server together.
    pub fn new(
        engine: Engine,
        text: TokenizerPool,
        templates: ChatTemplates,
        mut settings: Settings,
    ) -> Self {
        // Folders beneath it are shown from there on, so it must be written as they are found.
        if let Some(root) = &mut settings.lora_dir
            && let Ok(found) = root.canonicalize()
        {
            *root = found;
        }
        Self(Arc::new(Parts {
            engine,
            text,
            templates,
            loads: Semaphore::new(LOADS),
            permits: Arc::new(Semaphore::new(settings.max_concurrent_requests)),
            absent_since: Mutex::new(None),
            fetcher: Fetcher::new(&settings.images),
            settings,
            page: crate::metrics::install(),
            pace: Pace::default(),
            started: super::openai::unix_seconds(),
        }))
    }

    /// Room for `count` answers, or an immediate 429 that says when to come back.
    pub fn permits(&self, count: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.permits
            .clone()
            .try_acquire_many_owned(count)
            .map_err(|_| {
                let most = self.settings.max_concurrent_requests;
                let message = format!(
                    "{most} requests are under way, which is the limit; retry after the time given"
                );
                ApiError::new(Kind::Overloaded, message).after(self.pace.wait(most))
            })
    }

    /// For how long no shard group has served, as far as those who asked could see.
    pub fn absence(&self, ready: bool) -> Duration {
        let mut since = self
            .absent_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if ready {
            *since = None;
            return Duration::ZERO;
        }
        since.get_or_insert_with(Instant::now).elapsed()
    }
}

/// The smoothed duration of answers.
#[derive(Debug, Default)]
pub struct Pace {
    mean_us: AtomicU64,
}

impl Pace {
    /// Takes the duration of a completed answer into account.
    pub fn record(&self, total: Duration) {
        let total = u64::try_from(total.as_micros()).unwrap_or(u64::MAX);
        // A lost update between two threads only smooths less.
        let mean = self.mean_us.load(Ordering::Relaxed);
        let next = if mean == 0 {
            total
        } else {
            mean / 8 * 7 + total / 8
        };
        self.mean_us.store(next, Ordering::Relaxed);
    }

    /// When one of `concurrent` answers is expected to be done: 1 to 60 s.
    fn wait(&self, concurrent: usize) -> Duration {
        let mean = self.mean_us.load(Ordering::Relaxed);
        let each = mean / (concurrent.max(1) as u64);
        Duration::from_micros(each).clamp(Duration::from_secs(1), Duration::from_secs(60))
    }
}
