//! The engine: one task owns the scheduler and drives every shard in lockstep; requests talk to it through channels.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::request::{
    AdapterInfo, AdapterSpec, Event, LoadError, Refusal, Status, UnknownAdapter, ValidRequest,
};
pub use kvrun_scheduler::AdapterId;

/// What the engine tells the launcher.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// The first epoch serves.
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
    /// Most tokens of one step, all rows together.
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
    /// Adapters to load before the engine is ready.
    pub adapters: Vec<AdapterSpec>,
    /// Called from the engine's task; must not block.
    pub control: Arc<dyn Fn(Control) + Send + Sync>,
}

/// A handle on the engine's task. Cheap to clone.
#[derive(Clone)]
pub struct Engine {}

impl Engine {
    /// Starts the engine's task on the current runtime; it connects, serves and reconnects until drained.
    pub fn start(options: EngineOptions) -> Self {
        let _ = options;
        unimplemented!()
    }

    /// Queues a request; resolves at admission.
    pub async fn submit(&self, request: ValidRequest) -> Result<Answer, Refusal> {
        let _ = request;
        unimplemented!()
    }

    /// The adapter registry.
    pub fn adapters(&self) -> &Adapters {
        unimplemented!()
    }

    /// The engine's state right now.
    pub fn status(&self) -> Status {
        unimplemented!()
    }

    /// Waits for the first epoch that serves, with the adapters of the options loaded or failed.
    pub async fn ready(&self) {
        unimplemented!()
    }

    /// Refuses new work, waits up to `grace` for open answers, then fails the rest with `ShuttingDown`.
    pub async fn drain(&self, grace: Duration) {
        let _ = grace;
        unimplemented!()
    }
}

/// The tokens of one answer. Dropping it cancels the request within a step.
pub struct Answer {
    /// Unique within the router's life.
    pub id: u64,
}

impl Answer {
    /// The next event; `None` after the terminal one.
    pub async fn next(&mut self) -> Option<Event> {
        unimplemented!()
    }
}

/// The adapters of an engine.
#[derive(Clone)]
pub struct Adapters {}

impl Adapters {
    /// Finds a name that new requests may use.
    pub fn resolve(&self, name: &str) -> Result<AdapterId, UnknownAdapter> {
        Err(UnknownAdapter(name.to_owned()))
    }

    /// Every adapter, by name.
    pub fn list(&self) -> Vec<AdapterInfo> {
        unimplemented!()
    }

    /// One adapter by id, also while it drains.
    pub fn get(&self, id: AdapterId) -> Option<AdapterInfo> {
        let _ = id;
        unimplemented!()
    }

    /// Loads an adapter beside serving and waits for the outcome; again under the same name and folder is no error.
    pub async fn load(&self, spec: AdapterSpec) -> Result<AdapterInfo, LoadError> {
        let _ = spec;
        unimplemented!()
    }

    /// Refuses new requests for the adapter at once; its bytes go when the last running one ends.
    pub async fn unload(&self, name: &str) -> Result<AdapterInfo, UnknownAdapter> {
        Err(UnknownAdapter(name.to_owned()))
    }

    /// Exempts an adapter from eviction, or no longer.
    pub fn pin(&self, name: &str, pinned: bool) -> Result<AdapterInfo, UnknownAdapter> {
        let _ = pinned;
        Err(UnknownAdapter(name.to_owned()))
    }
}
