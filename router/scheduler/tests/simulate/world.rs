//! The simulated world: clients, a clock, a strict shard, and everything that can go wrong between them.

macro_rules! hold {
    ($holds:expr, $($text:tt)*) => {
        if !$holds {
            return Err(format!($($text)*));
        }
    };
}

mod adapters;
mod beside;
mod clients;
mod fair;
mod foreseen;
mod judge;
mod seen;
mod wire;

use beside::{Beside, Kind};
use fair::Served;
use foreseen::Foreseen;
pub use seen::Seen;

use clients::Culprit;
use kvrun_fake_shard::faults::{Faults, Mark};
use kvrun_fake_shard::ledger::{Breach, Ledger, Sizes};
use kvrun_scheduler::{
    Acceptance, AdapterId, Config, Grant, Model, PlantedBug, Reply, Request, RowReply, Scheduler,
    Step, Time,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use wire::wire;

const VOCABULARY: u32 = 500;
/// A prompt or answer with this token fails its row.
const BAD: u32 = 1;
/// The shard dies whenever it computes a sequence with this token.
const POISON: u32 = 2;
const END: u32 = 3;
/// Deaths in flight without a token in between that may end a request.
const DEADLY: u32 = 3;

struct Client {
    request: Request,
    beside: Beside,
    sampling: kvrun_proto::Sampling,
    /// The answer alone, known from the first token on.
    expected: Option<Vec<u32>>,
    got: Vec<u32>,
    ended: bool,
    submitted: Time,
    /// On the shard, as the steps said.
    running: bool,
    strikes: u32,
    recovering_since: Option<Time>,
}

struct Folder {
    digest: String,
    bytes: u64,
    pages: u32,
    loaded: Option<String>,
    broken: bool,
    left: bool,
    was_unusable: bool,
}

enum Call {
    Load(AdapterId, u64),
    Unload(u64),
}

/// A step on its way.
struct Sent {
    step: Step,
    wire: kvrun_proto::Step,
    /// The last step that was answered when this one was planned.
    answered: u64,
}

pub struct World {
    rng: StdRng,
    told: bool,
    now: Time,
    scheduler: Scheduler,
    shard: Option<Ledger>,
    sizes: Sizes,
    kind: Kind,
    adapter_bytes: u64,
    /// Most pages that an adapter takes; 0 = they lie elsewhere.
    adapter_pages: u32,
    epoch: u64,
    /// Steps on their way; the shard computes one when it is answered, however much happened since it was sent.
    in_flight: VecDeque<Sent>,
    /// Steps answered in this epoch.
    answered: u64,
    /// Whether a step is sent while another is in flight.
    overlaps: bool,
    faults: Faults,
    clients: BTreeMap<u64, Client>,
    folders: BTreeMap<AdapterId, Folder>,
    calls: Vec<Call>,
    prompts: Vec<Vec<u32>>,
    served: Served,
    foreseen: Foreseen,
    /// Requests that the shard died of, and when.
    culprits: Vec<Culprit>,
    shrunk: bool,
    /// Whether calls about adapters may still go unanswered.
    troubled: bool,
    seen: Seen,
}

impl World {
    pub fn new(seed: u64, planted: Option<PlantedBug>, told: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let kind = Kind::any(&mut rng);
        let sizes = Sizes {
            pages: rng.random_range(6..60),
            page_tokens: rng.random_range(1..5),
            step_tokens: rng.random_range(1..40),
            step_rows: rng.random_range(1..10),
            vocabulary: VOCABULARY,
            positions: rng.random_range(20..200),
            ..kind.sizes()
        };
        let overlaps = rng.random();
        let config = Config {
            step_rows: sizes.step_rows,
            max_tokens: u32::MAX,
            queue_requests: rng.random_range(1..24),
            queue_tokens: if rng.random_bool(0.5) { 0 } else { 400 },
            share_prefixes: rng.random_bool(0.5),
            speculate: match overlaps && rng.random_bool(0.7) {
                true => 0,
                false => rng.random_range(0..6),
            },
        };
        let mut scheduler = Scheduler::new(config);
        if let Some(bug) = planted {
            scheduler.plant(bug);
        }
        let foreseen = Foreseen::default();
        if rng.random_bool(0.9) {
            let foreseen = foreseen.clone();
            scheduler.foresee(move |id, known, most| foreseen.guess(id, known, most));
        }
        let faults = Faults::default();
        faults.mark(BAD, Mark::RowError("nan_logits".to_owned()));
        faults.mark(POISON, Mark::Poison);
        let prompts = (0..3)
            .map(|_| {
                let length = rng.random_range(1..30);
                (0..length)
                    .map(|_| rng.random_range(4..VOCABULARY))
                    .collect()
            })
            .collect();
        let adapter_bytes = rng.random_range(10..60);
        let adapter_pages = match rng.random_bool(0.7) {
            true => rng.random_range(1..24),
            false => 0,
        };
        Self {
            rng,
            told,
            now: Time::ZERO,
            scheduler,
            shard: None,
            sizes,
            kind,
            adapter_bytes,
            adapter_pages,
            epoch: 0,
            in_flight: VecDeque::new(),
            answered: 0,
            overlaps,
            faults,
            clients: BTreeMap::new(),
            folders: BTreeMap::new(),
            calls: Vec::new(),
            prompts,
            served: Served::default(),
            foreseen,
            culprits: Vec::new(),
            shrunk: false,
            troubled: true,
            seen: Seen::default(),
        }
    }

    /// Runs to the end of the story and then until everything is given back.
    pub fn run(mut self) -> Result<Seen, String> {
        let acts = self.rng.random_range(40..220);
        for _ in 0..acts {
            self.act()?;
            self.check()?;
        }
        self.calm()?;
        let load = self.scheduler.load();
        self.seen.preemptions = load.preemptions;
        self.seen.replays = load.replays;
        self.seen.wrong_guesses = load.guessed.tokens - load.guessed.right;
        Ok(self.seen)
    }

    fn tell(&self, text: impl FnOnce() -> String) {
        if self.told {
            println!("{:>9.3} {}", self.now.as_secs_f64(), text());
        }
    }

    fn act(&mut self) -> Result<(), String> {
        self.now += Time::from_millis(self.rng.random_range(0..40));
        match self.rng.random_range(0..100) {
            0..18 => self.submit(),
            18..22 => self.cancel(),
            22..24 => self.die("killed"),
            24 => {
                self.now += Time::from_secs(self.rng.random_range(1..200));
                self.tell(|| "the clock jumps".to_owned());
                self.turn()
            }
            25..33 => self.churn(),
            33..45 => self.finish_call(),
            _ if self.shard.is_none() => self.begin(),
            _ => self.turn(),
        }
    }

    fn long_after(&self) -> u32 {
        self.sizes.positions / 2
    }

    fn is_long(&self, request: &Request) -> bool {
        request.prompt.len() as u32 + request.max_new_tokens > self.long_after()
    }

    fn begin(&mut self) -> Result<(), String> {
        self.epoch += self.rng.random_range(1..3);
        let mut sizes = self.sizes;
        if self.rng.random_bool(0.05) {
            sizes.pages = (sizes.pages / 2).max(1);
            self.shrunk = true;
        }
        self.shard = Some(Ledger::new(sizes));
        self.answered = 0;
        let grant = Grant {
            epoch: self.epoch,
            pages: sizes.pages as u32,
            step_tokens: sizes.step_tokens,
            adapter_bytes: self.adapter_bytes,
            model: Model {
                digest: "model".to_owned(),
                page_tokens: sizes.page_tokens,
                vocabulary: VOCABULARY,
                positions: sizes.positions,
                long_after: self.long_after(),
                ..self.kind.model()
            },
        };
        self.tell(|| format!("epoch {} begins with {} pages", grant.epoch, grant.pages));
        self.scheduler.begin_epoch(self.now, grant);
        self.hear(None)
    }

    fn die(&mut self, why: &str) -> Result<(), String> {
        if self.shard.take().is_none() {
            return Ok(());
        }
        self.tell(|| format!("the shard dies: {why}"));
        self.seen.deaths += 1;
        self.calls.clear();
        self.folders
            .values_mut()
            .for_each(|folder| folder.loaded = None);
        let flown = self.in_flight.drain(..).flat_map(|sent| sent.step.rows);
        let struck: BTreeSet<u64> = flown.map(|row| row.sequence).collect();
        for id in &struck {
            let alone = struck.len() == 1;
            if let Some(client) = self.clients.get_mut(id).filter(|client| !client.ended) {
                client.strikes += 1;
                if client.strikes >= DEADLY {
                    self.culprits.push(Culprit::of(client, self.now));
                }
                hold!(
                    client.strikes < DEADLY || alone,
                    "request {id} is blamed among others"
                );
            }
        }
        for client in self.clients.values_mut() {
            client.recovering_since.get_or_insert(self.now);
            client.running = false;
        }
        self.scheduler.lose_epoch(self.now);
        self.hear(None)?;
        self.judge_culprits()
    }

    /// Either the next step is planned, or the oldest in flight is answered; both may go wrong.
    fn turn(&mut self) -> Result<(), String> {
        self.orders()?;
        if self.shard.is_none() {
            return Ok(());
        }
        if self.in_flight.is_empty() {
            return self.plan();
        }
        if self.rng.random_bool(0.1) {
            self.plan_ahead()?;
        }
        let Some(reply) = self.compute()? else {
            return Ok(());
        };
        let dice = self.rng.random_range(0..100);
        match dice {
            // A reply that never comes is found by the watchdog.
            0 => return self.die("it hangs"),
            1..4 => self.whisper(&reply)?,
            4 if !reply.rows.is_empty() => {
                let mut broken = reply.clone();
                broken.rows.pop();
                return self.refuse(&broken, "it breaks the protocol");
            }
            8 => {
                let number = reply.number + 1;
                let skipping = Reply { number, ..reply };
                return self.refuse(&skipping, "it skips a step");
            }
            _ => {}
        }
        self.commit(&reply)?;
        if (4..8).contains(&dice) {
            self.seen.stale += 1;
            let accepted = self
                .scheduler
                .commit(self.now, &reply)
                .map_err(|violation| violation.to_string())?;
            hold!(accepted == Acceptance::Stale, "a reply was taken twice");
        }
        if self.rng.random_bool(0.8) {
            self.plan()?;
        }
        match self.rng.random_bool(0.9) {
            true => self.plan_ahead(),
            false => Ok(()),
        }
    }

    /// The shard computes the oldest step in flight; no reply when it dies of it, or nothing is in flight.
    fn compute(&mut self) -> Result<Option<Reply>, String> {
        let (Some(sent), Some(shard)) = (self.in_flight.front(), &mut self.shard) else {
            return Ok(None);
        };
        let computed = shard.step(&sent.wire, sent.answered, &self.faults);
        let (epoch, number) = (sent.step.epoch, sent.step.number);
        self.tell(|| format!("step {number} -> {computed:?}"));
        match computed {
            Ok(rows) => {
                let rows = rows.into_iter().map(|row| RowReply {
                    sequence: row.sequence,
                    tokens: row.tokens.iter().map(|token| token.id).collect(),
                    error: (!row.error.is_empty()).then_some(row.error),
                });
                Ok(Some(Reply {
                    epoch,
                    number,
                    rows: rows.collect(),
                }))
            }
            Err(Breach::Rule(text)) => Err(text),
            Err(Breach::Poison) => self.die("poison").map(|()| None),
        }
    }

    /// The reply to the oldest step in flight comes.
    fn commit(&mut self, reply: &Reply) -> Result<(), String> {
        self.in_flight.pop_front();
        self.answered = reply.number;
        let ended = |row: &&RowReply| {
            let client = self.clients.get(&row.sequence);
            client.is_some_and(|client| client.ended)
        };
        self.seen.surplus += reply.rows.iter().filter(ended).count() as u64;
        let accepted = self
            .scheduler
            .commit(self.now, reply)
            .map_err(|violation| violation.to_string())?;
        hold!(
            accepted == Acceptance::Committed,
            "a good reply was dropped"
        );
        self.hear(Some(reply))
    }

    /// A reply that must not be taken; the epoch ends by it.
    fn refuse(&mut self, reply: &Reply, why: &str) -> Result<(), String> {
        hold!(
            self.scheduler.commit(self.now, reply).is_err(),
            "a reply was taken although {why}"
        );
        self.die(why)
    }

    /// An old epoch speaks: the right rows, other tokens.
    fn whisper(&mut self, reply: &Reply) -> Result<(), String> {
        let mut old = reply.clone();
        old.epoch -= 1;
        for token in old.rows.iter_mut().flat_map(|row| &mut row.tokens) {
            *token = (*token + 1) % VOCABULARY;
        }
        self.seen.stale += 1;
        let accepted = self
            .scheduler
            .commit(self.now, &old)
            .map_err(|violation| violation.to_string())?;
        if accepted == Acceptance::Committed {
            return self
                .hear(Some(&old))
                .and(Err("a reply of an old epoch was taken".to_owned()));
        }
        Ok(())
    }

    fn plan(&mut self) -> Result<(), String> {
        let planned = self.scheduler.plan(self.now);
        hold!(
            planned.is_none() || self.in_flight.is_empty(),
            "a step was planned while one is in flight"
        );
        self.send(planned)
    }

    fn plan_ahead(&mut self) -> Result<(), String> {
        if !self.overlaps {
            return Ok(());
        }
        let planned = self.scheduler.plan_ahead(self.now);
        if let Some(step) = &planned {
            self.seen.ahead += 1;
            hold!(
                self.in_flight.len() == 1 && !step.rows.is_empty(),
                "{} steps were in flight ahead of {step:?}",
                self.in_flight.len()
            );
        }
        self.send(planned)
    }

    fn send(&mut self, planned: Option<Step>) -> Result<(), String> {
        self.hear(None)?;
        let late = self.clients.iter().find(|(_, client)| {
            !client.ended
                && client
                    .request
                    .deadline
                    .is_some_and(|deadline| deadline <= self.now)
        });
        hold!(
            late.is_none(),
            "request {:?} outlived its deadline",
            late.map(|(id, _)| id)
        );
        let Some(step) = planned else {
            return Ok(());
        };
        self.seen.steps += 1;
        self.judge_rows(&step)?;
        self.seen.placed += step.place.len() as u64;
        self.seen.displaced += step.displace.len() as u64;
        self.judge_turns(&step)?;
        let wire = wire(&self.scheduler, &step, &self.clients);
        self.tell(|| format!("{step:?}"));
        self.in_flight.push_back(Sent {
            step,
            wire,
            answered: self.answered,
        });
        Ok(())
    }
}
