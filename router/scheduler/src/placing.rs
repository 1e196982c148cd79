//! Adapters in the pages of the pool: they come before their rows run, and leave when others need the room.

use crate::pages::Run;
use crate::sequence::Sequence;
use crate::step::{Failure, Placement};
use crate::{AdapterId, Scheduler, Time};

impl Scheduler {
    /// Finds room for so many pages of a sequence beside those it shares, and for its adapter where that lies in no pages
    /// yet: answers with the adapter's. Adapters that nothing runs under leave for it.
    pub(crate) fn room_for(
        &mut self,
        adapter: Option<AdapterId>,
        pages: u32,
        shared: &[u32],
    ) -> Option<Option<Run>> {
        let wanted = adapter.map_or(0, |id| self.adapters.unplaced(id));
        #[cfg(test)]
        if self.has(crate::PlantedBug::PlaceOverOthers) && wanted > 0 {
            let first = self.pages.total() - wanted;
            let pages = wanted;
            return Some(Some(Run { first, pages }));
        }
        loop {
            let available = self.pages.available() - self.pages.idle_among(shared);
            if pages + wanted <= available {
                match self.pages.find_run(wanted, shared) {
                    _ if wanted == 0 => return Some(None),
                    Some(run) => return Some(Some(run)),
                    None => {}
                }
            }
            if !self.displace_coldest(adapter) {
                // Whoever grows meanwhile takes other pages.
                self.pages.clear_for(wanted);
                return None;
            }
        }
    }

    /// Has the next step bring an adapter into a run that was found for it.
    pub(crate) fn place(&mut self, adapter: AdapterId, run: Run) {
        self.pages.lend(run);
        self.pages.clear_for(0);
        self.adapters.place(adapter, run);
        #[cfg(test)]
        if self.has(crate::PlantedBug::RowsBeforePlacement) {
            return;
        }
        let resident = self.adapters.resident(adapter);
        if let (Some(epoch), Some((handle, _))) = (&mut self.epoch, resident) {
            epoch.place.push(Placement {
                adapter: handle,
                first: run.first,
            });
        }
    }

    /// Frees the pages of an adapter that nothing runs under: the next step displaces it before it computes.
    pub(crate) fn displace(&mut self, adapter: AdapterId) {
        let Some((handle, run)) = self.adapters.displace(adapter) else {
            return;
        };
        self.pages.take_back(run);
        #[cfg(test)]
        if self.has(crate::PlantedBug::DisplaceUntold) {
            return;
        }
        if let Some(epoch) = &mut self.epoch {
            epoch.displace.push(handle);
        }
    }

    /// Displaces the adapter beside `wanted` that can go first; false when none can.
    pub(crate) fn displace_coldest(&mut self, wanted: Option<AdapterId>) -> bool {
        let coldest = self.adapters.coldest(wanted);
        #[cfg(test)]
        let coldest = match self.planted {
            Some(crate::PlantedBug::DisplaceInUse) => {
                self.adapters.placed().map(|(id, _)| id).next()
            }
            _ => coldest,
        };
        match coldest {
            Some(adapter) => {
                self.displace(adapter);
                true
            }
            None => false,
        }
    }

    /// An adapter was loaded: ends its requests if it can never be placed, or else those that do not fit beside it.
    pub(crate) fn check_place(&mut self, now: Time, adapter: AdapterId) {
        let pages = self.adapters.pages(Some(adapter));
        if pages > 0 && pages >= self.pool {
            self.adapters.too_large(adapter, self.pool);
            return self.fail_adapter(now, adapter);
        }
        let too_long = |(&id, sequence): (&u64, &Sequence)| {
            let of_it = sequence.request.adapter == Some(adapter);
            (of_it && !self.can_ever_fit(sequence)).then_some(id)
        };
        let open: Vec<u64> = self.sequences.iter().filter_map(too_long).collect();
        for id in open {
            let text = format!(
                "the adapter takes {pages} of {} pages, and this request needs more than are left; ask for fewer tokens",
                self.pool
            );
            self.fail(now, id, Failure::Adapter(text));
        }
    }

    /// Whether a request fits the pool beside its adapter when nothing else does.
    pub(crate) fn can_ever_fit(&self, sequence: &Sequence) -> bool {
        let tokens = sequence.journal.len() + sequence.unanswered();
        let request = &sequence.request;
        let (asked, limit) = self.pool_tokens(tokens, request.memory_tokens, request.adapter);
        asked <= limit
    }
}
