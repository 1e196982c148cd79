//! Planning ahead: what the shards go on with while nobody knows yet what they sample now.
//!
//! A row names positions and no ids, so the row after one in flight is planned as if that one's token ended nothing. Where
//! it does end the answer, the row ahead is surplus: its answer is dropped, and the pages it writes are the sequence's own
//! until the release that the next step carries.

use crate::step::{Row, Step};
use crate::{Scheduler, Time};

impl Scheduler {
    /// A step to compute after the only one in flight; `None` where waiting for that one's outcome is better.
    ///
    /// It holds what the next step would hold if the outcome ended no answer. A step is never split in two, since the
    /// weights would be read twice: where some rows cannot go ahead, none does. Releases alone wait for the next step.
    pub fn plan_ahead(&mut self, now: Time) -> Option<Step> {
        self.expire(now);
        if self.epoch.as_ref()?.in_flight.len() != 1 || !self.may_go_ahead() {
            return None;
        }
        let (rows, admit, _) = self.fill(now);
        match rows.is_empty() {
            true => None,
            false => self.send(now, rows, admit),
        }
    }

    fn may_go_ahead(&self) -> bool {
        // Whoever is in flight when the shards die is blamed, so a suspect goes with nobody, before or behind it.
        let exact = self.suspects.is_empty() && !self.waits_for_ids();
        exact && !self.prompts_wait() && self.room_ahead()
    }

    /// Prompts wait until so many rows decoded alone once; a second step of these would go without prompts for nothing.
    fn prompts_wait(&self) -> bool {
        let running = self.running.iter().filter_map(|id| self.sequences.get(id));
        let growing = running.filter(|sequence| !sequence.is_spent());
        let (decoding, prompts): (Vec<_>, Vec<_>) =
            growing.partition(|sequence| sequence.remaining() == 1);
        let wait = !prompts.is_empty() || self.queue.requests() > 0;
        wait && self.chunk.beside(decoding.len() as u32) == 0
    }

    /// Guesses are looked up in the text before them, and how far a row with guesses came, its outcome alone says.
    fn waits_for_ids(&self) -> bool {
        #[cfg(test)]
        if self.has(crate::PlantedBug::GuessAhead) {
            return false;
        }
        let mut rows = self.in_flight();
        rows.any(|row| !row.guesses.is_empty()) || self.may_guess(self.running.len() as u32)
    }

    /// Whether every running sequence can have its next page. Nobody gives way while a row of it is in flight: that would
    /// be computed for nothing, and its answer would meet a sequence that began anew.
    fn room_ahead(&self) -> bool {
        #[cfg(test)]
        if self.has(crate::PlantedBug::PreemptInFlight) {
            return true;
        }
        let width = self.model.page_tokens;
        let running = self.running.iter().filter_map(|id| self.sequences.get(id));
        let growing = running.filter(|sequence| !sequence.is_spent());
        let lacking: u32 = growing.map(|sequence| sequence.lacks(width)).sum();
        lacking <= self.pages.available()
    }

    /// Rows without an answer, oldest step first.
    pub(crate) fn in_flight(&self) -> impl Iterator<Item = &Row> {
        let steps = self.epoch.iter().flat_map(|epoch| &epoch.in_flight);
        steps.flat_map(|step| &step.rows)
    }
}
