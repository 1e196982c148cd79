//! The invariants, recomputed from scratch. Slow by design: tests call it at every step.

use crate::{AdapterId, Scheduler};
use std::collections::{BTreeMap, BTreeSet};

impl Scheduler {
    /// Checks everything that must hold between two calls; the text says what does not.
    pub fn audit(&self) -> Result<(), String> {
        self.pages.audit(
            self.sequences
                .values()
                .flat_map(|sequence| [sequence.table.as_slice(), sequence.memory.as_slice()]),
            self.adapters.placed().map(|(_, run)| run),
        )?;
        self.audit_places()?;
        let (mut users, mut held, mut running) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for (id, sequence) in &self.sequences {
            if let Some(adapter) = sequence.request.adapter {
                *users.entry(adapter).or_default() += 1;
                if self.running.contains(id) {
                    *held.entry(adapter).or_default() += 1;
                    *running.entry(adapter).or_default() += 1;
                }
            }
        }
        self.releasing()
            .for_each(|adapter| *held.entry(adapter).or_default() += 1);
        self.adapters.audit(&users, &held, &running)?;
        let open = self.fairness.open_requests();
        if open != self.sequences.len() as u32 {
            return Err(format!(
                "{open} requests share the machine, {} are open",
                self.sequences.len()
            ));
        }
        let timed = self
            .sequences
            .iter()
            .filter_map(|(&id, sequence)| Some((sequence.expires()?, id)));
        if timed.collect::<BTreeSet<_>>() != self.deadlines {
            return Err("the deadlines are not those of the open requests".to_owned());
        }
        Ok(())
    }

    /// Adapters of released sequences that the shard may still hold.
    fn releasing(&self) -> impl Iterator<Item = AdapterId> + '_ {
        let epoch = self.epoch.as_ref();
        let waiting = epoch.into_iter().flat_map(|epoch| &epoch.release);
        let sent = epoch.into_iter().flat_map(|epoch| &epoch.in_flight);
        waiting
            .chain(sent.flat_map(|step| &step.released))
            .filter_map(|released| released.adapter)
    }

    /// Every open request either runs or waits, and only running ones hold pages.
    fn audit_places(&self) -> Result<(), String> {
        let (mut waiting, mut tokens) = (0, 0);
        for (&id, sequence) in &self.sequences {
            let runs = self.running.contains(&id);
            let waits = self
                .queue
                .contains(sequence.tenant, sequence.request.adapter, id);
            if runs == waits {
                return Err(format!("request {id} runs: {runs}, waits: {waits}"));
            }
            if waits {
                waiting += 1;
                tokens += sequence.request.tokens();
            }
            let (own, memory) = (sequence.table.len(), sequence.memory.len());
            if waits && (own + memory > 0 || sequence.planned > 0) {
                return Err(format!(
                    "request {id} waits and holds {own} pages and {memory} of memory"
                ));
            }
            let beside = sequence
                .request
                .memory_tokens
                .div_ceil(self.model.page_tokens);
            if runs && memory != beside as usize {
                return Err(format!(
                    "request {id} holds {memory} pages of memory and needs {beside}"
                ));
            }
            if runs && sequence.computed >= sequence.journal.len() {
                return Err(format!("request {id} has nothing left to compute"));
            }
            let flown = self.in_flight().filter(|row| row.sequence == id);
            let (mut planned, mut pending) = (sequence.computed, 0);
            for row in flown.filter(|_| runs) {
                planned = row.start + row.known();
                pending += u32::from(row.sample);
            }
            if (sequence.planned, sequence.pending) != (planned, pending) {
                return Err(format!(
                    "request {id} counts {} tokens planned and {} pending, {planned} and {pending} are",
                    sequence.planned, sequence.pending
                ));
            }
            if sequence.preemptions > 3 {
                return Err(format!(
                    "request {id} was preempted {} times",
                    sequence.preemptions
                ));
            }
        }
        if let Some(id) = self
            .running
            .iter()
            .chain(&self.suspects)
            .find(|id| !self.sequences.contains_key(id))
        {
            return Err(format!("request {id} is closed and still scheduled"));
        }
        if (waiting, tokens) != (self.queue.requests(), self.queue.tokens()) {
            return Err(format!(
                "{waiting} requests wait, {} are queued",
                self.queue.requests()
            ));
        }
        Ok(())
    }
}
