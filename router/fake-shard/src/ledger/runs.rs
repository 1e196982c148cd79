//! Adapters in pages: which pages are an adapter's, and nobody else's.

use super::{Breach, Ledger};
use kvrun_proto::Placement;
use std::collections::HashMap;
use std::ops::Range;

/// The pages of adapters that were placed, by handle.
#[derive(Debug, Default)]
pub(super) struct Runs {
    of: HashMap<u64, Range<u32>>,
}

impl Runs {
    pub(super) fn holds(&self, handle: u64) -> bool {
        self.of.contains_key(&handle)
    }

    pub(super) fn pages(&self) -> usize {
        self.of.values().map(ExactSizeIterator::len).sum()
    }

    /// The pages of an adapter from now on.
    pub(super) fn add(
        &mut self,
        handle: u64,
        first: u32,
        pages: u32,
    ) -> Result<Range<u32>, Breach> {
        rule!(pages > 0, "adapter {handle} placed, which wants no pages");
        rule!(!self.holds(handle), "adapter {handle} placed twice");
        let run = first..first.saturating_add(pages);
        let other = self
            .of
            .iter()
            .find(|(_, other)| other.start < run.end && run.start < other.end);
        if let Some((other, at)) = other {
            return Err(Breach::Rule(format!(
                "adapter {handle} placed in pages {run:?}, adapter {other} lies in {at:?}"
            )));
        }
        self.of.insert(handle, run.clone());
        Ok(run)
    }

    pub(super) fn remove(&mut self, handle: u64) -> Result<(), Breach> {
        rule!(
            self.of.remove(&handle).is_some(),
            "adapter {handle} displaced, which lies in no pages"
        );
        Ok(())
    }

    /// No sequence is given an adapter's page.
    pub(super) fn check_outside(&self, page: u32, sequence: u64) -> Result<(), Breach> {
        let owner = self.of.iter().find(|(_, run)| run.contains(&page));
        match owner {
            Some((handle, _)) => Err(Breach::Rule(format!(
                "sequence {sequence}: page {page} is adapter {handle}'s"
            ))),
            None => Ok(()),
        }
    }
}

impl Ledger {
    /// Forgets an adapter that no admitted sequence uses. Its pages are its own until a step displaces it.
    pub fn unload(&mut self, handle: u64) -> Result<(), Breach> {
        self.check_unused(handle, "unloaded")?;
        self.adapters.remove(&handle);
        Ok(())
    }

    fn check_unused(&self, handle: u64, what: &str) -> Result<(), Breach> {
        let user = self
            .sequences
            .iter()
            .find(|(_, sequence)| sequence.adapter == handle);
        match user {
            Some((id, _)) => Err(Breach::Rule(format!(
                "adapter {handle} {what} while sequence {id} uses it"
            ))),
            None => Ok(()),
        }
    }

    pub(super) fn displace(&mut self, handle: u64) -> Result<(), Breach> {
        self.check_unused(handle, "displaced")?;
        self.runs.remove(handle)
    }

    /// What lay in the pages of an adapter is overwritten.
    pub(super) fn place(&mut self, place: &Placement) -> Result<(), Breach> {
        let handle = place.adapter;
        let Some(adapter) = self.adapters.get(&handle) else {
            return Err(Breach::Rule(format!(
                "adapter {handle} placed, which is not loaded"
            )));
        };
        let run = self.runs.add(handle, place.first, adapter.pages)?;
        for page in run {
            rule!(
                u64::from(page) < self.sizes.pages,
                "adapter {handle}: page {page} is outside the pool"
            );
            rule!(
                self.users[page as usize] == 0,
                "adapter {handle}: page {page} is in the table of a sequence"
            );
            self.pages[page as usize].clear();
        }
        Ok(())
    }

    /// Pages that adapters lie in.
    pub fn adapter_pages(&self) -> usize {
        self.runs.pages()
    }
}
