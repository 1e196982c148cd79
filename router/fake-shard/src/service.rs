//! The gRPC face of the fake: epochs, step streams and adapter loads over one ledger.

use crate::adapter;
use crate::faults::{Fault, Faults};
use crate::ledger::{Breach, Ledger};
use crate::{Options, State as Kept, Watch};
use kvrun_proto::model_shard_server::ModelShard;
use kvrun_proto::{
    DescribeRequest, Description, LoadAdapterRequest, LoadedAdapter, Outcome, Reservation,
    ReserveRequest, Step, Token, UnloadAdapterRequest, UnloadedAdapter,
};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// One shard's service. Clones share everything.
#[derive(Clone)]
pub struct Shard {
    options: Arc<Options>,
    faults: Arc<Faults>,
    watch: Arc<Watch>,
    state: Arc<Mutex<State>>,
    die: Arc<dyn Fn() + Send + Sync>,
}

struct State {
    epoch: u64,
    adapter_bytes: u64,
    ledger: Ledger,
}

impl Shard {
    /// A shard that calls `die` when a fault or a poisoned row kills it.
    pub fn new(
        options: Arc<Options>,
        faults: Arc<Faults>,
        watch: Arc<Watch>,
        die: Arc<dyn Fn() + Send + Sync>,
    ) -> Self {
        let state = State {
            epoch: 0,
            adapter_bytes: 0,
            ledger: Ledger::new(options.sizes(0, 0, 0)),
        };
        Self {
            options,
            faults,
            watch,
            state: Arc::new(Mutex::new(state)),
            die,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn breach(&self, text: String) -> Status {
        self.watch.violation(self.options.rank, &text);
        Status::invalid_argument(text)
    }

    /// Computes one step; `Ok(None)` when the shard dies of it.
    fn compute(&self, step: &Step, answered: u64) -> Result<Option<Outcome>, Status> {
        let begun = Instant::now();
        let mut state = self.state();
        if step.epoch != state.epoch {
            return Err(Status::aborted(format!("epoch {} began", state.epoch)));
        }
        let rows = match state.ledger.step(step, answered, &self.faults) {
            Ok(rows) => rows,
            Err(Breach::Poison) => return Ok(None),
            Err(Breach::Rule(text)) => return Err(self.breach(text)),
        };
        self.watch.usage(self.options.rank, &state.ledger, step);
        Ok(Some(Outcome {
            epoch: step.epoch,
            number: step.number,
            rows: if self.options.rank == 0 {
                rows
            } else {
                Vec::new()
            },
            compute_us: begun.elapsed().as_micros() as u64,
            ..Default::default()
        }))
    }

    /// Takes steps as they come, so that it is known how many lie here; also says which was the last one answered then.
    async fn read(
        self,
        mut steps: Streaming<Step>,
        queue: mpsc::UnboundedSender<(Step, u64)>,
        answered: Arc<AtomicU64>,
    ) {
        while let Ok(Some(step)) = steps.message().await {
            let answered = answered.load(Ordering::Acquire);
            let here = step.number.saturating_sub(answered);
            self.watch.queued(here);
            if here > self.options.in_flight {
                let most = self.options.in_flight;
                self.breach(format!("{here} steps lie here, {most} at most may"));
            }
            if queue.send((step, answered)).is_err() {
                return;
            }
        }
    }

    async fn serve(self, steps: Streaming<Step>, replies: mpsc::Sender<Result<Outcome, Status>>) {
        let (queue, mut queued) = mpsc::unbounded_channel();
        let answered = Arc::new(AtomicU64::new(0));
        tokio::spawn(self.clone().read(steps, queue, answered.clone()));
        while let Some((step, known)) = queued.recv().await {
            let (fault, delay) = self.faults.next_step();
            if fault == Some(Fault::Hang) {
                std::future::pending::<()>().await;
            }
            if fault == Some(Fault::Die) {
                return (self.die)();
            }
            if fault == Some(Fault::OutOfMemory) {
                let short = Status::resource_exhausted("CUDA out of memory");
                let _ = replies.send(Err(short)).await;
                return;
            }
            if delay > Duration::ZERO {
                tokio::time::sleep(delay).await;
            }
            let outcome = match self.compute(&step, known) {
                Ok(Some(outcome)) => outcome,
                Ok(None) => return (self.die)(),
                Err(status) => {
                    let _ = replies.send(Err(status)).await;
                    return;
                }
            };
            // Before it is sent: the router may act on it at once.
            answered.store(step.number, Ordering::Release);
            let batch = match fault {
                Some(Fault::DropReply) => vec![],
                Some(Fault::DuplicateReply) => vec![outcome.clone(), outcome],
                Some(Fault::StaleReply) => vec![stale(&outcome), outcome],
                _ => vec![outcome],
            };
            for outcome in batch {
                if replies.send(Ok(outcome)).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// The outcome as an earlier epoch might have said it: same rows, other tokens.
fn stale(outcome: &Outcome) -> Outcome {
    let mut old = outcome.clone();
    old.epoch -= 1;
    for row in &mut old.rows {
        row.tokens = vec![Token {
            id: 0,
            ..Default::default()
        }];
    }
    old
}

#[tonic::async_trait]
impl ModelShard for Shard {
    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<Description>, Status> {
        Ok(Response::new(self.options.description()))
    }

    async fn reserve(
        &self,
        request: Request<ReserveRequest>,
    ) -> Result<Response<Reservation>, Status> {
        let asked = request.into_inner();
        let mut state = self.state();
        if asked.epoch <= state.epoch {
            return Err(Status::failed_precondition(format!(
                "epoch {} asked, epoch {} seen",
                asked.epoch, state.epoch
            )));
        }
        let pages = match asked.pages {
            0 => self.options.pages,
            // They cost nothing.
            wanted if self.options.state == Kept::Slots => wanted,
            wanted => wanted.min(self.options.pages),
        };
        let adapter_bytes = match asked.adapter_bytes {
            0 => self.options.adapter_bytes,
            wanted => wanted.min(self.options.adapter_bytes),
        };
        state.epoch = asked.epoch;
        state.adapter_bytes = adapter_bytes;
        let sizes = self
            .options
            .sizes(pages, asked.step_tokens, asked.sequences);
        state.ledger = Ledger::new(sizes);
        self.watch.begin();
        Ok(Response::new(Reservation {
            pages,
            adapter_bytes,
            captured: vec![1, 2],
        }))
    }

    type RunStream = ReceiverStream<Result<Outcome, Status>>;

    async fn run(
        &self,
        request: Request<Streaming<Step>>,
    ) -> Result<Response<Self::RunStream>, Status> {
        let (replies, stream) = mpsc::channel(64);
        tokio::spawn(self.clone().serve(request.into_inner(), replies));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn load_adapter(
        &self,
        request: Request<LoadAdapterRequest>,
    ) -> Result<Response<LoadedAdapter>, Status> {
        let asked = request.into_inner();
        let delay = self.faults.loading();
        if delay > Duration::ZERO {
            tokio::time::sleep(delay).await;
        }
        if self.faults.refuses_load() {
            return Err(Status::unavailable("the shard is busy"));
        }
        let mut adapter = adapter::read(Path::new(&asked.path))?;
        adapter.pages = self.options.adapter_pages(adapter.bytes);
        let mut state = self.state();
        if asked.epoch != state.epoch {
            return Err(Status::aborted(format!("epoch {} began", state.epoch)));
        }
        let free = state
            .adapter_bytes
            .saturating_sub(state.ledger.adapter_bytes());
        if adapter.bytes > free {
            return Err(Status::resource_exhausted(format!(
                "adapter `{}` takes {} bytes, {free} are free",
                asked.name, adapter.bytes
            )));
        }
        let loaded = LoadedAdapter {
            digest: adapter.digest.clone(),
            bytes: adapter.bytes,
            matched: 2 * adapter.targets.len() as u32,
            rank_min: adapter.rank,
            rank_max: adapter.rank,
            targets: adapter.targets.clone(),
            pages: adapter.pages,
        };
        match state.ledger.load(asked.handle, adapter) {
            Ok(()) => Ok(Response::new(loaded)),
            Err(Breach::Rule(text)) => Err(self.breach(text)),
            Err(Breach::Poison) => Err(Status::internal("a load cannot be poisoned")),
        }
    }

    async fn unload_adapter(
        &self,
        request: Request<UnloadAdapterRequest>,
    ) -> Result<Response<UnloadedAdapter>, Status> {
        let asked = request.into_inner();
        let mut state = self.state();
        if asked.epoch != state.epoch {
            return Err(Status::aborted(format!("epoch {} began", state.epoch)));
        }
        match state.ledger.unload(asked.handle) {
            Err(Breach::Rule(text)) => Err(self.breach(text)),
            _ => Ok(Response::new(UnloadedAdapter {})),
        }
    }
}
