//! The types that cross the border between the HTTP side and the engine. No parsing and no scheduling lives here.

use std::fmt;
use std::hash::Hash;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use kvrun_scheduler::AdapterId;

/// A request that passed validation; nothing after this point can fail on client input.
#[derive(Debug, Clone, Default)]
pub struct ValidRequest {
    /// Token ids of the prompt, at least one, each below the width of the logits. For a model with an encoder, the id
    /// that answers follow.
    pub prompt: Arc<[u32]>,
    /// What the encoder reads; empty for models without one.
    pub source: Arc<[u32]>,
    /// Images of the prompt, in the order of their places.
    pub images: Arc<[Image]>,
    /// Tokens that the model reads beside the sequence: the source, or what it is to see of the images.
    pub memory_tokens: u32,
    /// The adapter to apply, from [`crate::engine::Adapters::resolve`]; `None` is the base model.
    pub adapter: Option<AdapterId>,
    /// How tokens are chosen; the seed is always set.
    pub sampling: kvrun_proto::Sampling,
    /// Most tokens of the answer, at least one.
    pub max_new_tokens: u32,
    /// Ids that end the answer; empty when the client asked to ignore them.
    pub end_tokens: Arc<[u32]>,
    /// Whose share of the machine this spends: a digest of the API key, or "anonymous".
    pub tenant: Arc<str>,
    /// After this moment the answer fails with [`Failure::Deadline`].
    pub deadline: Option<Instant>,
    /// Whether pages of earlier prompts may be shared; false when every prompt token has to be computed.
    pub reuse_prefix: bool,
}

impl ValidRequest {
    /// What it asks of the model, whoever asks and whatever the seed: equal for requests that are computed alike.
    pub(crate) fn question(&self) -> impl Hash + '_ {
        let unseeded = kvrun_proto::Sampling {
            seed: 0,
            ..self.sampling.clone()
        };
        let images: Vec<_> = self
            .images
            .iter()
            .map(|image| (image.at, image.digest))
            .collect();
        let sampling = format!("{unseeded:?}");
        (&self.prompt, &self.source, images, self.adapter, sampling)
    }

    /// The ids that the client's prompt became.
    pub fn input(&self) -> &Arc<[u32]> {
        match self.source.is_empty() {
            true => &self.prompt,
            false => &self.source,
        }
    }
}

/// An image in a prompt.
#[derive(Clone)]
pub struct Image {
    /// The file as it came.
    pub data: Arc<[u8]>,
    /// SHA-256 of it.
    pub digest: [u8; 32],
    /// Index of the first id that it became.
    pub at: u32,
    /// How many ids it became.
    pub tokens: u32,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bytes, end) = (self.data.len(), self.at + self.tokens);
        write!(f, "Image({bytes} bytes at {}..{end})", self.at)
    }
}

/// One token of an answer, or of a prompt whose log-probabilities were asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenInfo {
    /// The token's id.
    pub id: u32,
    /// Its log-probability before temperature and truncation.
    pub logprob: f32,
    /// Alternatives, most likely first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// What happens to an admitted request, in order; exactly one terminal event comes last.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The first row of the request was scheduled.
    Started {
        /// Time from admission until then.
        queued: Duration,
        /// Prompt tokens found in the prefix cache.
        cached_tokens: u32,
    },
    /// Log-probabilities of the prompt tokens after the first; once, before the first token.
    Prompt(Vec<TokenInfo>),
    /// The next token of the answer, end token included.
    Token(TokenInfo),
    /// The answer is complete. Terminal.
    Finished(Finish),
    /// The answer ended early. Terminal.
    Failed(Failure),
}

/// Why an answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// It has `max_new_tokens` tokens.
    Length,
    /// Its last token is one of `end_tokens`.
    EndToken,
}

/// Why an admitted request ended without being complete.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The shard failed this row and only this row (424 `generation`).
    #[error("{0}")]
    Row(String),
    /// One of its images cannot be shown to the model (422).
    #[error("{0}")]
    Image(String),
    /// Its deadline passed (504 `deadline`).
    #[error(
        "the request's deadline passed before the answer was complete; allow more time or ask for fewer tokens"
    )]
    Deadline,
    /// The server's grace period ended (503).
    #[error("the server is shutting down; send the request again")]
    ShuttingDown,
    /// Its adapter could not be loaded (424).
    #[error("{0}")]
    Adapter(String),
    /// Replays did not bring it through (424).
    #[error("{0}")]
    Unavailable(String),
    /// The model process died each time it computed it, or one that asks the same (424).
    #[error(
        "the model process died each time it computed this request; it is not tried again, and the same is refused for \
         a while"
    )]
    Deadly,
}

/// Why a request was not admitted; nothing was computed for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The queue is full (429 with `Retry-After`).
    #[error("the queue is full; retry after {} s", retry_after.as_secs())]
    Overloaded {
        /// When room is expected.
        retry_after: Duration,
    },
    /// The sequence can never fit (422).
    #[error(
        "prompt and answer take {asked} tokens and this server holds {limit}; shorten the prompt or ask for fewer"
    )]
    TooLong {
        /// Tokens of prompt and answer together.
        asked: u32,
        /// Most tokens of one sequence.
        limit: u32,
    },
    /// An image or a source is larger than a step that must hold all of it (422).
    #[error(
        "an image or a source takes {asked} tokens in one piece and one step computes at most {limit}; send a smaller \
         one, or start the server with a larger --max-batch-prefill-tokens"
    )]
    Indivisible {
        /// Tokens in one piece.
        asked: u32,
        /// Most that a step takes in one piece.
        limit: u32,
    },
    /// The model process died of a request that asks the same (424).
    #[error(
        "the model process died each time it computed this request; the same is refused for another {} s, so change it",
        remaining.as_secs()
    )]
    Quarantined {
        /// When it may come again.
        remaining: Duration,
    },
    /// The adapter left between look-up and admission (404).
    #[error("adapter `{0}` is not loaded; load it first or pick one of the list")]
    UnknownAdapter(String),
    /// The server is shutting down (503).
    #[error("the server is shutting down; send the request to another one")]
    Draining,
    /// No shard has ever been ready (503).
    #[error("the model is still loading; retry shortly")]
    NotReady,
}

/// What the engine is and how busy it is, at one moment.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// Whether a shard group serves the current epoch.
    pub ready: bool,
    /// Whether new requests are refused because the server ends.
    pub draining: bool,
    /// What rank 0 loaded; `None` before the first contact.
    pub description: Option<Arc<kvrun_proto::Description>>,
    /// The current epoch; 0 before the first.
    pub epoch: u64,
    /// Most tokens of one sequence, prompt and answer together; 0 before the first epoch.
    pub max_total_tokens: u32,
    /// Most tokens computed in one step.
    pub step_tokens: u32,
    /// Numbers of rows whose decoding steps the shards captured as graphs.
    pub captured: Vec<u32>,
    /// Whether a step is sent while the shards compute another.
    pub overlap: bool,
    /// Most rows of one step.
    pub step_rows: u32,
    /// KV pages of the pool.
    pub pages: u32,
    /// Pages that hold nothing.
    pub free_pages: u32,
    /// Pages that only the prefix cache holds; they are given up on demand.
    pub cached_pages: u32,
    /// Pages that adapters lie in; those of adapters that nothing runs under are given up on demand.
    pub adapter_pages: u32,
    /// Tokens of one page.
    pub page_tokens: u32,
    /// Bytes that adapters may take.
    pub adapter_bytes: u64,
    /// Requests that wait for their first or next row.
    pub queued: u32,
    /// Requests with rows in flight.
    pub running: u32,
    /// Time since the last outcome while work exists; zero when idle.
    pub stalled: Duration,
}

impl Status {
    /// Pages of open requests: neither free, nor cached alone, nor an adapter's.
    pub fn used_pages(&self) -> u32 {
        let others = self.free_pages + self.cached_pages + self.adapter_pages;
        self.pages.saturating_sub(others)
    }
}

/// Where an adapter stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterState {
    /// Registered, its bytes are not on the shard; the next request brings it back.
    Known,
    /// The shard is reading it.
    Loading,
    /// On the shard, usable at once.
    Ready,
    /// Unloading: running requests finish, new ones are refused.
    Draining,
    /// Unloaded; only seen in the answer to the unload.
    Gone,
    /// The last load failed; see `error`. Requests fail until it is loaded again.
    Failed,
}

impl AdapterState {
    /// Whether requests may ask for it: it is loaded, or will be when they do.
    pub fn is_usable(self) -> bool {
        matches!(self, Self::Known | Self::Loading | Self::Ready)
    }

    /// The state's name on the wire: "known", "loading", "ready", "draining", "gone", "failed".
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Known => "known",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Gone => "gone",
            Self::Failed => "failed",
        }
    }
}

/// One adapter of the registry.
#[derive(Debug, Clone)]
pub struct AdapterInfo {
    /// The name clients ask for.
    pub name: String,
    /// The id requests carry; a reload under the same name after an unload gets a new one.
    pub id: AdapterId,
    /// The folder it came from, on the shard's machine.
    pub path: PathBuf,
    /// Where it stands.
    pub state: AdapterState,
    /// Hex SHA-256 of config and weights; empty before the first load.
    pub digest: String,
    /// Bytes on the fullest rank, by true ranks; 0 before the first load.
    pub bytes: u64,
    /// Tensors applied, every one of the file.
    pub matched: u32,
    /// Least LoRA rank in it.
    pub rank_min: u32,
    /// Greatest LoRA rank in it.
    pub rank_max: u32,
    /// Module names it changes.
    pub targets: Vec<String>,
    /// Open requests that use it.
    pub users: u32,
    /// Whether it is exempt from eviction.
    pub pinned: bool,
    /// Why the last load failed.
    pub error: Option<String>,
}

/// What to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterSpec {
    /// The name clients will ask for.
    pub name: String,
    /// A folder in PEFT layout, on the shard's machine.
    pub path: PathBuf,
    /// Whether it is exempt from eviction.
    pub pinned: bool,
}

/// Nobody registered this name, or it is being unloaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("adapter `{0}` is not loaded; load it first or pick one of the list")]
pub struct UnknownAdapter(pub String);

/// Why an adapter was not loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The adapter is unfit for this model (422); the text names tensors or the config field.
    #[error("{0}")]
    Invalid(String),
    /// No such folder (404).
    #[error("{0}")]
    NotFound(String),
    /// No bytes left for it (507).
    #[error("{0}")]
    NoRoom(String),
    /// The name belongs to another folder (409).
    #[error(
        "adapter `{name}` is already loaded from another folder; unload it first or pick another name"
    )]
    Taken {
        /// The name asked for.
        name: String,
    },
    /// The shards did not answer (503).
    #[error("{0}")]
    Unavailable(String),
}
