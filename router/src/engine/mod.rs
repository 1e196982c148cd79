//! The engine: one task owns the scheduler and sends every shard the same steps; requests talk to it through channels.

mod adapters;
mod calls;
mod commands;
mod drive;
mod meters;
mod overlap;
mod shards;
mod tell;
mod watchdog;
mod wire;

pub use adapters::Adapters;
pub use kvrun_scheduler::AdapterId;
pub use overlap::Overlap;

use std::hash::{BuildHasher, RandomState};
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use crate::request::{
    AdapterInfo, AdapterSpec, Event, LoadError, Refusal, Status, UnknownAdapter, ValidRequest,
};
use drive::Driver;

/// What the engine tells the launcher.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// A new epoch serves, so the shards' next death is not one in a row.
    Ready,
    /// The shards stopped answering; whoever owns them must restart the group.
    ShardHung {
        /// The epoch that hangs.
        epoch: u64,
        /// What was waited for, and how long.
        reason: String,
    },
}

/// How to run an engine.
#[derive(Clone)]
pub struct EngineOptions {
    /// One unix socket per rank, rank 0 first.
    pub sockets: Vec<PathBuf>,
    /// Most tokens of one step, all rows together; 0 = what the model needs.
    pub step_tokens: u32,
    /// Most rows of one step.
    pub step_rows: u32,
    /// Most tokens of one sequence; 0 = what model and pool allow.
    pub max_total_tokens: u32,
    /// Tokens the page pool shall hold; 0 = as many as the shards' memory budget allows.
    pub pool_tokens: u64,
    /// Bytes set aside for adapters; 0 = the shard's default.
    pub adapter_bytes: u64,
    /// Most requests waiting for their first row.
    pub queue_requests: u32,
    /// Most prompt and answer tokens of the requests waiting; 0 = four times the pool.
    pub queue_tokens: u64,
    /// Whether tenants may share cached prefixes with each other.
    pub share_prefixes: bool,
    /// Most tokens of a sequence that one step computes on a guess; 0 = none.
    pub speculate: u32,
    /// Whether a step is sent while another is in flight.
    pub overlap: Overlap,
    /// Adapters to load before the engine is ready, in this order as far as there is room.
    pub adapters: Vec<AdapterSpec>,
    /// Called from the engine's task; must not block.
    pub control: Arc<dyn Fn(Control) + Send + Sync>,
}

/// What handles ask of the engine's task.
enum Command {
    Submit(
        Box<ValidRequest>,
        u64,
        oneshot::Sender<Result<Admitted, Refusal>>,
    ),
    Cancel(u64),
    Load(AdapterSpec, oneshot::Sender<Result<AdapterInfo, LoadError>>),
    Unload(String, oneshot::Sender<Result<AdapterInfo, UnknownAdapter>>),
    Pin(AdapterId, bool),
    /// Refuse new work; answered when no request is open.
    Drain(oneshot::Sender<()>),
    /// Fail what is open.
    Abort,
}

/// An admitted request's id and its events. The channel holds at most the answer the request asked for.
struct Admitted {
    id: u64,
    events: mpsc::UnboundedReceiver<Event>,
}

/// What the task shows to its handles.
#[derive(Default)]
struct Window {
    status: Status,
    /// Since when work exists and no outcome came.
    waiting_since: Option<Instant>,
}

type Shown = Arc<Mutex<Window>>;

/// A handle on the engine's task. Cheap to clone; the task ends when the last handle and answer are dropped.
#[derive(Clone)]
pub struct Engine {
    commands: mpsc::UnboundedSender<Command>,
    adapters: Adapters,
    shown: Shown,
    ready: watch::Receiver<bool>,
    /// Keyed by chance, so that nobody can make two requests that look alike.
    fingerprints: RandomState,
}

impl Engine {
    /// Starts the engine's task on a thread of its own; it connects, serves and reconnects until its handles are gone.
    ///
    /// A thread, because the time between an outcome and the next step is the only time that every stream waits for.
    /// A panic there ends the process with exit code 70: nothing could be served without it.
    pub fn start(options: EngineOptions) -> Self {
        let (commands, inbox) = mpsc::unbounded_channel();
        let (announce, ready) = watch::channel(false);
        let adapters = Adapters::new(commands.clone());
        let shown = Shown::default();
        let driver = Driver::new(options, inbox, adapters.registry(), shown.clone(), announce);
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            match runtime {
                Ok(runtime) => runtime.block_on(driver.run()),
                Err(error) => tracing::error!(%error, "the engine has no event loop"),
            }
        };
        let guarded = move || {
            if std::panic::catch_unwind(AssertUnwindSafe(run)).is_err() {
                tracing::error!("the engine failed; this is a bug");
                std::process::exit(70);
            }
        };
        if let Err(error) = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(guarded)
        {
            tracing::error!(%error, "no thread for the engine");
        }
        Self {
            commands,
            adapters,
            shown,
            ready,
            fingerprints: RandomState::new(),
        }
    }

    /// Queues a request; resolves at admission. Dropping the future before that withdraws it.
    pub async fn submit(&self, request: ValidRequest) -> Result<Answer, Refusal> {
        let (reply, answered) = oneshot::channel();
        let fingerprint = self.fingerprints.hash_one(request.question());
        let command = Command::Submit(Box::new(request), fingerprint, reply);
        self.commands.send(command).map_err(|_| Refusal::Draining)?;
        let admitted = answered.await.map_err(|_| Refusal::Draining)??;
        Ok(Answer {
            id: admitted.id,
            events: admitted.events,
            commands: Some(self.commands.clone()),
        })
    }

    /// The adapter registry.
    pub fn adapters(&self) -> &Adapters {
        &self.adapters
    }

    /// The engine's state right now.
    pub fn status(&self) -> Status {
        let window = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let mut status = window.status.clone();
        status.stalled = window
            .waiting_since
            .map(|since| since.elapsed())
            .unwrap_or_default();
        status
    }

    /// Waits for the first epoch that serves, with the adapters of the options loaded, failed or left for later.
    pub async fn ready(&self) {
        // An error means that the task is gone; then nothing will ever be ready and status() says so.
        let _ = self.ready.clone().wait_for(|ready| *ready).await;
    }

    /// Refuses new work, waits up to `grace` for open answers, then fails the rest with `ShuttingDown`.
    pub async fn drain(&self, grace: Duration) {
        let (done, mut drained) = oneshot::channel();
        if self.commands.send(Command::Drain(done)).is_err() {
            return;
        }
        if tokio::time::timeout(grace, &mut drained).await.is_err() {
            let _ = self.commands.send(Command::Abort);
            let _ = drained.await;
        }
    }
}

/// The tokens of one answer. Dropping it cancels the request within a step.
pub struct Answer {
    /// Unique within the router's life.
    pub id: u64,
    events: mpsc::UnboundedReceiver<Event>,
    /// Taken by the terminal event: from then on there is nothing to cancel.
    commands: Option<mpsc::UnboundedSender<Command>>,
}

impl Answer {
    /// The next event; `None` after the terminal one.
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().await;
        if matches!(
            event,
            None | Some(Event::Finished(_)) | Some(Event::Failed(_))
        ) {
            self.commands = None;
        }
        event
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(commands) = &self.commands {
            let _ = commands.send(Command::Cancel(self.id));
        }
    }
}
