//! Admission: who of those that wait comes to the shard, with which pages.

use crate::budget::Draft;
use crate::plan::PREEMPTIONS;
use crate::prefix::Key;
use crate::span::cut_at;
use crate::step::{Admission, Event, What};
use crate::{AdapterId, Scheduler, Time, waiting};

/// A request is admitted with room for this many tokens of its answer, so that it is not preempted at once.
const HEADROOM_TOKENS: u32 = 128;

impl Scheduler {
    /// Admits those that wait, in their order, as far as rows, tokens and pages are left.
    pub(crate) fn plan_waiting(
        &mut self,
        now: Time,
        draft: &mut Draft,
        admit: &mut Vec<Admission>,
    ) {
        // Every running sequence needs a row and a token in each step.
        let most = self.config.step_rows.min(self.step_tokens) as usize;
        self.pages.clear_for(0);
        while draft.has_room() && self.running.len() < most {
            let adapters = &self.adapters;
            let usable = |id: Option<AdapterId>| id.is_none_or(|id| adapters.usable(id));
            let Some(id) = self.queue.next(&self.fairness, now, usable) else {
                return;
            };
            // Whoever is next waits for pages and nobody overtakes, or the large would starve.
            if !self.admit(now, id, draft, admit) {
                return;
            }
        }
    }

    /// Moves a waiting request to the shard if its pages fit; shared ones are found in the prefix cache.
    pub(crate) fn admit(
        &mut self,
        now: Time,
        id: u64,
        draft: &mut Draft,
        admit: &mut Vec<Admission>,
    ) -> bool {
        let alone = self.running.is_empty();
        // Where nothing runs, only pages that it would share can stand between those that its adapter wants.
        self.admit_sharing(true, now, id, draft, admit)
            || (alone && self.admit_sharing(false, now, id, draft, admit))
    }

    fn admit_sharing(
        &mut self,
        shares: bool,
        now: Time,
        id: u64,
        draft: &mut Draft,
        admit: &mut Vec<Admission>,
    ) -> bool {
        let alone = self.running.is_empty();
        let width = self.model.page_tokens;
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return false;
        };
        let (handle, digest) = match sequence
            .request
            .adapter
            .map(|id| self.adapters.resident(id))
        {
            None => (0, ""),
            Some(Some(resident)) => resident,
            Some(None) => return false,
        };
        #[cfg(test)]
        let digest = match self.planted {
            Some(crate::PlantedBug::KeyWithoutAdapter) => "",
            _ => digest,
        };
        let salt = match self.config.share_prefixes {
            true => "",
            false => &*sequence.request.tenant,
        };
        let long = sequence.request.is_long(&self.model);
        let root = Key::root(&self.model.digest, digest, salt);
        let root = if long { root.of_long() } else { root };
        #[cfg(test)]
        let root = match self.planted {
            Some(crate::PlantedBug::KeyWithoutLength) => {
                Key::root(&self.model.digest, digest, salt)
            }
            _ => root,
        };
        sequence.set_root(root);
        let known = sequence.journal.len();
        let mut table = Vec::new();
        if shares && sequence.request.reuse_prefix && sequence.request.shares(&self.model) {
            // The last token is always computed: its logits are what the row is for.
            table = self.pages.find(sequence.keys((known - 1) / width, width));
        }
        let work = loop {
            let work = sequence.work_from(table.len() as u32 * width, &self.model);
            match cut_at(&work.whole, work.start) {
                Some(span) => table.truncate((span.start / width) as usize),
                None => break work,
            }
        };
        let (memory, payload) = (sequence.request.memory_tokens, sequence.request.payload);
        if !draft.takes(memory, payload, &work) {
            return false;
        }
        let shared = table.len() as u32;
        let whole = known + sequence.unanswered();
        let (target, headroom) = if sequence.preemptions >= PREEMPTIONS {
            (whole.div_ceil(width), 0)
        } else if alone {
            (known.div_ceil(width), 0)
        } else {
            let roomy = (known + HEADROOM_TOKENS).min(whole).div_ceil(width);
            let target = known.div_ceil(width);
            (target, roomy - target)
        };
        let beside = memory.div_ceil(width);
        let (adapter, more) = (
            sequence.request.adapter,
            target - shared + headroom + beside,
        );
        let Some(run) = self.room_for(adapter, more, &table) else {
            return false;
        };
        if let (Some(adapter), Some(run)) = (adapter, run) {
            self.place(adapter, run);
        }
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return false;
        };
        table.iter().for_each(|&page| self.pages.share(page));
        table.extend((shared..target).map_while(|_| self.pages.take()));
        self.queue.remove(waiting(id, sequence));
        sequence.table = table;
        sequence.memory = (0..beside).map_while(|_| self.pages.take()).collect();
        sequence.acknowledge(shared * width);
        sequence.published = shared;
        sequence.sent = 0;
        if !sequence.started {
            sequence.started = true;
            let what = What::Started {
                queued: now.saturating_sub(sequence.submitted),
                cached_tokens: shared * width,
            };
            self.events.push(Event { request: id, what });
        }
        if let Some(adapter) = sequence.request.adapter {
            self.adapters.hold(adapter);
        }
        self.running.insert(id);
        admit.push(Admission {
            sequence: id,
            adapter: handle,
            memory: sequence.memory.clone(),
            long,
        });
        draft.admit(memory, payload);
        self.fairness
            .charge(sequence.tenant, sequence.request.adapter, memory);
        self.continue_row(id, draft);
        true
    }
}
