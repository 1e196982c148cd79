//! Runs of adjacent pages, which adapters lie in.

use super::Pages;
use std::collections::HashSet;
use std::ops::Range;

/// Adjacent pages, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// The lowest of them.
    pub first: u32,
    /// How many.
    pub pages: u32,
}

impl Run {
    fn range(self) -> Range<u32> {
        self.first..self.first + self.pages
    }
}

impl Pages {
    /// Where so many adjacent pages are free or idle, without taking them: where the cache loses least, the highest of
    /// those. `spared` are idle pages that somebody is about to share.
    pub(crate) fn find_run(&self, pages: u32, spared: &[u32]) -> Option<Run> {
        let spared: HashSet<u32> = spared.iter().copied().collect();
        let blocked = |page: u32| self.users[page as usize] > 0 || spared.contains(&page);
        let (run, in_use) = self.cheapest(pages, blocked)?;
        (in_use == 0).then_some(run)
    }

    /// Takes a run that was found for one adapter; what was cached there is forgotten.
    pub(crate) fn lend(&mut self, run: Run) {
        run.range().for_each(|page| self.claim(page));
        self.lent += run.pages;
    }

    /// Takes back an adapter's run.
    pub(crate) fn take_back(&mut self, run: Run) {
        for page in run.range() {
            self.users[page as usize] = 0;
            self.free.insert(page);
        }
        self.lent -= run.pages;
    }

    /// Hands out the pages last that a run of so many can have soonest; 0 = no run is waited for.
    pub(crate) fn clear_for(&mut self, pages: u32) {
        let blocked = |page: u32| self.users[page as usize] > 0;
        let soonest = self.cheapest(pages, blocked);
        self.cleared = soonest.map_or(0..0, |(run, _)| run.range());
    }

    /// The run with the fewest blocked pages, then the fewest idle ones, then the highest; and how many are blocked.
    fn cheapest(&self, pages: u32, blocked: impl Fn(u32) -> bool) -> Option<(Run, u32)> {
        if pages == 0 || pages > self.total() {
            return None;
        }
        let cost = |page: u32| match blocked(page) {
            true => (1, 0),
            false => (0, u32::from(self.index.holds(page))),
        };
        let (mut in_use, mut cached) = (0, 0);
        let mut best: Option<((u32, u32), u32)> = None;
        for first in (0..self.total()).rev() {
            let (more_used, more_cached) = cost(first);
            (in_use, cached) = (in_use + more_used, cached + more_cached);
            if first + pages > self.total() {
                continue;
            }
            if best.is_none_or(|(least, _)| (in_use, cached) < least) {
                best = Some(((in_use, cached), first));
            }
            let (less_used, less_cached) = cost(first + pages - 1);
            (in_use, cached) = (in_use - less_used, cached - less_cached);
        }
        best.map(|((in_use, _), first)| (Run { first, pages }, in_use))
    }

    /// Checks that every run holds its pages alone, and counts them as its own.
    pub(super) fn audit_runs(
        &self,
        holders: &mut [u32],
        runs: impl Iterator<Item = Run>,
    ) -> Result<(), String> {
        let mut lent = 0;
        for run in runs {
            lent += run.pages;
            for page in run.range() {
                let Some(holders) = holders.get_mut(page as usize) else {
                    return Err(format!("page {page} of an adapter is outside the pool"));
                };
                if *holders > 0 {
                    return Err(format!(
                        "page {page} of an adapter has {holders} other users"
                    ));
                }
                *holders = 1;
            }
        }
        match lent == self.lent {
            true => Ok(()),
            false => Err(format!(
                "{} pages are lent to adapters, which lie in {lent}",
                self.lent
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prefix::Key;

    /// A pool whose lowest pages are used, then cached; and the table that holds the used ones.
    fn pool(count: u32, used: u32, cached: u32) -> (Pages, Vec<u32>) {
        let mut pages = Pages::new(count);
        let table: Vec<_> = (0..used).filter_map(|_| pages.take()).collect();
        let mut idle: Vec<_> = (0..cached).filter_map(|_| pages.take()).collect();
        for &page in &idle {
            pages.publish(page, Key([page as u8; 32]));
        }
        pages.give_back(&mut idle);
        (pages, table)
    }

    #[test]
    fn a_run_lies_as_high_as_it_can_where_nothing_is_cached() {
        let (pages, _) = pool(10, 2, 3);
        assert_eq!(pages.find_run(4, &[]), Some(Run { first: 6, pages: 4 }));
        assert_eq!(pages.find_run(6, &[]), Some(Run { first: 4, pages: 6 }));
        assert_eq!(pages.find_run(9, &[]), None);
    }

    #[test]
    fn a_run_evicts_what_is_cached_but_not_what_is_about_to_be_shared() {
        let (mut pages, table) = pool(10, 2, 3);
        let run = pages.find_run(8, &[]).unwrap();
        assert_eq!((run.first, pages.find_run(8, &[4])), (2, None));
        pages.lend(run);
        let counts = pages.counts();
        assert_eq!((counts.adapters, counts.cached, counts.free), (8, 0, 0));
        assert!(pages.find(&[Key([3; 32])]).is_empty());
        pages
            .audit([table.as_slice()].into_iter(), [run].into_iter())
            .unwrap();
        pages.take_back(run);
        assert_eq!(pages.counts().free, 8);
    }

    #[test]
    fn what_a_run_waits_for_is_handed_out_last() {
        let (mut pages, mut table) = pool(6, 1, 0);
        pages.clear_for(5);
        let mut other: Vec<_> = (0..3).filter_map(|_| pages.take()).collect();
        assert_eq!(other, [1, 2, 3], "no page is outside");
        pages.give_back(&mut other);
        pages.give_back(&mut table);
        pages.clear_for(3);
        let taken: Vec<_> = (0..6).filter_map(|_| pages.take()).collect();
        assert_eq!(taken, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn the_pages_of_the_least_used_run_are_kept_clear() {
        let mut pages = Pages::new(8);
        let mut low: Vec<_> = (0..8).filter_map(|_| pages.take()).collect();
        // In use: 0, 1, 2, 5.
        let mut free = [3, 4, 6, 7].to_vec();
        low.retain(|page| !free.contains(page));
        pages.give_back(&mut free);
        pages.clear_for(4);
        assert_eq!(pages.find_run(4, &[]), None);
        assert_eq!(
            pages.take(),
            Some(3),
            "4..8 has one user, 3..7 too, and is lower"
        );
    }
}
