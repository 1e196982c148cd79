//! The step under construction: one budget of tokens and rows for decoding and prompts alike.

use crate::step::Row;

/// Least tokens a prompt gets in a step while others wait for theirs.
const LEAST_CHUNK: u32 = 64;

/// Rows planned so far and what is left of the budget.
#[derive(Debug)]
pub struct Draft {
    rows: Vec<Row>,
    /// Tokens each row could still use beyond its own.
    hungry: Vec<u32>,
    tokens_left: u32,
    rows_left: u32,
}

impl Draft {
    /// An empty step of at most `tokens` tokens in `rows` rows.
    pub fn new(tokens: u32, rows: u32) -> Self {
        Self {
            rows: Vec::new(),
            hungry: Vec::new(),
            tokens_left: tokens,
            rows_left: rows,
        }
    }

    /// Whether another row fits.
    pub fn has_room(&self) -> bool {
        self.tokens_left > 0 && self.rows_left > 0
    }

    /// Adds a row that has `remaining` tokens to compute. One that wants more than one gets at most half of what is
    /// left, so that several prompts advance together; `finish` deals out the rest.
    pub fn add(&mut self, sequence: u64, start: u32, remaining: u32, pages: Vec<u32>) {
        let tokens = remaining
            .min(self.tokens_left)
            .min((self.tokens_left / 2).max(LEAST_CHUNK));
        self.tokens_left -= tokens;
        self.rows_left -= 1;
        self.hungry.push(remaining - tokens);
        self.rows.push(Row {
            sequence,
            start,
            tokens,
            pages,
            sample: false,
        });
    }

    /// Deals out what is left, first come first served, and marks the rows that reach their last known token.
    pub fn finish(mut self) -> Vec<Row> {
        for (row, hungry) in self.rows.iter_mut().zip(&mut self.hungry) {
            let more = self.tokens_left.min(*hungry);
            row.tokens += more;
            *hungry -= more;
            self.tokens_left -= more;
            row.sample = *hungry == 0;
        }
        self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn two_long_prompts_advance_together() {
        let mut draft = Draft::new(512, 8);
        draft.add(1, 0, 10_000, vec![]);
        draft.add(2, 0, 10_000, vec![]);
        let rows = draft.finish();
        assert_eq!((rows[0].tokens, rows[1].tokens), (384, 128));
        assert!(!rows[0].sample && !rows[1].sample);
    }

    #[test]
    fn a_lone_prompt_takes_the_whole_budget() {
        let mut draft = Draft::new(512, 8);
        draft.add(1, 16, 500, vec![]);
        let rows = draft.finish();
        assert_eq!((rows[0].tokens, rows[0].sample), (500, true));
    }

    proptest! {
        #[test]
        fn the_budget_is_never_exceeded_nor_left_while_someone_is_hungry(
            tokens in 1u32..2000, wants in prop::collection::vec(1u32..3000, 1..40)
        ) {
            let mut draft = Draft::new(tokens, 16);
            let mut asked = Vec::new();
            for (want, id) in wants.iter().zip(0u64..) {
                if draft.has_room() {
                    draft.add(id, 0, *want, vec![]);
                    asked.push(*want);
                }
            }
            let rows = draft.finish();
            let total: u32 = rows.iter().map(|row| row.tokens).sum();
            prop_assert!(total <= tokens && rows.len() <= 16);
            prop_assert_eq!(total, tokens.min(asked.iter().sum()));
            for (row, want) in rows.iter().zip(asked) {
                prop_assert!(row.tokens >= 1);
                prop_assert_eq!(row.sample, row.tokens == want);
            }
        }
    }
}
