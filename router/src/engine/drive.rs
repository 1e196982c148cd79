//! The engine's task: it owns the scheduler, keeps one step in flight, and tells every request what happened to it.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use kvrun_proto::{LoadedAdapter, Outcome, Sampling};
use kvrun_scheduler::{
    Acceptance, AdapterId, AdapterOrder, Config, Failure as Ended, Finish as Complete, Grant,
    LoadFault, Model, Refusal as Refused, Scheduler, Step, Time, What,
};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::{Code, Status};

use super::adapters::{self, Registry};
use super::meters::Meters;
use super::shards::{self, Group, Wish};
use super::watchdog::Watchdog;
use super::{Admitted, Command, Control, EngineOptions, Shown, wire};
use crate::request::{
    AdapterInfo, AdapterSpec, AdapterState, Event, Failure, Finish, LoadError, Refusal, TokenInfo,
    UnknownAdapter, ValidRequest,
};

/// How often time alone is looked at: deadlines, silence, rotation of adapters.
const TICK: Duration = Duration::from_millis(250);
/// Commands taken between two steps at most, so that a flood of them cannot stop the streams.
const COMMANDS: usize = 256;

/// An open request's way back to its client.
struct Open {
    events: mpsc::UnboundedSender<Event>,
    sampling: Sampling,
    /// Log-probabilities of the prompt so far; `None` once told, or when nobody asked.
    prompt: Option<Vec<TokenInfo>>,
}

/// The group that serves, or the wish for one.
enum Link {
    Connecting(BoxFuture<'static, Group>),
    Serving(Box<Group>),
}

/// A finished call about an adapter.
enum Called {
    Loaded(u64, Result<LoadedAdapter, Status>),
    Unloaded(u64),
}

/// What woke the task.
enum Woken {
    Outcome(Result<Outcome, Status>),
    Group(Group),
    Command(Option<Command>),
    Called(Called),
    Tick,
}

type LoadReply = oneshot::Sender<Result<AdapterInfo, LoadError>>;

/// The task's state.
pub(super) struct Driver {
    options: EngineOptions,
    commands: mpsc::UnboundedReceiver<Command>,
    registry: Arc<Registry>,
    shown: Shown,
    announce: watch::Sender<bool>,
    scheduler: Scheduler,
    link: Link,
    last_epoch: u64,
    calls: FuturesUnordered<BoxFuture<'static, Called>>,
    open: HashMap<u64, Open>,
    loads: Vec<(AdapterId, LoadReply)>,
    /// Adapters of the options whose first load has no outcome yet.
    first_loads: BTreeSet<AdapterId>,
    drains: Vec<oneshot::Sender<()>>,
    draining: bool,
    origin: Instant,
    watchdog: Watchdog,
    progressed: Instant,
    /// Whether the step in flight computes no prompt.
    decodes: bool,
    meters: Meters,
}

impl Driver {
    pub(super) fn new(
        options: EngineOptions,
        commands: mpsc::UnboundedReceiver<Command>,
        registry: Arc<Registry>,
        shown: Shown,
        announce: watch::Sender<bool>,
    ) -> Self {
        let scheduler = Scheduler::new(Config {
            step_tokens: options.step_tokens.max(1),
            step_rows: options.step_rows.max(1),
            max_tokens: match options.max_total_tokens {
                0 => u32::MAX,
                tokens => tokens,
            },
            queue_requests: options.queue_requests,
            queue_tokens: options.queue_tokens,
            share_prefixes: options.share_prefixes,
        });
        let now = Instant::now();
        let mut driver = Self {
            link: Link::Connecting(Box::pin(std::future::pending())),
            commands,
            registry,
            shown,
            announce,
            scheduler,
            last_epoch: 0,
            calls: FuturesUnordered::new(),
            open: HashMap::new(),
            loads: Vec::new(),
            first_loads: BTreeSet::new(),
            drains: Vec::new(),
            draining: false,
            origin: now,
            watchdog: Watchdog::default(),
            progressed: now,
            decodes: true,
            meters: Meters::new(),
            options,
        };
        for spec in std::mem::take(&mut driver.options.adapters) {
            let id = driver.register(spec);
            driver.first_loads.insert(id);
        }
        driver
    }

    /// Runs until every handle and answer is dropped.
    pub(super) async fn run(mut self) {
        self.link = self.connect();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let (link, calls) = (&mut self.link, &mut self.calls);
            let woken = tokio::select! {
                biased;
                woken = hear(link) => woken,
                called = calls.next(), if !calls.is_empty() => called.map_or(Woken::Tick, Woken::Called),
                command = self.commands.recv() => Woken::Command(command),
                _ = ticks.tick() => Woken::Tick,
            };
            match woken {
                Woken::Outcome(Ok(outcome)) => self.outcome(outcome).await,
                Woken::Outcome(Err(status)) => self.lose(&status.to_string()),
                Woken::Group(group) => self.begin(group),
                Woken::Command(Some(command)) => self.obey(command),
                Woken::Command(None) => return,
                Woken::Called(called) => self.called(called),
                Woken::Tick => self.watch(),
            }
            for _ in 0..COMMANDS {
                match self.commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => break,
                }
            }
            self.advance();
            self.deliver(None);
            self.show();
        }
    }

    fn now(&self) -> Time {
        self.origin.elapsed()
    }

    fn connect(&self) -> Link {
        let wish = Wish {
            sockets: self.options.sockets.clone(),
            pool_tokens: self.options.pool_tokens,
            step_tokens: self.options.step_tokens.max(1),
            step_rows: self.options.step_rows.max(1),
            adapter_bytes: self.options.adapter_bytes,
        };
        Link::Connecting(Box::pin(shards::connect(wish, self.last_epoch)))
    }

    fn begin(&mut self, group: Group) {
        let (description, reserved) = (group.description.clone(), group.reservation);
        tracing::info!(
            epoch = group.epoch,
            pages = reserved.pages,
            model = description.model_id,
            "serving"
        );
        self.last_epoch = group.epoch;
        let grant = Grant {
            epoch: group.epoch,
            pages: u32::try_from(reserved.pages).unwrap_or(u32::MAX),
            adapter_bytes: reserved.adapter_bytes,
            model: Model {
                digest: description.model_digest.clone(),
                page_tokens: description.page_tokens.max(1),
                vocabulary: description.vocabulary,
                positions: description.positions,
            },
        };
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let status = &mut shown.status;
        status.epoch = group.epoch;
        status.pages = grant.pages;
        status.page_tokens = grant.model.page_tokens;
        status.adapter_bytes = grant.adapter_bytes;
        status.step_tokens = self.options.step_tokens.max(1);
        status.step_rows = self.options.step_rows.max(1);
        status.description = Some(description);
        drop(shown);
        self.scheduler.begin_epoch(self.now(), grant);
        self.progressed = Instant::now();
        self.link = Link::Serving(Box::new(group));
    }

    /// The epoch is over: everything that ran waits for the next one.
    fn lose(&mut self, reason: &str) {
        tracing::warn!(
            epoch = self.last_epoch,
            reason,
            open = self.open.len(),
            "lost the model shards"
        );
        if self.watchdog.in_flight() {
            self.meters.lost(self.decodes);
        }
        self.watchdog.rest();
        self.calls.clear();
        self.scheduler.lose_epoch(self.now());
        self.link = self.connect();
    }

    /// Commits an outcome and sends the next step before anybody hears of it: the shards wait, the clients do not.
    async fn outcome(&mut self, mut outcome: Outcome) {
        let received = Instant::now();
        let reply = wire::reply(&outcome);
        match self.scheduler.commit(self.now(), &reply) {
            Ok(Acceptance::Committed) => {}
            Ok(Acceptance::Stale) => return,
            Err(violation) => return self.lose(&violation.to_string()),
        }
        self.progressed = received;
        let took = self.watchdog.answered(received);
        let decodes = self.decodes;
        if self.advance() {
            self.meters.gap(received.elapsed());
            // Lets the connection write the step before the clients' channels are filled.
            tokio::task::yield_now().await;
        }
        let micros = Duration::from_micros;
        self.meters.answered(
            decodes,
            took,
            micros(outcome.compute_us),
            micros(outcome.forward_us),
        );
        self.keep_prompts(&mut outcome);
        self.deliver(Some(outcome));
    }

    /// Log-probabilities of prompts come chunk by chunk and are told at once, before the first token.
    fn keep_prompts(&mut self, outcome: &mut Outcome) {
        for row in &mut outcome.rows {
            if row.prompt.is_empty() {
                continue;
            }
            if let Some(Open {
                prompt: Some(kept), ..
            }) = self.open.get_mut(&row.sequence)
            {
                kept.extend(row.prompt.drain(..).map(wire::token));
            }
        }
    }

    /// Orders loads and sends the next step, if there is anything to say; says whether a step was sent.
    fn advance(&mut self) -> bool {
        let now = self.now();
        let orders = self.scheduler.plan_adapters(now);
        let planned = self.scheduler.plan(now);
        let Link::Serving(group) = &mut self.link else {
            return false;
        };
        for order in orders {
            self.calls.push(call(group, &self.registry, order));
        }
        let Some(step) = planned else {
            return false;
        };
        forget_half_prompts(&step, &mut self.open);
        let tokens = step.rows.iter().map(|row| row.tokens).sum();
        self.decodes = step.rows.iter().all(|row| row.tokens == 1);
        let sampling = |id| sampling(self.open.get(&id));
        let sent = group.send(wire::step(&self.scheduler, step, sampling));
        self.watchdog.sent(Instant::now(), tokens);
        self.meters.sent(self.decodes);
        if let Err(status) = sent {
            self.lose(&status.to_string());
            return false;
        }
        true
    }

    fn called(&mut self, called: Called) {
        let now = self.now();
        match called {
            Called::Unloaded(handle) => self.scheduler.adapter_unloaded(handle),
            Called::Loaded(handle, Ok(loaded)) => {
                let id = self.scheduler.adapters().of_handle(handle);
                self.scheduler
                    .adapter_loaded(now, handle, &loaded.digest, loaded.bytes);
                if let Some(id) = id {
                    self.registry.describe(id, &loaded);
                }
            }
            Called::Loaded(handle, Err(status)) => {
                let fault = match status.code() {
                    Code::NotFound => LoadFault::Missing,
                    Code::ResourceExhausted => LoadFault::NoRoom,
                    // The connection broke, which ends the epoch; the adapter is loaded again in the next one.
                    Code::Unavailable | Code::Aborted | Code::Cancelled => return,
                    _ => LoadFault::Unfit,
                };
                tracing::warn!(
                    handle,
                    reason = status.message(),
                    "an adapter was not loaded"
                );
                self.scheduler
                    .adapter_load_failed(now, handle, fault, status.message());
            }
        }
    }

    fn watch(&mut self) {
        let Some(silence) = self.watchdog.tick(Instant::now(), TICK) else {
            return;
        };
        let reason = format!("no answer to a step for {:.1} s", silence.as_secs_f64());
        let epoch = self.last_epoch;
        self.lose(&reason);
        (self.options.control)(Control::ShardHung { epoch, reason });
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(request, reply) => {
                let answer = self.submit(*request);
                // Whoever left before admission wants nothing computed.
                if let Err(Ok(admitted)) = reply.send(answer) {
                    self.cancel(admitted.id);
                }
            }
            Command::Cancel(id) => self.cancel(id),
            Command::Load(spec, reply) => self.load(spec, reply),
            Command::Unload(name, reply) => {
                let _ = reply.send(self.unload(name));
            }
            Command::Pin(id, pinned) => {
                self.scheduler.adapters_mut().pin(id, pinned);
            }
            Command::Drain(done) => {
                self.draining = true;
                self.drains.push(done);
            }
            Command::Abort => self.scheduler.fail_all(self.now(), &Ended::ShuttingDown),
        }
    }

    fn submit(&mut self, request: ValidRequest) -> Result<Admitted, Refusal> {
        if self.draining {
            return Err(Refusal::Draining);
        }
        let name = |id| {
            self.registry
                .get(id)
                .map_or_else(String::new, |info| info.name)
        };
        let adapter = request.adapter;
        let asked = kvrun_scheduler::Request {
            prompt: request.prompt,
            adapter,
            max_new_tokens: request.max_new_tokens,
            end_tokens: request.end_tokens,
            tenant: request.tenant,
            deadline: request
                .deadline
                .map(|at| at.saturating_duration_since(self.origin)),
            reuse_prefix: request.reuse_prefix,
        };
        let id = self
            .scheduler
            .submit(self.now(), asked)
            .map_err(|refused| match refused {
                Refused::Overloaded(retry_after) => Refusal::Overloaded { retry_after },
                Refused::TooLong { asked, limit } => Refusal::TooLong { asked, limit },
                Refused::UnknownAdapter => {
                    Refusal::UnknownAdapter(adapter.map_or_else(String::new, name))
                }
                Refused::NotReady => Refusal::NotReady,
            })?;
        let (sender, events) = mpsc::unbounded_channel();
        let prompt = request.sampling.prompt_logprobs.then(Vec::new);
        let sampling = request.sampling;
        self.open.insert(
            id,
            Open {
                events: sender,
                sampling,
                prompt,
            },
        );
        Ok(Admitted { id, events })
    }

    fn cancel(&mut self, id: u64) {
        self.open.remove(&id);
        self.scheduler.cancel(self.now(), id);
    }

    fn register(&mut self, spec: AdapterSpec) -> AdapterId {
        let now = self.now();
        let id = self.scheduler.adapters_mut().register(0, spec.pinned, now);
        self.registry.add(id, spec);
        id
    }

    fn load(&mut self, spec: AdapterSpec, reply: LoadReply) {
        let id = match self.registry.named(&spec.name) {
            Some(old) if old.state == AdapterState::Failed => {
                self.scheduler.adapters_mut().leave(old.id);
                self.register(spec)
            }
            Some(old) if old.path != spec.path => {
                let _ = reply.send(Err(LoadError::Taken { name: spec.name }));
                return;
            }
            Some(old) => {
                let adapters = self.scheduler.adapters_mut();
                adapters.pin(old.id, spec.pinned || old.pinned);
                adapters.want(old.id);
                old.id
            }
            None => self.register(spec),
        };
        self.loads.push((id, reply));
    }

    fn unload(&mut self, name: String) -> Result<AdapterInfo, UnknownAdapter> {
        let Some(info) = self.registry.withdraw(&name) else {
            return Err(UnknownAdapter(name));
        };
        self.scheduler.adapters_mut().leave(info.id);
        let view = self.scheduler.adapters().get(info.id);
        let users = view.map_or(0, |view| view.users);
        let state = if users > 0 {
            AdapterState::Draining
        } else {
            AdapterState::Gone
        };
        Ok(AdapterInfo {
            users,
            state,
            ..info
        })
    }

    /// Tells every request what happened to it; tokens are taken from the outcome that brought them.
    fn deliver(&mut self, mut outcome: Option<Outcome>) {
        for event in self.scheduler.take_events() {
            let id = event.request;
            let Some(open) = self.open.get_mut(&id) else {
                continue;
            };
            // A send fails when the client just left; its cancellation is on the way.
            match event.what {
                What::Started {
                    queued,
                    cached_tokens,
                } => {
                    let _ = open.events.send(Event::Started {
                        queued,
                        cached_tokens,
                    });
                }
                What::Token { row, place } => {
                    let rows = outcome.as_mut().map(|outcome| &mut outcome.rows);
                    let Some(token) =
                        rows.and_then(|rows| rows.get_mut(row)?.tokens.get_mut(place))
                    else {
                        continue;
                    };
                    if let Some(prompt) = open.prompt.take() {
                        let _ = open.events.send(Event::Prompt(prompt));
                    }
                    let _ = open
                        .events
                        .send(Event::Token(wire::token(std::mem::take(token))));
                }
                What::Finished(finish) => {
                    let finish = match finish {
                        Complete::Length => Finish::Length,
                        Complete::EndToken => Finish::EndToken,
                    };
                    let _ = open.events.send(Event::Finished(finish));
                    self.open.remove(&id);
                }
                What::Failed(failure) => {
                    let _ = open
                        .events
                        .send(Event::Failed(self::failure(failure, &self.meters)));
                    self.open.remove(&id);
                }
            }
        }
    }

    /// Shows handles where things stand, and answers those who wait for that.
    fn show(&mut self) {
        self.registry.mirror(&self.scheduler);
        self.answer_loads();
        let load = self.scheduler.load();
        self.meters.load(&load);
        let serving = matches!(self.link, Link::Serving(_));
        let adapters = self.scheduler.adapters();
        let settled = |id: &AdapterId| adapters::outcome(adapters.get(*id)).is_some();
        self.first_loads.retain(|id| !settled(id));
        if serving && self.first_loads.is_empty() && !self.announce.send_replace(true) {
            (self.options.control)(Control::Ready);
        }
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.waiting_since = (!self.open.is_empty()).then_some(self.progressed);
        let status = &mut shown.status;
        status.ready = serving && *self.announce.borrow();
        status.draining = self.draining;
        status.max_total_tokens = self.scheduler.limit().unwrap_or(0);
        status.queued = load.waiting;
        status.running = load.running;
        status.free_pages = load.pages.free;
        status.cached_pages = load.pages.cached;
        drop(shown);
        if self.open.is_empty() {
            // Silence before new work is no stall.
            self.progressed = Instant::now();
            self.drains.drain(..).for_each(|done| {
                let _ = done.send(());
            });
        }
    }

    fn answer_loads(&mut self) {
        let adapters = self.scheduler.adapters();
        for (id, reply) in std::mem::take(&mut self.loads) {
            match (adapters::outcome(adapters.get(id)), self.registry.get(id)) {
                (Some(Ok(())), Some(info)) => drop(reply.send(Ok(info))),
                (Some(Err(error)), _) => drop(reply.send(Err(error))),
                _ => self.loads.push((id, reply)),
            }
        }
    }
}

/// Waits for whatever the link brings next. Cancel safe.
async fn hear(link: &mut Link) -> Woken {
    match link {
        Link::Connecting(group) => Woken::Group(group.await),
        Link::Serving(group) => Woken::Outcome(group.outcome().await),
    }
}

fn call(group: &Group, registry: &Registry, order: AdapterOrder) -> BoxFuture<'static, Called> {
    match order {
        AdapterOrder::Load { adapter, handle } => {
            let info = registry.get(adapter);
            let (name, path) = info.map_or_else(Default::default, |info| {
                (info.name, info.path.to_string_lossy().into_owned())
            });
            let load = group.load(handle, name, path);
            Box::pin(async move { Called::Loaded(handle, load.await) })
        }
        AdapterOrder::Unload { handle } => {
            let unload = group.unload(handle);
            Box::pin(async move {
                if let Err(status) = unload.await {
                    tracing::warn!(
                        handle,
                        reason = status.message(),
                        "an adapter was not unloaded"
                    );
                }
                Called::Unloaded(handle)
            })
        }
    }
}

/// A prompt that starts over has its log-probabilities computed anew.
fn forget_half_prompts(step: &Step, open: &mut HashMap<u64, Open>) {
    for admission in &step.admit {
        if let Some(Open {
            prompt: Some(kept), ..
        }) = open.get_mut(&admission.sequence)
        {
            kept.clear();
        }
    }
}

/// How an admitted sequence is sampled; what was told of its prompt is not computed again in a replay.
fn sampling(open: Option<&Open>) -> Sampling {
    let Some(open) = open else {
        return Sampling::default();
    };
    Sampling {
        prompt_logprobs: open.prompt.is_some(),
        ..open.sampling.clone()
    }
}

fn failure(ended: Ended, meters: &Meters) -> Failure {
    match ended {
        Ended::Row(text) => {
            meters.failed_rows.increment(1);
            Failure::Row(text)
        }
        Ended::Deadline => Failure::Deadline,
        Ended::ShuttingDown => Failure::ShuttingDown,
        Ended::Adapter(text) => Failure::Adapter(text),
        Ended::Unavailable(text) => Failure::Unavailable(text),
    }
}
