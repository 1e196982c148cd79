//! Planning a step: running sequences first, then prompts, within one budget of tokens and one pool of pages.

use crate::budget::Draft;
use crate::flight::InFlight;
use crate::step::{Admission, Failure, Row, Step};
use crate::{AdapterOrder, Scheduler, Time, waiting};

/// After so many preemptions a request comes back only with all pages it can ever need, and never gives way again.
pub(crate) const PREEMPTIONS: u32 = 3;

impl Scheduler {
    /// What adapters have to be loaded and unloaded now.
    pub fn plan_adapters(&mut self, now: Time) -> Vec<AdapterOrder> {
        let mut orders = Vec::new();
        if !self.adapters.restless() {
            return orders;
        }
        let oldest = self.queue.oldest_by_adapter();
        for id in self.adapters.plan(now, &oldest, &mut orders) {
            self.fail_adapter(now, id);
        }
        #[cfg(test)]
        if self.has(crate::PlantedBug::LeakRun) {
            return orders;
        }
        for order in &orders {
            // Calls and steps are not ordered among each other: what leaves the shard leaves its pages by a step.
            if let AdapterOrder::Unload { handle } = *order
                && let Some(adapter) = self.adapters.of_handle(handle)
            {
                self.displace(adapter);
            }
        }
        orders
    }

    /// The next step, if there is something to say and none in flight. Requests out of time fail first.
    pub fn plan(&mut self, now: Time) -> Option<Step> {
        self.expire(now);
        let epoch = self.epoch.as_ref()?;
        if !epoch.in_flight.is_empty() {
            return None;
        }
        if let Some(suspect) = self.suspects.first().copied() {
            let mut draft = Draft::new(self.step_tokens, self.config.step_rows);
            let mut admit = Vec::new();
            self.plan_alone(now, suspect, &mut draft, &mut admit);
            return self.send(now, draft.finish(), admit);
        }
        let (mut rows, admit, spare) = self.fill(now);
        self.speculate(&mut rows, spare);
        self.send(now, rows, admit)
    }

    /// Rows and admissions of a step, and the tokens of its budget that no row has a use for.
    pub(crate) fn fill(&mut self, now: Time) -> (Vec<Row>, Vec<Admission>, u32) {
        let mut draft = Draft::new(self.step_tokens, self.config.step_rows);
        let mut admit = Vec::new();
        // Newcomers would take the room that an image waits for.
        if self.plan_running(&mut draft) {
            self.plan_waiting(now, &mut draft, &mut admit);
        }
        let spare = draft.spare();
        (draft.finish(), admit, spare)
    }

    /// The step of these rows and all that is to be released, in flight from now on; `None` when it would say nothing.
    pub(crate) fn send(
        &mut self,
        now: Time,
        rows: Vec<Row>,
        admit: Vec<Admission>,
    ) -> Option<Step> {
        for row in &rows {
            if let Some(sequence) = self.sequences.get_mut(&row.sequence) {
                sequence.depart(row);
            }
            #[cfg(test)]
            if self.has(crate::PlantedBug::FreePrompts) && row.tokens > 1 {
                continue;
            }
            self.charge(row.sequence, row.known());
        }
        let epoch = self.epoch.as_mut()?;
        if rows.is_empty() && epoch.release.is_empty() && epoch.displace.is_empty() {
            return None;
        }
        let released = std::mem::take(&mut epoch.release);
        #[cfg(test)]
        let released = match self.planted {
            Some(crate::PlantedBug::UnholdEarly) => released
                .into_iter()
                .map(|released| released.unheld(&mut self.adapters))
                .collect(),
            _ => released,
        };
        epoch.steps += 1;
        let step = Step {
            epoch: epoch.number,
            number: epoch.steps,
            release: released.iter().map(|released| released.sequence).collect(),
            displace: std::mem::take(&mut epoch.displace),
            place: std::mem::take(&mut epoch.place),
            admit,
            rows: rows.clone(),
        };
        epoch.in_flight.push_back(InFlight {
            rows,
            released,
            planned: now,
        });
        #[cfg(test)]
        if self.has(crate::PlantedBug::PublishUnacked) {
            step.rows
                .iter()
                .for_each(|row| self.publish(row.sequence, row.start + row.tokens));
        }
        Some(step)
    }

    /// Has a request's tenant pay for tokens.
    pub(crate) fn charge(&mut self, id: u64, tokens: u32) {
        if let Some(sequence) = self.sequences.get(&id) {
            let adapter = sequence.request.adapter;
            self.fairness.charge(sequence.tenant, adapter, tokens);
        }
    }

    pub(crate) fn expire(&mut self, now: Time) {
        while let Some(&(at, id)) = self.deadlines.first() {
            if at > now {
                return;
            }
            let deadline = self
                .sequences
                .get(&id)
                .and_then(|sequence| sequence.request.deadline);
            let failure = if deadline.is_some_and(|deadline| deadline <= now) {
                Failure::Deadline
            } else {
                Failure::Unavailable(
                    "the model did not recover in time; send the request again".to_owned(),
                )
            };
            self.fail(now, id, failure);
        }
    }

    /// A suspect goes alone until it gets a token: if the shard dies again, it was this one.
    fn plan_alone(
        &mut self,
        now: Time,
        suspect: u64,
        draft: &mut Draft,
        admit: &mut Vec<Admission>,
    ) {
        if self.running.contains(&suspect) {
            if self.grow(suspect) {
                self.continue_row(suspect, draft);
            }
            return;
        }
        let adapter = self
            .sequences
            .get(&suspect)
            .and_then(|sequence| sequence.request.adapter);
        if adapter.is_some_and(|id| !self.adapters.usable(id)) {
            return;
        }
        if !self.admit(now, suspect, draft, admit) {
            // Nobody else makes progress meanwhile, so whoever holds pages has to give way.
            let others: Vec<u64> = self.running.iter().copied().collect();
            others.into_iter().for_each(|id| self.preempt(id, 0));
            self.admit(now, suspect, draft, admit);
        }
    }

    /// Decoding rows first, oldest first, then unfinished prompts. False when an image of one has to wait for room.
    fn plan_running(&mut self, draft: &mut Draft) -> bool {
        let running: Vec<u64> = self.running.iter().copied().collect();
        let (mut decoding, mut prompts) = (Vec::with_capacity(running.len()), Vec::new());
        for id in running {
            let Some(sequence) = self.sequences.get(&id) else {
                continue;
            };
            let spent = sequence.is_spent();
            #[cfg(test)]
            let spent = spent && !self.has(crate::PlantedBug::Overrun);
            match sequence.remaining() {
                _ if spent => {}
                1 => decoding.push(id),
                _ => prompts.push(id),
            }
        }
        let decoded = self.continue_rows(decoding, draft);
        draft.bound(self.chunk.beside(draft.rows()));
        self.continue_rows(prompts, draft) && decoded
    }

    fn continue_rows(&mut self, ids: Vec<u64>, draft: &mut Draft) -> bool {
        let mut all = true;
        for id in ids {
            // An older sequence may have taken its pages just now.
            if self.running.contains(&id) && self.grow(id) && draft.has_room() {
                all &= self.continue_row(id, draft);
            }
        }
        all
    }

    /// Adds a row for a running sequence, unless an image is next and does not fit; its new page, if any, is the last of
    /// its table.
    pub(crate) fn continue_row(&mut self, id: u64, draft: &mut Draft) -> bool {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return true;
        };
        let work = sequence.work_from(sequence.planned, &self.model);
        #[cfg(test)]
        let work = match self.planted {
            Some(crate::PlantedBug::CutImages) => crate::budget::Work {
                whole: Default::default(),
                ..work
            },
            _ => work,
        };
        if draft.share(&work) == 0 {
            return false;
        }
        let sent = std::mem::replace(&mut sequence.sent, sequence.table.len() as u32);
        let pages = sequence.table[sent as usize..].to_vec();
        draft.add(id, pages, work);
        true
    }

    /// Gives a running sequence pages for every known or pending token; adapters that nothing runs under give way, then the
    /// youngest sequences, itself included. False when it did.
    fn grow(&mut self, id: u64) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else {
                return false;
            };
            let lacks = sequence.lacks(self.model.page_tokens);
            #[cfg(test)]
            let lacks = match self.planted {
                Some(crate::PlantedBug::ForgetPending) => {
                    let known = sequence.journal.len();
                    let need = known.div_ceil(self.model.page_tokens);
                    need.saturating_sub(sequence.table.len() as u32)
                }
                _ => lacks,
            };
            if lacks == 0 {
                return true;
            }
            let adapter = sequence.request.adapter;
            if let Some(page) = self.pages.take() {
                sequence.table.push(page);
                continue;
            }
            if self.displace_coldest(adapter) {
                continue;
            }
            let may_give_way = |id: &&u64| {
                self.sequences
                    .get(id)
                    .is_some_and(|other| other.preemptions < PREEMPTIONS)
            };
            let Some(&youngest) = self.running.iter().rev().find(may_give_way) else {
                return false;
            };
            self.preempt(youngest, 1);
            if youngest == id {
                return false;
            }
        }
    }

    /// Takes a running sequence off the shard; it is replayed when there is room.
    fn preempt(&mut self, id: u64, counts: u32) {
        self.withdraw(id);
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.preemptions += counts;
            self.preemptions += 1;
            self.queue.push(waiting(id, sequence));
        }
    }
}
