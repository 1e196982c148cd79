//! The page pool: who holds each page, which are free, and which only the prefix cache remembers.
//!
//! A page is in exactly one of four places: free, in use (at least one sequence's table holds it), idle (published
//! in the cache, held by nobody, given up on demand), or in the run of adjacent pages that an adapter lies in.

mod runs;

pub(crate) use runs::Run;

use crate::prefix::{Key, PrefixIndex};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// How many pages are where; they always add up to the pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Pages that hold nothing.
    pub free: u32,
    /// Pages in the table of at least one sequence.
    pub used: u32,
    /// Pages that only the prefix cache holds.
    pub cached: u32,
    /// Pages that adapters lie in.
    pub adapters: u32,
}

/// All pages of one epoch.
#[derive(Debug, Default)]
pub struct Pages {
    free: BTreeSet<u32>,
    /// Of each page: tables that hold it; 1 in an adapter's run.
    users: Vec<u32>,
    index: PrefixIndex,
    /// Idle pages by the moment they became idle, oldest first.
    idle: BTreeMap<u64, u32>,
    idle_since: Vec<u64>,
    ticks: u64,
    /// Pages of all runs.
    lent: u32,
    /// Where a run shall fit once its users are gone: others are handed out first.
    cleared: Range<u32>,
}

impl Pages {
    /// A pool of `count` free pages.
    pub fn new(count: u32) -> Self {
        Self {
            free: (0..count).collect(),
            users: vec![0; count as usize],
            index: PrefixIndex::new(count),
            idle: BTreeMap::new(),
            idle_since: vec![0; count as usize],
            ticks: 0,
            lent: 0,
            cleared: 0..0,
        }
    }

    /// Pages of the pool.
    pub fn total(&self) -> u32 {
        self.users.len() as u32
    }

    /// Pages that `take` could hand out.
    pub fn available(&self) -> u32 {
        (self.free.len() + self.idle.len()) as u32
    }

    /// Where the pages are.
    pub fn counts(&self) -> PageCounts {
        let (free, cached) = (self.free.len() as u32, self.idle.len() as u32);
        PageCounts {
            free,
            cached,
            adapters: self.lent,
            used: self.total() - free - cached - self.lent,
        }
    }

    /// Hands out the lowest free page for one sequence to write, evicting the page that has been idle longest when none
    /// is free. What shall become a run is handed out last.
    pub fn take(&mut self) -> Option<u32> {
        let Range { start, end } = self.cleared;
        let outside = |page: &&u32| !(start..end).contains(*page);
        let below = self.free.range(..start).next();
        let page = below
            .or_else(|| self.free.range(end..).next())
            .or_else(|| self.idle.values().find(outside))
            .or_else(|| self.free.first())
            .or_else(|| self.idle.values().next());
        let page = *page?;
        self.claim(page);
        Some(page)
    }

    /// Takes a free or an idle page for one user.
    fn claim(&mut self, page: u32) {
        if !self.free.remove(&page) {
            self.idle.remove(&self.idle_since[page as usize]);
            self.index.forget(page);
        }
        self.users[page as usize] = 1;
    }

    /// The longest run of published pages under `keys`, without taking them.
    pub fn find(&self, keys: &[Key]) -> Vec<u32> {
        keys.iter().map_while(|key| self.index.get(key)).collect()
    }

    /// How many of `pages` are idle now, so that sharing them makes fewer available.
    pub fn idle_among(&self, pages: &[u32]) -> u32 {
        pages
            .iter()
            .filter(|&&page| self.users[page as usize] == 0)
            .count() as u32
    }

    /// One more sequence reads a published page.
    pub fn share(&mut self, page: u32) {
        let users = &mut self.users[page as usize];
        if *users == 0 {
            self.idle.remove(&self.idle_since[page as usize]);
        }
        *users += 1;
    }

    /// Makes a full page findable. The shard must have answered for every token in it.
    /// Under a key that is taken already the page stays private to its sequence.
    pub fn publish(&mut self, page: u32, key: Key) {
        self.index.insert(page, key);
    }

    /// Takes back a sequence's table. The last page becomes idle first, so that eviction always meets leaves first.
    pub fn give_back(&mut self, table: &mut Vec<u32>) {
        for page in table.drain(..).rev() {
            let users = &mut self.users[page as usize];
            *users -= 1;
            if *users > 0 {
                continue;
            }
            if !self.index.holds(page) {
                self.free.insert(page);
                continue;
            }
            self.ticks += 1;
            self.idle_since[page as usize] = self.ticks;
            self.idle.insert(self.ticks, page);
        }
    }

    /// Checks the pool against the tables of all sequences and the runs of all adapters; the text names the page and what
    /// disagrees.
    pub fn audit<'a>(
        &self,
        tables: impl Iterator<Item = &'a [u32]>,
        runs: impl Iterator<Item = Run>,
    ) -> Result<(), String> {
        let mut holders = vec![0u32; self.users.len()];
        for &page in tables.flatten() {
            holders[page as usize] += 1;
        }
        self.audit_runs(&mut holders, runs)?;
        let mut places = vec![0u32; self.users.len()];
        for &page in self.free.iter().chain(self.idle.values()) {
            places[page as usize] += 1;
        }
        for page in 0..self.total() {
            let (held, users, place) = (
                holders[page as usize],
                self.users[page as usize],
                places[page as usize],
            );
            if held != users {
                return Err(format!(
                    "page {page}: {users} users counted, {held} tables hold it"
                ));
            }
            if place + u32::from(users > 0) != 1 {
                return Err(format!(
                    "page {page} is in {place} lists with {users} users"
                ));
            }
        }
        if let Some(page) = self.free.iter().find(|&&page| self.index.holds(page)) {
            return Err(format!("page {page} is free and published"));
        }
        if let Some(page) = self.idle.values().find(|&&page| !self.index.holds(page)) {
            return Err(format!("page {page} is idle and not published"));
        }
        self.index.audit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(number: u8) -> Key {
        Key([number; 32])
    }

    #[test]
    fn an_unpublished_page_is_free_again_and_a_published_one_idles() {
        let mut pages = Pages::new(2);
        let mut table = vec![pages.take().unwrap(), pages.take().unwrap()];
        assert_eq!(pages.take(), None);
        pages.publish(table[0], key(1));
        pages.give_back(&mut table);
        let counts = PageCounts {
            free: 1,
            used: 0,
            cached: 1,
            adapters: 0,
        };
        assert_eq!(pages.counts(), counts);
    }

    #[test]
    fn a_chain_is_evicted_from_its_leaf() {
        let mut pages = Pages::new(3);
        let mut table: Vec<_> = (0..3).filter_map(|_| pages.take()).collect();
        let chain = table.clone();
        for (page, number) in chain.iter().zip(0..) {
            pages.publish(*page, key(number));
        }
        pages.give_back(&mut table);
        assert_eq!(pages.take(), Some(chain[2]));
        assert_eq!(pages.find(&[key(0), key(1), key(2)]), chain[..2]);
    }

    #[test]
    fn a_shared_page_is_never_evicted() {
        let mut pages = Pages::new(1);
        let mut table = vec![pages.take().unwrap()];
        pages.publish(table[0], key(1));
        pages.share(table[0]);
        pages.give_back(&mut table);
        assert_eq!((pages.take(), pages.counts().used), (None, 1));
    }

    proptest! {
        #[test]
        fn pages_are_conserved(moves in prop::collection::vec((0u8..7, 0usize..8), 1..200)) {
            let mut pages = Pages::new(16);
            let mut tables: Vec<Vec<u32>> = vec![Vec::new(); 8];
            let mut runs: Vec<Run> = Vec::new();
            for (move_, who) in moves {
                match move_ {
                    0 => tables[who].extend(pages.take()),
                    1 => pages.give_back(&mut tables[who]),
                    2 => if let Some(&page) = tables[who].last() {
                        pages.publish(page, key(who as u8));
                    },
                    3 => runs.extend(pages.find_run(1 + who as u32 / 2, &[]).inspect(|&run| pages.lend(run))),
                    4 => if let Some(run) = runs.pop() {
                        pages.take_back(run);
                    },
                    5 => pages.clear_for(who as u32),
                    _ => for page in pages.find(&[key(who as u8)]) {
                        if !tables[who].contains(&page) {
                            pages.share(page);
                            tables[who].push(page);
                        }
                    },
                }
                pages.audit(tables.iter().map(Vec::as_slice), runs.iter().copied()).unwrap();
            }
        }
    }
}
