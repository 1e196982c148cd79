//! Speculation: a step that reads all weights for a few tokens computes a few guessed ones beside them for little more.
//!
//! The shard samples after every guess and keeps those that it would have sampled anyway. A pick depends on seed,
//! position and tokens alone, so an answer is the same with and without guesses.

use crate::Scheduler;
use crate::step::Row;

/// Tokens that a step may be filled up to: beyond, it waits for arithmetic and no longer for the weights.
const WORTH: u32 = 8;

/// How many tokens were guessed, and how many of them were right; ever.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Guessed {
    /// Tokens computed on a guess.
    pub tokens: u64,
    /// Those that became part of an answer.
    pub right: u64,
}

impl Scheduler {
    /// Adds guesses to the rows of a step in which every sequence decodes and `spare` tokens are left; all rows share them.
    pub(crate) fn speculate(&mut self, rows: &mut [Row], spare: u32) {
        let decoding = rows.iter().all(|row| row.sample && row.tokens == 1);
        if !decoding || !self.may_guess(rows.len() as u32) {
            return;
        }
        let mut rows_left = rows.len() as u32;
        let mut left = WORTH.saturating_sub(rows_left).min(spare);
        for row in rows {
            let most = self.config.speculate.min(left.div_ceil(rows_left));
            self.guess(row, most);
            rows_left -= 1;
            left -= row.guesses.len() as u32;
        }
    }

    /// Whether a step of so many decoding rows has room for guesses.
    pub(crate) fn may_guess(&self, rows: u32) -> bool {
        self.config.speculate > 0 && !self.model.recurrent && rows < WORTH
    }

    /// Adds at most `most` guesses to a row, no more than its answer may still use and free pages can hold.
    fn guess(&mut self, row: &mut Row, most: u32) {
        let Some(sequence) = self.sequences.get_mut(&row.sequence) else {
            return;
        };
        if sequence.journal.answer().is_empty() {
            return;
        }
        let useful = most.min(sequence.unanswered() - 1);
        let known = sequence.journal.len();
        row.guesses = sequence.lookup.guess(&sequence.journal, useful);
        #[cfg(test)]
        if let Some(foresight) = &self.foresight {
            row.guesses = foresight.guess(row.sequence, known, useful);
        }
        let width = self.model.page_tokens;
        let need = (known + row.guesses.len() as u32).div_ceil(width) as usize;
        while sequence.table.len() < need {
            let Some(page) = self.pages.take() else {
                break;
            };
            sequence.table.push(page);
            row.pages.push(page);
        }
        sequence.sent = sequence.table.len() as u32;
        row.guesses
            .truncate((sequence.sent * width - known) as usize);
        row.tokens += row.guesses.len() as u32;
    }

    /// The shard kept the first `right` guesses of a row.
    pub(crate) fn learn(&mut self, row: &Row, right: u32) {
        let Some(sequence) = self.sequences.get_mut(&row.sequence) else {
            return;
        };
        self.guessed.tokens += row.guesses.len() as u64;
        self.guessed.right += u64::from(right);
        let length = sequence.journal.len() + 1 + right;
        sequence.lookup.learn(right, length);
    }
}

/// Guesses of a test's own making, which may know the answers.
#[cfg(test)]
pub struct Foresight(Box<dyn Fn(u64, u32, u32) -> Vec<u32>>);

#[cfg(test)]
impl Scheduler {
    /// Guesses as this says from now on, given a request, its tokens so far, and how many guesses are wanted.
    pub fn foresee(&mut self, guess: impl Fn(u64, u32, u32) -> Vec<u32> + 'static) {
        self.foresight = Some(Foresight(Box::new(guess)));
    }
}

#[cfg(test)]
impl Foresight {
    fn guess(&self, sequence: u64, known: u32, most: u32) -> Vec<u32> {
        (self.0)(sequence, known, most)
    }
}

#[cfg(test)]
impl std::fmt::Debug for Foresight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Foresight")
    }
}
