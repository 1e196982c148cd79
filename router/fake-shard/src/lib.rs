//! A model shard without a model, for tests: it speaks the real wire over a unix socket, checks every rule of the
//! protocol and the content of every page it is asked to read, and fails when told to.

pub mod adapter;
pub mod faults;
pub mod ledger;
pub mod service;
pub mod tokens;

pub use faults::{Fault, Faults, Mark};

use kvrun_proto::model_shard_server::ModelShardServer;
use kvrun_proto::{Description, ImageRule, Step};
use ledger::{ImageSizes, Ledger, Sizes};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnixListenerStream;

/// Largest message on the wire: a step may admit several long sequences at once.
const MESSAGE_BYTES: usize = 64 << 20;

/// What the fake's sequences keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum State {
    /// Keys and values in pages.
    #[default]
    Pages,
    /// A recurrent state in a slot; pages cost nothing.
    Slots,
    /// Pages, and what an encoder made of the prompt; answers follow this id.
    Encoder(u32),
}

/// What the fake pretends to have loaded.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its rank.
    pub rank: u32,
    /// Ranks of the group.
    pub world: u32,
    /// Name of the model.
    pub model_id: String,
    /// Width of the logits; every id below it may be sampled.
    pub vocabulary: u32,
    /// Longest sequence.
    pub positions: u32,
    /// Ids that end an answer.
    pub end_tokens: Vec<u32>,
    /// Tokens of one page.
    pub page_tokens: u32,
    /// Most pages it grants.
    pub pages: u64,
    /// Most bytes it grants to adapters.
    pub adapter_bytes: u64,
    /// Whether adapters are placed in pages, as on a device with memory of its own.
    pub places_adapters: bool,
    /// What its sequences keep.
    pub state: State,
    /// Most steps without an answer that the router may have sent.
    pub in_flight: u64,
    /// Where it says that it computes.
    pub device: String,
    /// How images become ids, when it takes them.
    pub images: Option<ImageRule>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rank: 0,
            world: 1,
            model_id: "fake".to_owned(),
            vocabulary: 32_000,
            positions: 4096,
            end_tokens: vec![2],
            page_tokens: 16,
            pages: 4096,
            adapter_bytes: 64 << 20,
            places_adapters: false,
            state: State::Pages,
            in_flight: 1,
            device: "cpu".to_owned(),
            images: None,
        }
    }
}

impl Options {
    /// Takes vocabulary, positions and end tokens from the `config.json` of a model folder, where it has them.
    pub fn with_model(mut self, folder: &Path) -> io::Result<Self> {
        let text = std::fs::read(folder.join("config.json"))?;
        let config: serde_json::Value = serde_json::from_slice(&text)?;
        let number = |key: &str| config[key].as_u64().map(|value| value as u32);
        self.vocabulary = number("vocab_size").unwrap_or(self.vocabulary);
        self.positions = number("max_position_embeddings").unwrap_or(self.positions);
        if let Some(end) = number("eos_token_id") {
            self.end_tokens = vec![end];
        }
        Ok(self)
    }

    fn state_kinds(&self) -> Vec<String> {
        let looks = self.images.as_ref().is_some_and(|rule| rule.memory > 0);
        let kinds: &[&str] = match self.state {
            State::Slots => &["slots"],
            State::Encoder(_) => &["pages", "memory"],
            State::Pages if looks => &["pages", "memory"],
            State::Pages => &["pages"],
        };
        kinds.iter().map(|&kind| kind.to_owned()).collect()
    }

    fn page_bytes(&self) -> u64 {
        if self.state == State::Slots { 0 } else { 1024 }
    }

    /// Pages that an adapter of so many bytes is placed in.
    fn adapter_pages(&self, bytes: u64) -> u32 {
        match self.page_bytes() {
            0 => 0,
            _ if !self.places_adapters => 0,
            page => bytes.div_ceil(page) as u32,
        }
    }

    /// What a ledger of `pages` pages checks steps of `step_tokens` tokens in `step_rows` rows against.
    fn sizes(&self, pages: u64, step_tokens: u32, step_rows: u32) -> Sizes {
        Sizes {
            pages,
            page_tokens: self.page_tokens,
            step_tokens,
            step_rows,
            vocabulary: self.vocabulary,
            positions: self.positions,
            recurrent: self.state == State::Slots,
            decoder_start: match self.state {
                State::Encoder(start) => Some(start),
                _ => None,
            },
            images: self.images.as_ref().map(|rule| ImageSizes {
                together: rule.together,
                memory: rule.memory,
            }),
        }
    }

    fn description(&self) -> Description {
        Description {
            model_id: self.model_id.clone(),
            model_digest: format!("{:064x}", self.vocabulary),
            architecture: "FakeForCausalLM".to_owned(),
            dtype: "float32".to_owned(),
            device: self.device.clone(),
            rank: self.rank,
            world: self.world,
            vocabulary: self.vocabulary,
            positions: self.positions,
            end_tokens: self.end_tokens.clone(),
            state_kinds: self.state_kinds(),
            page_bytes: self.page_bytes(),
            decoder_start: match self.state {
                State::Encoder(start) => Some(start),
                _ => None,
            },
            images: self.images.clone(),
            page_tokens: self.page_tokens,
            vocabulary_limit: self.vocabulary,
            kv_dtype: "float32".to_owned(),
            activation_dtype: "float32".to_owned(),
            threads: 1,
            lora_targets: vec!["q_proj".to_owned(), "v_proj".to_owned()],
            ..Default::default()
        }
    }
}

/// What a shard held after its last step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Sequences admitted and not released.
    pub sequences: usize,
    /// Pages in their tables.
    pub pages: usize,
    /// Adapters held.
    pub adapters: usize,
    /// The step's number within its epoch.
    pub step: u64,
    /// Rows of the step.
    pub rows: usize,
    /// Tokens of the step.
    pub tokens: u32,
}

/// What tests look at: broken rules, and what is held.
#[derive(Debug, Default)]
pub struct Watch {
    seen: Mutex<(Vec<String>, Usage, Usage)>,
    deepest: AtomicU64,
}

impl Watch {
    fn seen(&self) -> MutexGuard<'_, (Vec<String>, Usage, Usage)> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn violation(&self, rank: u32, text: &str) {
        self.seen().0.push(format!("rank {rank}: {text}"));
    }

    /// An epoch began, and with it an empty ledger.
    pub(crate) fn begin(&self) {
        self.seen().1 = Usage::default();
    }

    pub(crate) fn usage(&self, _rank: u32, ledger: &Ledger, step: &Step) {
        let usage = Usage {
            sequences: ledger.live(),
            pages: ledger.pages_in_use(),
            adapters: ledger.adapters(),
            step: step.number,
            rows: step.rows.len(),
            tokens: step.rows.iter().map(|row| row.tokens).sum(),
        };
        let mut seen = self.seen();
        seen.1 = usage;
        if usage.rows > seen.2.rows {
            seen.2 = usage;
        }
    }

    pub(crate) fn queued(&self, steps: u64) {
        self.deepest.fetch_max(steps, Ordering::Relaxed);
    }

    /// Most steps that lay here without an answer at once, so far.
    pub fn deepest(&self) -> u64 {
        self.deepest.load(Ordering::Relaxed)
    }

    /// Every broken rule so far; a router without bugs leaves this empty.
    pub fn violations(&self) -> Vec<String> {
        self.seen().0.clone()
    }

    /// What was held after the last step; nothing where the epoch has had none.
    pub fn last(&self) -> Usage {
        self.seen().1
    }

    /// The step with the most rows so far.
    pub fn widest(&self) -> Usage {
        self.seen().2
    }
}

/// One rank on its own thread. Dropping it kills it as SIGKILL would: every connection breaks in mid-sentence.
pub struct FakeShard {
    socket: PathBuf,
    options: Arc<Options>,
    faults: Arc<Faults>,
    watch: Arc<Watch>,
    thread: Option<JoinHandle<()>>,
    kill: mpsc::UnboundedSender<()>,
}

impl FakeShard {
    /// Binds `socket` and serves; connections are accepted once this returns.
    pub fn spawn(socket: impl Into<PathBuf>, options: Options) -> io::Result<Self> {
        let (kill, _) = mpsc::unbounded_channel();
        let mut shard = Self {
            socket: socket.into(),
            options: Arc::new(options),
            faults: Arc::default(),
            watch: Arc::default(),
            thread: None,
            kill,
        };
        shard.restart()?;
        Ok(shard)
    }

    /// The switches of its faults; they outlive restarts.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// What it saw; outlives restarts.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether it still serves.
    pub fn alive(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    /// Kills it and waits until its sockets are gone.
    pub fn kill(&mut self) {
        let _ = self.kill.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    /// Kills it where it still lives, then starts it again with empty memory on the same socket.
    pub fn restart(&mut self) -> io::Result<()> {
        self.kill();
        let _ = std::fs::remove_file(&self.socket);
        let listener = std::os::unix::net::UnixListener::bind(&self.socket)?;
        listener.set_nonblocking(true)?;
        let (kill, killed) = mpsc::unbounded_channel();
        let die = kill.clone();
        let service = service::Shard::new(
            self.options.clone(),
            self.faults.clone(),
            self.watch.clone(),
            Arc::new(move || {
                let _ = die.send(());
            }),
        );
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        self.kill = kill;
        let name = format!("fake-shard-{}", self.options.rank);
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            runtime.block_on(until_killed(listener, service, killed));
            // Dropping the runtime drops every connection's task, as the kernel would close a dead process's sockets.
            runtime.shutdown_background();
        })?;
        self.thread = Some(thread);
        Ok(())
    }
}

impl Drop for FakeShard {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_file(&self.socket);
    }
}

async fn until_killed(
    listener: std::os::unix::net::UnixListener,
    service: service::Shard,
    mut killed: mpsc::UnboundedReceiver<()>,
) {
    tokio::select! {
        _ = killed.recv() => {}
        _ = serve(listener, service) => {}
    }
}

/// Serves one shard and the health service on a listener until the transport fails.
pub async fn serve(
    listener: std::os::unix::net::UnixListener,
    service: service::Shard,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let incoming = UnixListenerStream::new(UnixListener::from_std(listener)?);
    let shard = ModelShardServer::new(service)
        .max_decoding_message_size(MESSAGE_BYTES)
        .max_encoding_message_size(MESSAGE_BYTES);
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter
        .set_serving::<ModelShardServer<service::Shard>>()
        .await;
    reporter
        .set_service_status("", tonic_health::ServingStatus::Serving)
        .await;
    tonic::transport::Server::builder()
        .add_service(health)
        .add_service(shard)
        .serve_with_incoming(incoming)
        .await?;
    Ok(())
}
