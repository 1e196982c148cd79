//! The pure core of the router: events and the time go in, a step comes out.
//!
//! It owns the queue, the page table, the prefix cache, adapter residency, fairness and the journal of every open
//! request. No I/O, no clock, no randomness: the same calls give the same steps, which is what makes it simulable.

mod adapters;
mod admit;
mod ahead;
mod audit;
mod budget;
mod chunk;
mod commit;
mod fairness;
mod flight;
mod lookup;
mod pages;
mod placing;
mod plan;
#[cfg(test)]
mod planted;
mod prefix;
mod quarantine;
mod queue;
mod sequence;
mod span;
mod speculate;
mod step;
mod submit;

// The simulator plants bugs, which no other build may hold; it reads as if it stood outside.
#[cfg(test)]
extern crate self as kvrun_scheduler;
#[cfg(test)]
#[path = "../tests/simulate/mod.rs"]
mod simulate;

pub use adapters::{AdapterOrder, AdapterView, Adapters, LoadFault, Residency};
pub use pages::PageCounts;
#[cfg(test)]
pub use planted::PlantedBug;
pub use queue::QueueLimits;
pub use sequence::{Journal, Request};
pub use span::Span;
pub use speculate::Guessed;
pub use step::{
    Acceptance, Admission, Event, Failure, Finish, Placement, Refusal, Reply, Row, RowReply, Step,
    Violation, What,
};

use chunk::Chunk;
use commit::Pace;
use fairness::Fairness;
use flight::{Epoch, Released};
use pages::Pages;
use quarantine::Quarantine;
use queue::{Queue, Waiting};
use sequence::Sequence;
use std::collections::{BTreeMap, BTreeSet};

/// Time since an origin of the caller's choice; it never runs backwards.
pub type Time = std::time::Duration;

/// Names one registration of an adapter; never reused within the router's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub u64);

/// The operator's choices.
#[derive(Debug, Clone)]
pub struct Config {
    /// Most rows of one step.
    pub step_rows: u32,
    /// Most tokens of one sequence, whatever model and pool; `u32::MAX` = no limit of its own.
    pub max_tokens: u32,
    /// Most requests that may wait.
    pub queue_requests: u32,
    /// Most tokens that may wait; 0 = four times the pool.
    pub queue_tokens: u64,
    /// Whether tenants share cached prefixes.
    pub share_prefixes: bool,
    /// Most tokens of a sequence that one step computes on a guess; 0 = none.
    pub speculate: u32,
}

/// What the shards say about the model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Model {
    /// Its digest; part of every prefix key.
    pub digest: String,
    /// Tokens of one page.
    pub page_tokens: u32,
    /// Ids at or above it fail their row.
    pub vocabulary: u32,
    /// Most tokens of one sequence; 0 = no limit of its own.
    pub positions: u32,
    /// Whether a sequence keeps a recurrent state, which no other can share a part of.
    pub recurrent: bool,
    /// Whether the ids of an image see each other, so that one step must compute them all.
    pub together: bool,
    /// A sequence that may come to more tokens is computed as a long one from its first; 0 = none is.
    pub long_after: u32,
}

/// A new epoch, as the shards granted it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Its number, greater than any before.
    pub epoch: u64,
    /// Pages on every rank.
    pub pages: u32,
    /// Most tokens of one step. Beside decoding rows prompts get fewer, so that a step takes about twice as long as one
    /// without them: answers flow on while many prompts wait, and these wait longer.
    pub step_tokens: u32,
    /// Bytes for adapters on every rank.
    pub adapter_bytes: u64,
    /// What they loaded.
    pub model: Model,
}

/// How busy the core is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests in the queue.
    pub waiting: u32,
    /// Tokens they count for.
    pub waiting_tokens: u64,
    /// Requests on the shard.
    pub running: u32,
    /// Where the pages are.
    pub pages: PageCounts,
    /// Times a request gave way to an older one, ever.
    pub preemptions: u64,
    /// Times a running request was replayed in a new epoch, ever.
    pub replays: u64,
    /// What speculation did.
    pub guessed: Guessed,
}

/// The scheduler. Every method that can end requests leaves events for [`Scheduler::take_events`].
#[derive(Debug)]
pub struct Scheduler {
    config: Config,
    model: Model,
    epoch: Option<Epoch>,
    /// Most tokens of one sequence; known from the first epoch on.
    limit: Option<u32>,
    /// Pages of this epoch, or of the last one.
    pool: u32,
    /// Most tokens of a step, likewise.
    step_tokens: u32,
    sequences: BTreeMap<u64, Sequence>,
    running: BTreeSet<u64>,
    /// Sequences that were in flight at two deaths in a row; each is replayed alone.
    suspects: BTreeSet<u64>,
    quarantine: Quarantine,
    queue: Queue,
    fairness: Fairness,
    pages: Pages,
    adapters: Adapters,
    deadlines: BTreeSet<(Time, u64)>,
    events: Vec<Event>,
    pace: Pace,
    chunk: Chunk,
    preemptions: u64,
    replays: u64,
    guessed: Guessed,
    last_id: u64,
    #[cfg(test)]
    planted: Option<PlantedBug>,
    #[cfg(test)]
    foresight: Option<speculate::Foresight>,
}

impl Scheduler {
    /// A core that waits for its first epoch.
    pub fn new(config: Config) -> Self {
        let limits = QueueLimits {
            requests: config.queue_requests,
            tokens: config.queue_tokens,
        };
        Self {
            config,
            model: Model::default(),
            epoch: None,
            limit: None,
            pool: 0,
            step_tokens: 0,
            sequences: BTreeMap::new(),
            running: BTreeSet::new(),
            suspects: BTreeSet::new(),
            quarantine: Quarantine::default(),
            queue: Queue::new(limits),
            fairness: Fairness::default(),
            pages: Pages::default(),
            adapters: Adapters::default(),
            deadlines: BTreeSet::new(),
            events: Vec::new(),
            pace: Pace::default(),
            chunk: Chunk::default(),
            preemptions: 0,
            replays: 0,
            guessed: Guessed::default(),
            last_id: 0,
            #[cfg(test)]
            planted: None,
            #[cfg(test)]
            foresight: None,
        }
    }

    /// Plants a bug.
    #[cfg(test)]
    pub fn plant(&mut self, bug: PlantedBug) {
        self.planted = Some(bug);
    }

    #[cfg(test)]
    fn has(&self, bug: PlantedBug) -> bool {
        self.planted == Some(bug)
    }

    /// Forgets a request, whatever its state; its pages are free before this returns. Unknown ids are no error.
    pub fn cancel(&mut self, now: Time, id: u64) {
        #[cfg(test)]
        if self.has(PlantedBug::LeakPage)
            && let Some(sequence) = self.sequences.get_mut(&id)
        {
            sequence.table.pop();
        }
        self.close(now, id);
    }

    /// Ends every open request with a failure.
    pub fn fail_all(&mut self, now: Time, failure: &Failure) {
        let open: Vec<u64> = self.sequences.keys().copied().collect();
        for id in open {
            self.fail(now, id, failure.clone());
        }
    }

    /// What happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Prompt and committed answer of an open request.
    pub fn journal(&self, id: u64) -> Option<&Journal> {
        self.sequences.get(&id).map(|sequence| &sequence.journal)
    }

    /// What an open request asked for.
    pub fn request(&self, id: u64) -> Option<&Request> {
        self.sequences.get(&id).map(|sequence| &sequence.request)
    }

    /// The registry of adapters.
    pub fn adapters(&self) -> &Adapters {
        &self.adapters
    }

    /// The registry of adapters, to register, pin, want or dismiss.
    pub fn adapters_mut(&mut self) -> &mut Adapters {
        &mut self.adapters
    }

    /// Most tokens of one sequence; `None` before the first epoch.
    pub fn limit(&self) -> Option<u32> {
        self.limit
    }

    /// How busy it is.
    pub fn load(&self) -> Load {
        Load {
            waiting: self.queue.requests(),
            waiting_tokens: self.queue.tokens(),
            running: self.running.len() as u32,
            pages: self.pages.counts(),
            preemptions: self.preemptions,
            replays: self.replays,
            guessed: self.guessed,
        }
    }

    /// Whether no request is open and nothing is left to tell the shards.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.epoch.as_ref().is_none_or(Epoch::is_quiet)
    }

    /// Whether time alone changes nothing: it is idle, and no adapter has to come or go.
    pub fn rests(&self) -> bool {
        self.is_idle() && !self.adapters.restless()
    }

    /// The earliest moment at which a request fails by time alone; `plan` must be called by then.
    pub fn next_deadline(&self) -> Option<Time> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Ends a request with a failure.
    fn fail(&mut self, now: Time, id: u64, failure: Failure) {
        if self.close(now, id) {
            self.events.push(Event {
                request: id,
                what: What::Failed(failure),
            });
        }
    }

    /// Takes a request out of everything that knows it; false when nobody does.
    fn close(&mut self, now: Time, id: u64) -> bool {
        self.withdraw(id);
        let Some(sequence) = self.sequences.remove(&id) else {
            return false;
        };
        self.queue.remove(waiting(id, &sequence));
        if let Some(at) = sequence.expires() {
            self.deadlines.remove(&(at, id));
        }
        self.suspects.remove(&id);
        let adapter = sequence.request.adapter;
        self.fairness.close(sequence.tenant, adapter);
        if let Some(adapter) = adapter {
            self.adapters.close(adapter, now);
        }
        true
    }

    /// Takes a running sequence off the shard: its pages are free at once, because the next step releases it first, and
    /// the shards compute what is in flight before that step.
    fn withdraw(&mut self, id: u64) {
        if !self.running.remove(&id) {
            return;
        }
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        #[cfg(test)]
        if self.planted == Some(PlantedBug::LeakMemory) {
            sequence.memory.pop();
        }
        self.pages.give_back(&mut sequence.table);
        self.pages.give_back(&mut sequence.memory);
        sequence.forget();
        if let Some(adapter) = sequence.request.adapter {
            self.adapters.rest(adapter);
        }
        if let Some(epoch) = &mut self.epoch {
            let released = Released {
                sequence: id,
                adapter: sequence.request.adapter,
            };
            #[cfg(test)]
            if self.planted == Some(PlantedBug::ReleaseInFlight)
                && let Some(step) = epoch.in_flight.back_mut()
            {
                step.released.push(released);
                return;
            }
            epoch.release.push(released);
        }
    }

    /// Changes when a request fails by time alone.
    fn recover_by(&mut self, id: u64, by: Option<Time>) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        if let Some(at) = sequence.expires() {
            self.deadlines.remove(&(at, id));
        }
        sequence.recover_by = by;
        if let Some(at) = sequence.expires() {
            self.deadlines.insert((at, id));
        }
    }
}

/// A sequence as the queue counts it.
fn waiting(id: u64, sequence: &Sequence) -> Waiting {
    let request = &sequence.request;
    Waiting {
        id,
        tenant: sequence.tenant,
        adapter: request.adapter,
        tokens: request.tokens(),
        submitted: sequence.submitted,
    }
}
