//! The engine's task: it owns the scheduler, keeps the shards in steps, and tells every request what happened to it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use kvrun_proto::Outcome;
use kvrun_scheduler::{Acceptance, AdapterId, Config, Grant, Model, Scheduler, Step, Time};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::Status;

use super::adapters::Registry;
use super::calls::{Called, call};
use super::meters::Meters;
use super::shards::{self, Group, Wish};
use super::tell::{Open, forget_half_prompts, size};
use super::watchdog::Watchdog;
use super::{Command, Control, EngineOptions, Shown, wire};
use crate::capabilities;
use crate::request::{AdapterInfo, LoadError};

/// How often time alone is looked at, as long as it can change anything: deadlines, silence, rotation of adapters.
const TICK: Duration = Duration::from_millis(250);
/// Commands taken between two steps at most, so that a flood of them cannot stop the streams.
const COMMANDS: usize = 256;

/// The group that serves, or the wish for one.
pub(super) enum Link {
    Connecting(BoxFuture<'static, Group>),
    Serving(Box<Group>),
}

/// What woke the task.
enum Woken {
    Outcome(Result<Outcome, Status>),
    Group(Group),
    Command(Option<Command>),
    Called(Called),
    Tick,
}

pub(super) type LoadReply = oneshot::Sender<Result<AdapterInfo, LoadError>>;

/// The task's state.
pub(super) struct Driver {
    pub(super) options: EngineOptions,
    pub(super) commands: mpsc::UnboundedReceiver<Command>,
    pub(super) registry: Arc<Registry>,
    pub(super) shown: Shown,
    pub(super) announce: watch::Sender<bool>,
    pub(super) scheduler: Scheduler,
    pub(super) link: Link,
    pub(super) last_epoch: u64,
    /// The epoch that `Control::Ready` was last said for.
    pub(super) announced: u64,
    calls: FuturesUnordered<BoxFuture<'static, Called>>,
    pub(super) open: HashMap<u64, Open>,
    pub(super) loads: Vec<(AdapterId, LoadReply)>,
    /// Adapters of the options whose first load has no outcome yet.
    pub(super) first_loads: BTreeSet<AdapterId>,
    pub(super) drains: Vec<oneshot::Sender<()>>,
    pub(super) draining: bool,
    pub(super) origin: Instant,
    pub(super) watchdog: Watchdog,
    pub(super) progressed: Instant,
    /// Whether each step in flight computes no prompt, oldest first.
    pub(super) decodes: VecDeque<bool>,
    /// Whether a step is sent while another is in flight.
    pub(super) overlaps: bool,
    pub(super) meters: Meters,
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
            step_rows: options.step_rows.max(1),
            max_tokens: match options.max_total_tokens {
                0 => u32::MAX,
                tokens => tokens,
            },
            queue_requests: options.queue_requests,
            queue_tokens: options.queue_tokens,
            share_prefixes: options.share_prefixes,
            speculate: options.speculate,
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
            announced: 0,
            calls: FuturesUnordered::new(),
            open: HashMap::new(),
            loads: Vec::new(),
            first_loads: BTreeSet::new(),
            drains: Vec::new(),
            draining: false,
            origin: now,
            watchdog: Watchdog::default(),
            progressed: now,
            decodes: VecDeque::new(),
            overlaps: false,
            meters: Meters::new(),
            options,
        };
        for spec in std::mem::take(&mut driver.options.adapters) {
            let adapters = driver.scheduler.adapters_mut();
            let id = adapters.register_early(0, spec.pinned, Time::ZERO);
            driver.registry.add(id, spec);
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
            let rests = self.scheduler.rests();
            let (link, calls) = (&mut self.link, &mut self.calls);
            let woken = tokio::select! {
                biased;
                woken = hear(link) => woken,
                called = calls.next(), if !calls.is_empty() => called.map_or(Woken::Tick, Woken::Called),
                command = self.commands.recv() => Woken::Command(command),
                _ = ticks.tick(), if !rests => Woken::Tick,
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

    pub(super) fn now(&self) -> Time {
        self.origin.elapsed()
    }

    pub(super) fn connect(&self) -> Link {
        let wish = Wish {
            sockets: self.options.sockets.clone(),
            pool_tokens: self.options.pool_tokens,
            step_tokens: self.options.step_tokens,
            step_rows: self.options.step_rows.max(1),
            adapter_bytes: self.options.adapter_bytes,
            max_total_tokens: self.options.max_total_tokens,
        };
        Link::Connecting(Box::pin(shards::connect(wish, self.last_epoch)))
    }

    pub(super) fn begin(&mut self, group: Group) {
        let (description, reserved) = (group.description.clone(), group.reservation.clone());
        tracing::info!(
            epoch = group.epoch,
            pages = reserved.pages,
            model = description.model_id,
            "serving"
        );
        for off in capabilities::off(&description) {
            tracing::info!(off.feature, off.reason, "off for this model");
        }
        self.last_epoch = group.epoch;
        let grant = Grant {
            epoch: group.epoch,
            pages: u32::try_from(reserved.pages).unwrap_or(u32::MAX),
            step_tokens: group.step_tokens,
            adapter_bytes: reserved.adapter_bytes,
            model: Model {
                digest: description.model_digest.clone(),
                page_tokens: description.page_tokens.max(1),
                vocabulary: description.vocabulary,
                positions: capabilities::positions(&description, self.options.max_total_tokens),
                recurrent: capabilities::is_recurrent(&description),
                together: description
                    .images
                    .as_ref()
                    .is_some_and(|rule| rule.together),
                long_after: description.long_after,
            },
        };
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let status = &mut shown.status;
        status.epoch = group.epoch;
        status.pages = grant.pages;
        status.page_tokens = grant.model.page_tokens;
        status.adapter_bytes = grant.adapter_bytes;
        status.captured = reserved.captured;
        status.step_tokens = grant.step_tokens;
        status.step_rows = self.options.step_rows.max(1);
        self.overlaps = self.options.overlap.is_on(&description.device);
        status.overlap = self.overlaps;
        status.description = Some(description);
        drop(shown);
        self.scheduler.begin_epoch(self.now(), grant);
        self.progressed = Instant::now();
        self.link = Link::Serving(Box::new(group));
    }

    /// The epoch is over: everything that ran waits for the next one.
    pub(super) fn lose(&mut self, reason: &str) {
        tracing::warn!(
            epoch = self.last_epoch,
            reason,
            open = self.open.len(),
            "lost the model shards"
        );
        for decodes in self.decodes.drain(..) {
            self.meters.lost(decodes);
        }
        self.watchdog.rest();
        self.calls.clear();
        self.scheduler.lose_epoch(self.now());
        self.link = self.connect();
    }

    /// Commits an outcome and sends what follows before anybody hears of it: the shards wait, the clients do not.
    pub(super) async fn outcome(&mut self, mut outcome: Outcome) {
        let received = Instant::now();
        let reply = wire::reply(&outcome);
        match self.scheduler.commit(self.now(), &reply) {
            Ok(Acceptance::Committed) => {}
            Ok(Acceptance::Stale) => return,
            Err(violation) => return self.lose(&violation.to_string()),
        }
        self.progressed = received;
        let took = self.watchdog.answered(received);
        let decodes = self.decodes.pop_front().unwrap_or_default();
        let waited = !self.watchdog.in_flight();
        let sent = self.advance();
        if sent {
            self.meters.gap(received.elapsed());
        }
        // A step ahead is planned when an outcome comes, and not when a request does, so that requests that come close
        // after each other are in one step.
        let ahead = self.advance_ahead();
        if ahead && !waited {
            self.meters.hidden(received.elapsed());
        }
        if sent || ahead {
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

    /// Orders loads and sends the next step, if there is anything to say; says whether a step was sent.
    pub(super) fn advance(&mut self) -> bool {
        let now = self.now();
        let orders = self.scheduler.plan_adapters(now);
        let planned = self.scheduler.plan(now);
        let Link::Serving(group) = &mut self.link else {
            return false;
        };
        for order in orders {
            self.calls.push(call(group, &self.registry, order));
        }
        planned.is_some_and(|step| self.send(step))
    }

    /// Sends the step after the one in flight, where steps overlap and there is something to go on with.
    fn advance_ahead(&mut self) -> bool {
        if !self.overlaps {
            return false;
        }
        let planned = self.scheduler.plan_ahead(self.now());
        planned.is_some_and(|step| self.send(step))
    }

    fn send(&mut self, step: Step) -> bool {
        let Link::Serving(group) = &mut self.link else {
            return false;
        };
        forget_half_prompts(&step, &mut self.open);
        let size = size(&step, &self.open);
        let decodes = step.rows.iter().all(|row| row.known() == 1);
        let sent = group.send(wire::step(&self.scheduler, step, &self.open));
        self.watchdog.sent(Instant::now(), size);
        self.meters.sent(decodes);
        self.decodes.push_back(decodes);
        if let Err(status) = sent {
            self.lose(&status.to_string());
            return false;
        }
        true
    }

    pub(super) fn watch(&mut self) {
        let Some(silence) = self.watchdog.tick(Instant::now(), TICK) else {
            return;
        };
        let reason = format!("no answer to a step for {:.1} s", silence.as_secs_f64());
        let epoch = self.last_epoch;
        self.lose(&reason);
        (self.options.control)(Control::ShardHung { epoch, reason });
    }
}

/// Waits for whatever the link brings next. Cancel safe.
async fn hear(link: &mut Link) -> Woken {
    match link {
        Link::Connecting(group) => Woken::Group(group.await),
        Link::Serving(group) => Woken::Outcome(group.outcome().await),
    }
}
