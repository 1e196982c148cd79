//! The shard group: one connection per rank, epochs, and the same steps for all.
//!
//! Every rank gets every call. A step is answered when all ranks answered it; rank 0's outcome has the tokens.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{join_all, try_join_all};
use futures::stream::{BoxStream, SelectAll, StreamExt};
use hyper_util::rt::TokioIo;
use kvrun_proto::model_shard_client::ModelShardClient;
use kvrun_proto::{
    DescribeRequest, Description, LoadAdapterRequest, LoadedAdapter, Outcome, Reservation,
    ReserveRequest, Step, UnloadAdapterRequest,
};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::capabilities;

type Client = ModelShardClient<Channel>;

/// Largest message: a step may admit several long sequences at once.
const MESSAGE_BYTES: usize = 64 << 20;
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_millis(500);
/// A shard that listens answers these at once.
const PROMPTLY: Duration = Duration::from_secs(10);
/// Profiling the largest step and allocating may take this long.
const RESERVING: Duration = Duration::from_secs(600);
/// Reading an adapter, or freeing it, may take this long.
const LOADING: Duration = Duration::from_secs(120);

/// What the router asks every rank for.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    pub(super) sockets: Vec<PathBuf>,
    pub(super) pool_tokens: u64,
    /// Most tokens of one step; 0 = what the model needs.
    pub(super) step_tokens: u32,
    pub(super) step_rows: u32,
    pub(super) adapter_bytes: u64,
    /// Most tokens of one sequence; 0 = what the model allows.
    pub(super) max_total_tokens: u32,
}

/// A group that serves one epoch.
pub(super) struct Group {
    pub(super) epoch: u64,
    pub(super) reservation: Reservation,
    /// Most tokens of one step.
    pub(super) step_tokens: u32,
    pub(super) description: Arc<Description>,
    clients: Vec<Client>,
    steps: Vec<mpsc::Sender<Step>>,
    outcomes: SelectAll<BoxStream<'static, (usize, Result<Outcome, Status>)>>,
    /// The last step each rank answered.
    answered: Vec<u64>,
    /// Rank 0's outcomes that another rank has yet to answer, oldest first.
    leading: VecDeque<Outcome>,
}

/// Connects to every rank and begins an epoch after `last_epoch`, trying for as long as it takes.
pub(super) async fn connect(wish: Wish, mut last_epoch: u64) -> Group {
    let mut wait = FIRST_RETRY;
    let mut said = None;
    loop {
        match begin(&wish, &mut last_epoch).await {
            Ok(group) => return group,
            Err(status) => {
                let text = format!("{:?}: {}", status.code(), status.message());
                if said.as_ref() != Some(&text) {
                    tracing::info!(reason = text, "waiting for the model shards");
                    said = Some(text);
                }
            }
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LAST_RETRY);
    }
}

async fn begin(wish: &Wish, last_epoch: &mut u64) -> Result<Group, Status> {
    let clients = try_join_all(wish.sockets.iter().map(|socket| open(socket.clone()))).await?;
    let description = describe(&clients).await?;
    let (rows, longest) = (wish.step_rows, wish.max_total_tokens);
    let mut asked = ReserveRequest {
        epoch: *last_epoch + 1,
        pages: capabilities::pages(&description, wish.pool_tokens, rows, longest),
        step_tokens: capabilities::step_tokens(&description, wish.step_tokens, longest),
        sequences: wish.step_rows,
        adapter_bytes: wish.adapter_bytes,
    };
    let mut granted = reserve(&clients, asked, last_epoch).await?;
    let least = |of: fn(&Reservation) -> u64| granted.iter().map(of).min().unwrap_or(0);
    let least = Reservation {
        pages: least(|grant| grant.pages),
        adapter_bytes: least(|grant| grant.adapter_bytes),
        // Every rank makes the same captures, since they meet within them.
        captured: granted
            .first()
            .map_or_else(Vec::new, |grant| grant.captured.clone()),
    };
    if granted.iter().any(|grant| *grant != least) {
        asked.epoch = *last_epoch + 1;
        asked.pages = least.pages;
        asked.adapter_bytes = least.adapter_bytes;
        granted = reserve(&clients, asked, last_epoch).await?;
    }
    if let Some(other) = granted.iter().find(|grant| grant.pages != least.pages) {
        return Err(Status::internal(format!(
            "{} pages asked of every rank, one granted {}",
            least.pages, other.pages
        )));
    }
    let (mut steps, mut outcomes) = (Vec::new(), SelectAll::new());
    for (rank, client) in clients.iter().enumerate() {
        let (sender, receiver) = mpsc::channel(2);
        steps.push(sender);
        outcomes.push(run(rank, client.clone(), receiver));
    }
    Ok(Group {
        epoch: asked.epoch,
        reservation: least,
        step_tokens: asked.step_tokens,
        description: Arc::new(description),
        answered: vec![0; clients.len()],
        clients,
        steps,
        outcomes,
        leading: VecDeque::new(),
    })
}

async fn open(socket: PathBuf) -> Result<Client, Status> {
    let dial = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The address is never looked up: the connector above knows the socket.
    let channel = Endpoint::from_static("http://shard.invalid")
        .connect_with_connector(dial)
        .await
        .map_err(|error| Status::unavailable(chain(&error)))?;
    let mut health = HealthClient::new(channel.clone());
    let service = "kvrun.v1.ModelShard".to_owned();
    let check = health.check(HealthCheckRequest { service });
    let answer = prompt(check).await?.into_inner();
    if answer.status != ServingStatus::Serving as i32 {
        return Err(Status::unavailable("a shard is loading"));
    }
    Ok(Client::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES)
        .max_encoding_message_size(MESSAGE_BYTES))
}

/// Every cause of an error, outermost first: the transport hides "connection refused" three levels down.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

async fn prompt<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Status::deadline_exceeded("a shard that listens did not answer in time");
    timeout(PROMPTLY, call).await.map_err(late)?
}

/// Asks every rank; all must have loaded the same model as one group.
async fn describe(clients: &[Client]) -> Result<Description, Status> {
    let calls = clients.iter().cloned().map(|mut client| async move {
        prompt(client.describe(DescribeRequest {}))
            .await
            .map(tonic::Response::into_inner)
    });
    let described = try_join_all(calls).await?;
    for (rank, found) in described.iter().enumerate() {
        if (found.rank as usize, found.world as usize) != (rank, clients.len()) {
            return Err(Status::failed_precondition(format!(
                "socket {rank} of {} answers as rank {} of {}",
                clients.len(),
                found.rank,
                found.world
            )));
        }
        if found.model_digest != described[0].model_digest {
            return Err(Status::failed_precondition(format!(
                "rank {rank} loaded another model than rank 0"
            )));
        }
    }
    described
        .into_iter()
        .next()
        .ok_or_else(|| Status::internal("no shards"))
}

/// Reserves on all ranks at once. `last_epoch` rises even when that fails: a number is never used twice.
async fn reserve(
    clients: &[Client],
    asked: ReserveRequest,
    last_epoch: &mut u64,
) -> Result<Vec<Reservation>, Status> {
    *last_epoch = asked.epoch;
    let calls = clients.iter().cloned().map(|mut client| async move {
        let late = |_| Status::deadline_exceeded("a shard did not reserve its memory in time");
        timeout(RESERVING, client.reserve(asked))
            .await
            .map_err(late)?
    });
    let granted = try_join_all(calls).await.inspect_err(|status| {
        if status.code() == Code::FailedPrecondition {
            // The shards outlived an earlier router and have seen more epochs than this one knows of.
            *last_epoch = last_epoch.saturating_mul(2);
        }
    })?;
    Ok(granted
        .into_iter()
        .map(tonic::Response::into_inner)
        .collect())
}

/// One rank's outcomes; the last item is always an error, because an epoch ends by one.
fn run(
    rank: usize,
    mut client: Client,
    steps: mpsc::Receiver<Step>,
) -> BoxStream<'static, (usize, Result<Outcome, Status>)> {
    async_stream::stream! {
        // A shard may send its headers with the first outcome only, so nothing waits for this call.
        let mut outcomes = match client.run(ReceiverStream::new(steps)).await {
            Ok(response) => response.into_inner(),
            Err(status) => {
                yield (rank, Err(status));
                return;
            }
        };
        loop {
            match outcomes.message().await {
                Ok(Some(outcome)) => yield (rank, Ok(outcome)),
                Ok(None) => {
                    yield (rank, Err(Status::unavailable("the step stream ended")));
                    return;
                }
                Err(status) => {
                    yield (rank, Err(status));
                    return;
                }
            }
        }
    }
    .boxed()
}

impl Group {
    /// Sends a step to every rank. An error ends the epoch.
    pub(super) fn send(&mut self, step: Step) -> Result<(), Status> {
        let gone = |_| Status::unavailable("the step stream is closed");
        let Some((last, others)) = self.steps.split_last() else {
            return Ok(());
        };
        for rank in others {
            rank.try_send(step.clone()).map_err(gone)?;
        }
        last.try_send(step).map_err(gone)
    }

    /// Rank 0's outcome of the next step that all ranks answered. Cancel safe. An error ends the epoch.
    pub(super) async fn outcome(&mut self) -> Result<Outcome, Status> {
        loop {
            let all =
                |leader: &Outcome| self.answered.iter().all(|&number| number >= leader.number);
            if self.leading.front().is_some_and(all)
                && let Some(outcome) = self.leading.pop_front()
            {
                return Ok(outcome);
            }
            let Some((rank, heard)) = self.outcomes.next().await else {
                return Err(Status::unavailable("every step stream ended"));
            };
            let outcome = heard.map_err(|status| {
                Status::new(status.code(), format!("rank {rank}: {}", status.message()))
            })?;
            // Of an old epoch, or said twice.
            if outcome.epoch != self.epoch || outcome.number <= self.answered[rank] {
                tracing::debug!(
                    rank,
                    outcome.epoch,
                    outcome.number,
                    "dropped a stale outcome"
                );
                continue;
            }
            self.answered[rank] = outcome.number;
            if rank == 0 {
                self.leading.push_back(outcome);
            }
        }
    }

    /// Loads an adapter on every rank. The answer has rank 0's facts, the bytes of the fullest rank and the pages of the one
    /// that wants most.
    pub(super) fn load(
        &self,
        handle: u64,
        name: String,
        path: String,
    ) -> impl Future<Output = Result<LoadedAdapter, Status>> + Send + use<> {
        let (clients, epoch) = (self.clients.clone(), self.epoch);
        async move {
            let calls = clients.iter().cloned().map(|mut client| {
                let request = LoadAdapterRequest {
                    epoch,
                    handle,
                    name: name.clone(),
                    path: path.clone(),
                };
                async move {
                    client
                        .load_adapter(request)
                        .await
                        .map(tonic::Response::into_inner)
                }
            });
            let late = |_| {
                Status::deadline_exceeded(format!(
                    "loading took longer than {} s",
                    LOADING.as_secs()
                ))
            };
            // Every rank must have answered before the handle is given up, or one of them would keep the adapter.
            let answers = timeout(LOADING, join_all(calls)).await.map_err(late)?;
            let loaded = match answers.into_iter().collect::<Result<Vec<_>, _>>() {
                Ok(loaded) => loaded,
                Err(status) => {
                    // Some ranks may have it; unknown handles are no error.
                    let _ = unload(clients, epoch, handle).await;
                    return Err(status);
                }
            };
            let bytes = loaded.iter().map(|rank| rank.bytes).max().unwrap_or(0);
            let pages = loaded.iter().map(|rank| rank.pages).max().unwrap_or(0);
            let first = loaded
                .first()
                .cloned()
                .ok_or_else(|| Status::internal("no shards"))?;
            match loaded.iter().any(|rank| rank.digest != first.digest) {
                true => Err(Status::invalid_argument(
                    "the ranks read different files for one adapter",
                )),
                false => Ok(LoadedAdapter {
                    bytes,
                    pages,
                    ..first
                }),
            }
        }
    }

    /// Unloads an adapter on every rank.
    pub(super) fn unload(
        &self,
        handle: u64,
    ) -> impl Future<Output = Result<(), Status>> + Send + use<> {
        unload(self.clients.clone(), self.epoch, handle)
    }
}

async fn unload(clients: Vec<Client>, epoch: u64, handle: u64) -> Result<(), Status> {
    let calls = clients.into_iter().map(|mut client| async move {
        client
            .unload_adapter(UnloadAdapterRequest { epoch, handle })
            .await
    });
    let late = |_| Status::deadline_exceeded("a shard did not unload the adapter in time");
    timeout(LOADING, try_join_all(calls))
        .await
        .map_err(late)?
        .map(|_| ())
}
