//! Guesses at the next tokens of a sequence: what followed when its last ones stood there before.

use crate::sequence::Journal;
use std::collections::HashMap;

/// Tokens that must come again before what followed them is guessed.
const RUN: usize = 3;
/// Tokens back from the end within which runs are remembered.
const REACH: u32 = 8192;
/// Most doublings of the wait after a guess that was wrong.
const WAITS: u32 = 6;

/// Where every run of tokens of one sequence was last seen, and how its guesses fared.
#[derive(Debug, Default)]
pub struct Lookup {
    /// The position after a run.
    after: HashMap<[u32; RUN], u32>,
    /// Runs that end before this position are in it.
    read: u32,
    /// Guesses in a row of which not one token was right.
    wrong: u32,
    /// Nothing is guessed before the journal has this many tokens.
    quiet_until: u32,
}

impl Lookup {
    /// At most `most` tokens that may come next; none without a reason to believe in them.
    pub fn guess(&mut self, journal: &Journal, most: u32) -> Vec<u32> {
        let length = journal.len();
        if most == 0 || length < self.quiet_until || length <= RUN as u32 {
            return Vec::new();
        }
        for end in self.read.max(length.saturating_sub(REACH)).max(RUN as u32)..length {
            self.after.insert(run_before(journal, end), end);
        }
        self.read = length;
        let Some(&from) = self.after.get(&run_before(journal, length)) else {
            return Vec::new();
        };
        let mut guesses: Vec<u32> = journal.tokens(from as usize, most as usize).collect();
        // What repeats with a short period goes on after the journal's end.
        for place in guesses.len()..most as usize {
            guesses.push(guesses[place - (length - from) as usize]);
        }
        guesses
    }

    /// The first `right` of some guesses were right, and the journal has `length` tokens now. A sequence that does not
    /// repeat itself is left alone for longer and longer.
    pub fn learn(&mut self, right: u32, length: u32) {
        if right > 0 {
            self.wrong = 0;
            return;
        }
        self.wrong += 1;
        self.quiet_until = length + (1 << self.wrong.min(WAITS));
    }
}

fn run_before(journal: &Journal, end: u32) -> [u32; RUN] {
    let mut tokens = journal.tokens(end as usize - RUN, RUN);
    std::array::from_fn(|_| tokens.next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn guess(prompt: &[u32], most: u32) -> Vec<u32> {
        Lookup::default().guess(&Journal::new(Arc::from(prompt)), most)
    }

    #[test]
    fn what_followed_the_same_three_tokens_is_guessed() {
        assert_eq!(guess(&[1, 2, 3, 7, 8, 9, 1, 2, 3], 2), [7, 8]);
        assert_eq!(guess(&[5, 2, 3, 7, 8, 9, 1, 2, 3], 2), [0; 0]);
        assert_eq!(guess(&[1, 2, 3], 2), [0; 0]);
        assert_eq!(guess(&[], 2), [0; 0]);
    }

    #[test]
    fn the_last_time_counts() {
        assert_eq!(guess(&[1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], 1), [8]);
    }

    #[test]
    fn a_short_period_is_continued() {
        assert_eq!(guess(&[9, 4, 5, 4, 5, 4, 5], 5), [4, 5, 4, 5, 4]);
        assert_eq!(guess(&[4, 4, 4, 4], 3), [4, 4, 4]);
    }

    #[test]
    fn the_answer_is_read_as_it_grows() {
        let mut journal = Journal::new(Arc::from([1, 2, 3, 7]));
        let mut lookup = Lookup::default();
        assert_eq!(lookup.guess(&journal, 2), [0; 0]);
        for token in [6, 1, 2, 3] {
            journal.commit(token);
        }
        assert_eq!(lookup.guess(&journal, 3), [7, 6, 1]);
    }

    #[test]
    fn a_sequence_that_guesses_wrong_is_left_alone_for_longer_and_longer() {
        let journal = Journal::new(Arc::from([4; 40]));
        let mut lookup = Lookup::default();
        lookup.learn(0, 30);
        assert_eq!(lookup.guess(&journal, 1), [4]);
        lookup.learn(0, 37);
        assert_eq!(lookup.guess(&journal, 1), [0; 0]);
        let mut lookup = Lookup::default();
        lookup.learn(0, 37);
        lookup.learn(1, 38);
        lookup.learn(0, 38);
        assert_eq!(lookup.guess(&journal, 1), [4]);
    }
}
