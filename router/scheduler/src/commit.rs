//! What comes back: outcomes into journals, lost epochs into replays, loaded adapters into their requests.

use crate::flight::Epoch;
use crate::pages::Pages;
use crate::sequence::Sequence;
use crate::step::{Acceptance, Event, Failure, Finish, Reply, Row, RowReply, Violation, What};
use crate::{AdapterId, Grant, LoadFault, QueueLimits, Scheduler, Time, waiting};

/// A request that recovers fails when no token came for this long.
const RECOVERY: Time = Time::from_secs(120);
/// Deaths in a row, without a token in between, after which a sequence is replayed alone.
const SUSPICIOUS: u32 = 2;
/// Deaths in a row after which it is given up.
const DEADLY: u32 = 3;

/// Tokens per second, smoothed, for an honest `Retry-After`.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    tokens_per_second: f64,
}

impl Pace {
    fn record(&mut self, tokens: u32, took: Time) {
        let seconds = took.as_secs_f64();
        if tokens > 0 && seconds > 0.0 {
            let now = f64::from(tokens) / seconds;
            let old = self.tokens_per_second;
            self.tokens_per_second = if old == 0.0 {
                now
            } else {
                0.95 * old + 0.05 * now
            };
        }
    }

    /// When `tokens` will have been computed, between 1 and 60 seconds.
    pub(crate) fn retry_after(&self, tokens: u64) -> Time {
        if self.tokens_per_second <= 0.0 {
            return Time::from_secs(1);
        }
        let seconds = (tokens as f64 / self.tokens_per_second).ceil();
        Time::from_secs(seconds.clamp(1.0, 60.0) as u64)
    }
}

impl Scheduler {
    /// Starts an epoch on empty shards. Requests that no longer fit its pool fail; all others are replayed.
    pub fn begin_epoch(&mut self, now: Time, grant: Grant) {
        if self.epoch.is_some() {
            self.lose_epoch(now);
        }
        self.epoch = Some(Epoch::new(grant.epoch));
        self.pages = Pages::new(grant.pages);
        self.adapters.begin(grant.adapter_bytes);
        self.model = grant.model;
        self.pool = grant.pages;
        self.step_tokens = grant.step_tokens;
        let pool = grant.pages.saturating_mul(self.model.page_tokens);
        let positions = match self.model.positions {
            0 => u32::MAX,
            positions => positions,
        };
        let limit = pool.min(positions).min(self.config.max_tokens);
        self.limit = Some(limit);
        self.queue.set_limits(QueueLimits {
            requests: self.config.queue_requests,
            tokens: match self.config.queue_tokens {
                0 => 4 * u64::from(pool),
                tokens => tokens,
            },
        });
        let too_long: Vec<u64> = self
            .sequences
            .iter()
            .filter(|(_, sequence)| {
                let tokens = sequence.journal.len() + sequence.unanswered();
                tokens > limit || !self.can_ever_fit(sequence)
            })
            .map(|(&id, _)| id)
            .collect();
        for id in too_long {
            let text = format!(
                "the server came back with room for {limit} tokens, fewer than this request needs"
            );
            self.fail(now, id, Failure::Unavailable(text));
        }
    }

    /// The shards are gone with all they held. Running requests wait for replay from their journals; those that were
    /// in flight are suspects, and one that was in flight alone at three deaths in a row is the culprit.
    pub fn lose_epoch(&mut self, now: Time) {
        let Some(epoch) = self.epoch.take() else {
            return;
        };
        self.pages = Pages::default();
        for id in std::mem::take(&mut self.running) {
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.table.clear();
                sequence.memory.clear();
                sequence.forget();
                self.queue.push(waiting(id, sequence));
                self.replays += 1;
                self.recover_by(id, Some(now + RECOVERY));
            }
        }
        #[cfg(test)]
        let kept: Vec<_> = self.adapters.placed().collect();
        for id in self.adapters.epoch_lost() {
            self.fail_adapter(now, id);
        }
        #[cfg(test)]
        if self.has(crate::PlantedBug::KeepPlaces) {
            kept.into_iter()
                .for_each(|(id, run)| self.adapters.place(id, run));
        }
        let rows = epoch.in_flight.iter().flat_map(|step| &step.rows);
        let mut struck: Vec<u64> = rows.map(|row| row.sequence).collect();
        struck.sort_unstable();
        // A death counts once, however many rows of a sequence were in flight.
        #[cfg(test)]
        if !self.has(crate::PlantedBug::StrikeTwice) {
            struck.dedup();
        }
        #[cfg(not(test))]
        struck.dedup();
        for id in struck {
            self.strike(now, id);
        }
    }

    fn strike(&mut self, now: Time, id: u64) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        sequence.strikes += 1;
        match sequence.strikes {
            0..SUSPICIOUS => {}
            SUSPICIOUS..DEADLY => {
                self.suspects.insert(id);
            }
            _ => {
                let fingerprint = sequence.request.fingerprint;
                self.quarantine.put(now, fingerprint);
                let alike = |(&id, other): (&u64, &Sequence)| {
                    (other.request.fingerprint == fingerprint).then_some(id)
                };
                let alike: Vec<u64> = self.sequences.iter().filter_map(alike).collect();
                for id in alike {
                    self.fail(now, id, Failure::Deadly);
                }
            }
        }
    }

    /// Takes an outcome. Journals grow before this returns, pages full of acknowledged tokens become findable.
    pub fn commit(&mut self, now: Time, reply: &Reply) -> Result<Acceptance, Violation> {
        let Some(epoch) = &mut self.epoch else {
            return Ok(Acceptance::Stale);
        };
        let stale = reply.epoch != epoch.number;
        #[cfg(test)]
        let stale = stale && self.planted != Some(crate::PlantedBug::AcceptStale);
        if stale || reply.number <= epoch.answered() {
            return Ok(Acceptance::Stale);
        }
        let (step, took) = epoch.land(now, reply)?;
        for adapter in step.released.iter().filter_map(|released| released.adapter) {
            self.adapters.unhold(adapter);
        }
        let tokens = step.rows.iter().map(Row::known).sum();
        self.pace.record(tokens, took);
        // What reading images or a source took says nothing of tokens.
        if !step.rows.iter().any(|row| self.reads_beside(row)) {
            let decoding = step.rows.iter().filter(|row| row.known() == 1).count() as u32;
            self.chunk.learn(decoding, tokens - decoding, took);
        }
        for (index, (row, answer)) in step.rows.iter().zip(&reply.rows).enumerate() {
            self.commit_row(now, index, row, answer);
        }
        Ok(Acceptance::Committed)
    }

    /// Whether a row is of a prompt that is more than tokens.
    fn reads_beside(&self, row: &Row) -> bool {
        self.request(row.sequence).is_some_and(|request| {
            let more = request.payload > 0 || request.memory_tokens > 0;
            more && (row.start as usize) < request.prompt.len()
        })
    }

    fn commit_row(&mut self, now: Time, index: usize, row: &Row, answer: &RowReply) {
        let id = row.sequence;
        // Ended while the step was in flight: its release goes with the next one, if it is not on its way.
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        sequence.land(row);
        let vocabulary = self.model.vocabulary;
        let foreign = answer.tokens.iter().find(|&&token| token >= vocabulary);
        if let Some(error) = &answer.error {
            return self.fail(now, id, Failure::Row(error.clone()));
        }
        if let Some(token) = foreign {
            let text =
                format!("the model answered token {token}, outside its vocabulary of {vocabulary}");
            return self.fail(now, id, Failure::Row(text));
        }
        if !row.guesses.is_empty() {
            self.learn(row, answer.tokens.len() as u32 - 1);
        }
        let mut computed = row.start + row.known();
        #[cfg(test)]
        if self.has(crate::PlantedBug::TrustInFlight) {
            let sequence = self.sequences.get(&id);
            computed = sequence.map_or(computed, |sequence| sequence.planned);
        }
        #[cfg(test)]
        if self.has(crate::PlantedBug::TrustGuesses) {
            computed = row.start + row.tokens;
        }
        self.publish(id, computed);
        for (place, &token) in answer.tokens.iter().enumerate() {
            // Another token after this one says that this one was a guess, and lies in its page.
            if place > 0 {
                computed += 1;
                self.publish(id, computed);
                self.charge(id, 1);
            }
            if self.commit_token(now, id, token, (index, place)) {
                return;
            }
        }
    }

    /// Appends a token to the journal; true when that completed the answer.
    fn commit_token(
        &mut self,
        now: Time,
        id: u64,
        token: u32,
        (row, place): (usize, usize),
    ) -> bool {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return true;
        };
        sequence.journal.commit(token);
        let recovered = sequence.recover_by.is_some();
        if std::mem::take(&mut sequence.strikes) > 0 {
            self.suspects.remove(&id);
        }
        let finish = if sequence.request.end_tokens.contains(&token) {
            Some(Finish::EndToken)
        } else if sequence.unanswered() == 0 {
            Some(Finish::Length)
        } else {
            None
        };
        if recovered {
            self.recover_by(id, None);
        }
        let what = What::Token { row, place };
        self.events.push(Event { request: id, what });
        if let Some(finish) = finish {
            self.close(now, id);
            let what = What::Finished(finish);
            self.events.push(Event { request: id, what });
        }
        finish.is_some()
    }

    /// The shard computed a sequence up to `computed`: offers its newly filled pages to the cache.
    pub(crate) fn publish(&mut self, id: u64, computed: u32) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        let width = self.model.page_tokens;
        let (first, full) = (sequence.published, computed / width);
        sequence.acknowledge(computed);
        sequence.published = full;
        if !sequence.request.shares(&self.model) {
            return;
        }
        if full > first {
            let keys = sequence.keys(full, width)[first as usize..].to_vec();
            let pages = &sequence.table[first as usize..full as usize];
            for (&page, key) in pages.iter().zip(keys) {
                self.pages.publish(page, key);
            }
        }
    }

    /// A load succeeded with this content, taking `bytes` on the fullest rank, and `pages` of the pool while it is used.
    ///
    /// When the content is not what it was, answers begun under the old one cannot go on and fail. Where it takes more
    /// pages than there are, it fails.
    pub fn adapter_loaded(&mut self, now: Time, handle: u64, digest: &str, bytes: u64, pages: u32) {
        let taken = (bytes, pages);
        let Some((adapter, changed)) = self.adapters.loaded(handle, digest, taken, now) else {
            return;
        };
        self.check_place(now, adapter);
        if !changed {
            return;
        }
        let begun: Vec<u64> = self
            .sequences
            .iter()
            .filter(|(_, sequence)| sequence.request.adapter == Some(adapter))
            .filter(|(_, sequence)| !sequence.journal.answer().is_empty())
            .map(|(&id, _)| id)
            .collect();
        for id in begun {
            let text =
                "the adapter's files changed while the answer was written; send the request again";
            self.fail(now, id, Failure::Adapter(text.to_owned()));
        }
    }

    /// A load failed; its waiting requests fail with it, unless it is tried again.
    pub fn adapter_load_failed(&mut self, now: Time, handle: u64, fault: LoadFault, reason: &str) {
        if let Some(adapter) = self.adapters.load_failed(now, handle, fault, reason) {
            self.fail_adapter(now, adapter);
        }
    }

    /// An unload is done.
    pub fn adapter_unloaded(&mut self, handle: u64) {
        self.adapters.unloaded(handle);
    }

    /// Ends every request of an adapter whose load failed for good.
    pub(crate) fn fail_adapter(&mut self, now: Time, adapter: AdapterId) {
        let reason = match self.adapters.get(adapter).map(|view| &view.residency) {
            Some(crate::Residency::Failed { reason, .. }) => reason.clone(),
            _ => return,
        };
        let of_it = |(&id, sequence): (&u64, &Sequence)| {
            (sequence.request.adapter == Some(adapter)).then_some(id)
        };
        let open: Vec<u64> = self.sequences.iter().filter_map(of_it).collect();
        for id in open {
            self.fail(now, id, Failure::Adapter(reason.clone()));
        }
    }
}
