//! Clients: what they ask for, which refusals they accept, and when they leave.

use super::{BAD, Beside, Client, END, POISON, VOCABULARY, World};
use kvrun_scheduler::{AdapterId, Refusal, Request, Time};
use rand::Rng;
use rand::seq::IndexedRandom;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

/// What a request that the shard died of asked for.
pub(super) struct Culprit {
    pub(super) fingerprint: u64,
    pub(super) since: Time,
    prompt: Arc<[u32]>,
    adapter: Option<AdapterId>,
    beside: Beside,
}

impl Culprit {
    pub(super) fn of(client: &Client, since: Time) -> Self {
        Self {
            fingerprint: client.request.fingerprint,
            since,
            prompt: client.request.prompt.clone(),
            adapter: client.request.adapter,
            beside: client.beside.clone(),
        }
    }
}

fn fingerprint(prompt: &[u32], adapter: Option<AdapterId>, beside: &Beside) -> u64 {
    let mut hasher = DefaultHasher::new();
    (prompt, adapter, &beside.source, &beside.images).hash(&mut hasher);
    hasher.finish()
}

impl World {
    /// How much longer a request is to be kept out, by the book.
    fn sentence(&self, fingerprint: u64) -> Option<Time> {
        let same = |culprit: &&Culprit| culprit.fingerprint == fingerprint;
        let last = self.culprits.iter().rev().find(same)?;
        let until = last.since + Time::from_secs(600);
        (until > self.now).then(|| until - self.now)
    }

    /// Nobody goes on who asks the same as a culprit of this moment.
    pub(super) fn judge_culprits(&self) -> Result<(), String> {
        for culprit in self.culprits.iter().filter(|one| one.since == self.now) {
            let same = |client: &Client| client.request.fingerprint == culprit.fingerprint;
            let left = self
                .clients
                .iter()
                .find(|(_, client)| !client.ended && same(client));
            hold!(
                left.is_none(),
                "request {:?} goes on",
                left.map(|(id, _)| id)
            );
        }
        Ok(())
    }

    pub(super) fn submit(&mut self) -> Result<(), String> {
        let mut prompt = self
            .prompts
            .choose(&mut self.rng)
            .cloned()
            .unwrap_or_default();
        prompt.truncate(self.rng.random_range(1..=prompt.len()));
        let tail = self.rng.random_range(0..6);
        prompt.extend((0..tail).map(|_| self.rng.random_range(4..VOCABULARY)));
        match self.rng.random_range(0..60) {
            0 => prompt.push(POISON),
            1 | 2 => prompt.push(BAD),
            _ => {}
        }
        let beside = Beside::any(self.kind, &mut prompt, &mut self.rng);
        let registered: Vec<_> = self.folders.keys().copied().collect();
        let adapter = match self.rng.random_bool(0.5) {
            true => registered.choose(&mut self.rng).copied(),
            false => None,
        };
        // Clients try again what failed.
        let again = match self.rng.random_bool(0.1) {
            true => self.culprits.choose(&mut self.rng),
            false => None,
        };
        let (prompt, adapter, beside) = match again {
            Some(same) => (same.prompt.clone(), same.adapter, same.beside.clone()),
            None => (Arc::from(prompt), adapter, beside),
        };
        let deadline = self
            .rng
            .random_bool(0.1)
            .then(|| self.now + Time::from_secs(self.rng.random_range(0..30)));
        let request = Request {
            fingerprint: fingerprint(&prompt, adapter, &beside),
            prompt,
            adapter,
            max_new_tokens: self.rng.random_range(1..40),
            end_tokens: Arc::from([END]),
            tenant: Arc::from(["a", "b", "c"][self.rng.random_range(0..3)]),
            deadline,
            reuse_prefix: self.rng.random_bool(0.9),
            memory_tokens: beside.memory_tokens(self.kind),
            images: beside.spans(),
            payload: 0,
        };
        let sampling = kvrun_proto::Sampling {
            temperature: 1.0,
            seed: self.rng.random(),
            ..Default::default()
        };
        let total = request.prompt.len() as u32 + request.max_new_tokens;
        match self.scheduler.submit(self.now, request.clone()) {
            Ok(id) => {
                hold!(
                    self.sentence(request.fingerprint).is_none(),
                    "a culprit came back early"
                );
                self.enter(&request.tenant);
                self.tell(|| format!("request {id}: {request:?}"));
                self.seen.memories += u64::from(request.memory_tokens > 0);
                self.seen.images += beside.images.len() as u64;
                let client = Client {
                    request,
                    beside,
                    sampling,
                    expected: None,
                    got: Vec::new(),
                    ended: false,
                    submitted: self.now,
                    running: false,
                    strikes: 0,
                    recovering_since: None,
                };
                self.clients.insert(id, client);
            }
            Err(refusal) => {
                self.seen.refusals += 1;
                match refusal {
                    Refusal::NotReady => {
                        hold!(self.epoch == 0, "not ready in epoch {}", self.epoch)
                    }
                    Refusal::TooLong { asked, limit } => {
                        let folder = adapter.and_then(|id| self.folders.get(&id));
                        let pages = folder.map_or(0, |folder| folder.pages);
                        let beside = (request.memory_tokens > 0 || pages > 0) && asked >= total;
                        hold!(
                            (asked == total || beside) && asked > limit,
                            "{total} tokens refused under {limit}"
                        );
                    }
                    Refusal::Indivisible { asked, limit } => {
                        let least = request.memory_tokens + beside.largest(self.kind).max(1);
                        hold!(
                            asked == least && limit == self.sizes.step_tokens && asked > limit,
                            "{least} tokens in one piece refused under {limit}"
                        );
                        self.seen.indivisible += 1;
                    }
                    Refusal::UnknownAdapter => {
                        let folder = adapter.and_then(|id| self.folders.get(&id));
                        hold!(
                            folder.is_some_and(|folder| folder.left || folder.was_unusable),
                            "a good adapter is unknown"
                        );
                    }
                    Refusal::Quarantined(remaining) => {
                        hold!(
                            self.sentence(request.fingerprint) == Some(remaining),
                            "kept out for {remaining:?}"
                        );
                        self.seen.kept_out += 1;
                    }
                    Refusal::Overloaded(after) => {
                        self.enter(&request.tenant);
                        hold!(
                            after >= Time::from_secs(1) && after <= Time::from_secs(60),
                            "retry after {after:?}"
                        );
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn cancel(&mut self) -> Result<(), String> {
        let open: Vec<u64> = self
            .clients
            .iter()
            .filter(|(_, client)| !client.ended)
            .map(|(&id, _)| id)
            .collect();
        if let Some(&id) = open.choose(&mut self.rng) {
            self.tell(|| format!("request {id} is cancelled"));
            self.scheduler.cancel(self.now, id);
            self.clients.remove(&id);
            self.seen.cancelled += 1;
        }
        self.hear(None)
    }
}
