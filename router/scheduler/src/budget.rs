//! The step under construction: one budget of tokens, rows and bytes for decoding, prompts and memories alike.

use crate::span::{Span, cut_at};
use crate::step::Row;
use std::sync::Arc;

/// Least tokens a prompt gets in a step while others wait for theirs.
const LEAST_CHUNK: u32 = 64;
/// Most bytes of images in one step's admissions; the wire takes 64 MiB, tokens included.
const PAYLOAD_BYTES: u64 = 40 << 20;

/// What is known of a sequence and not computed.
#[derive(Debug, Clone)]
pub struct Work {
    /// Position of its first token.
    pub start: u32,
    /// Its tokens, at least one.
    pub tokens: u32,
    /// Spans that no step may cut.
    pub whole: Arc<[Span]>,
}

impl Work {
    /// The most of its first `most` tokens that end at no cut.
    fn whole_within(&self, most: u32) -> u32 {
        cut_at(&self.whole, self.start + most).map_or(most, |span| span.start - self.start)
    }

    /// Tokens of the span that it begins with; 0 without one.
    fn first_span(&self) -> u32 {
        cut_at(&self.whole, self.start + 1).map_or(0, |span| span.end() - self.start)
    }
}

/// Rows planned so far and what is left of the budget.
#[derive(Debug)]
pub struct Draft {
    rows: Vec<(Row, Work)>,
    tokens_left: u32,
    /// What prompts may still have of them; an image in one piece may exceed it.
    prompts_left: u32,
    rows_left: u32,
    payload_left: u64,
}

impl Draft {
    /// An empty step of at most `tokens` tokens in `rows` rows.
    pub fn new(tokens: u32, rows: u32) -> Self {
        Self {
            rows: Vec::new(),
            tokens_left: tokens,
            prompts_left: tokens,
            rows_left: rows,
            payload_left: PAYLOAD_BYTES,
        }
    }

    /// Whether another row fits.
    pub fn has_room(&self) -> bool {
        self.prompts_left > 0 && self.rows_left > 0
    }

    /// Rows so far.
    pub fn rows(&self) -> u32 {
        self.rows.len() as u32
    }

    /// Rows from here on get at most `tokens` tokens together.
    pub fn bound(&mut self, tokens: u32) {
        self.prompts_left = self.prompts_left.min(tokens);
    }

    /// Tokens of the budget that no row has a use for, when all decode.
    pub fn spare(&self) -> u32 {
        self.tokens_left
    }

    /// Whether a sequence can be admitted with `memory` tokens and `payload` bytes and get something of `work` done.
    pub fn takes(&self, memory: u32, payload: u64, work: &Work) -> bool {
        let (left, prompts) = self.left_beside(memory);
        // Alone in its step any payload goes, or the largest would wait for ever.
        let carried = payload <= self.payload_left || self.payload_left == PAYLOAD_BYTES;
        self.rows_left > 0 && carried && share(left, prompts, work) > 0
    }

    /// Takes a memory of `tokens` tokens and an admission of `payload` bytes out of the budget.
    pub fn admit(&mut self, tokens: u32, payload: u64) {
        (self.tokens_left, self.prompts_left) = self.left_beside(tokens);
        self.payload_left = self.payload_left.saturating_sub(payload);
    }

    /// What is left of the budget, and of it for prompts, beside a memory; its own sequence gets a token at least.
    fn left_beside(&self, memory: u32) -> (u32, u32) {
        let left = self.tokens_left.saturating_sub(memory);
        let prompts = self.prompts_left.saturating_sub(memory);
        (left, prompts.max(self.prompts_left.min(1)).min(left))
    }

    /// How much of `work` a row gets now; 0 when its first span does not fit what is left.
    pub fn share(&self, work: &Work) -> u32 {
        share(self.tokens_left, self.prompts_left, work)
    }

    /// Adds a row that gets its share of `work`, which must not be 0; `finish` deals out the rest.
    pub fn add(&mut self, sequence: u64, pages: Vec<u32>, work: Work) {
        let tokens = self.share(&work);
        self.take(tokens);
        self.rows_left -= 1;
        let row = Row {
            sequence,
            start: work.start,
            tokens,
            pages,
            sample: false,
            guesses: Vec::new(),
        };
        self.rows.push((row, work));
    }

    fn take(&mut self, tokens: u32) {
        self.tokens_left -= tokens;
        self.prompts_left = self.prompts_left.saturating_sub(tokens);
    }

    /// Deals out what is left, first come first served, and marks the rows that reach their last known token.
    pub fn finish(mut self) -> Vec<Row> {
        for (row, work) in &mut self.rows {
            let most = work.tokens.min(row.tokens + self.prompts_left);
            let tokens = work.whole_within(most).max(row.tokens);
            self.prompts_left -= tokens - row.tokens;
            row.tokens = tokens;
            row.sample = tokens == work.tokens;
        }
        self.rows.into_iter().map(|(row, _)| row).collect()
    }
}

/// A row that wants more than one token gets at most half of what is left, so that several prompts advance together;
/// what must not be cut it gets as a whole or not at all.
fn share(left: u32, prompts: u32, work: &Work) -> u32 {
    let fair = work.tokens.min(prompts).min((prompts / 2).max(LEAST_CHUNK));
    match work.whole_within(fair) {
        0 if prompts > 0 && work.first_span() <= left => work.first_span(),
        tokens => tokens,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn work(start: u32, tokens: u32, whole: &[(u32, u32)]) -> Work {
        let span = |&(start, tokens): &(u32, u32)| Span {
            start,
            tokens,
            digest: [0; 32],
        };
        let whole = whole.iter().map(span).collect();
        Work {
            start,
            tokens,
            whole,
        }
    }

    #[test]
    fn two_long_prompts_advance_together() {
        let mut draft = Draft::new(512, 8);
        draft.add(1, vec![], work(0, 10_000, &[]));
        draft.add(2, vec![], work(0, 10_000, &[]));
        let rows = draft.finish();
        assert_eq!((rows[0].tokens, rows[1].tokens), (384, 128));
        assert!(!rows[0].sample && !rows[1].sample);
    }

    #[test]
    fn a_lone_prompt_takes_the_whole_budget() {
        let mut draft = Draft::new(512, 8);
        draft.add(1, vec![], work(16, 500, &[]));
        let rows = draft.finish();
        assert_eq!((rows[0].tokens, rows[0].sample), (500, true));
    }

    #[test]
    fn a_chunk_stops_before_a_span_that_it_cannot_hold() {
        let mut draft = Draft::new(100, 8);
        draft.add(1, vec![], work(0, 300, &[(90, 40)]));
        assert_eq!(draft.finish()[0].tokens, 90);
        let begins_with_it = work(90, 300, &[(90, 101)]);
        assert_eq!(Draft::new(100, 8).share(&begins_with_it), 0);
        assert_eq!(Draft::new(101, 8).share(&begins_with_it), 101);
        assert!(!Draft::new(110, 8).takes(10, 0, &begins_with_it));
        assert!(Draft::new(111, 8).takes(10, 0, &begins_with_it));
    }

    #[test]
    fn a_prompt_is_cut_at_a_bound_and_an_image_in_one_piece_passes_once() {
        let mut draft = Draft::new(512, 8);
        draft.add(1, vec![], work(40, 1, &[]));
        draft.bound(32);
        draft.add(2, vec![], work(0, 300, &[(20, 200)]));
        assert!(draft.has_room());
        draft.add(3, vec![], work(0, 300, &[(0, 200)]));
        assert!(!draft.has_room() && !draft.takes(0, 0, &work(0, 300, &[(0, 200)])));
        let tokens: Vec<u32> = draft.finish().iter().map(|row| row.tokens).collect();
        assert_eq!(tokens, [1, 20, 200]);
    }

    #[test]
    fn a_memory_passes_a_bound_and_leaves_its_sequence_a_token() {
        let mut draft = Draft::new(512, 8);
        draft.bound(32);
        assert!(draft.takes(400, 0, &work(0, 3, &[])));
        draft.admit(400, 0);
        draft.add(1, vec![], work(0, 3, &[]));
        assert!(!draft.has_room());
        assert_eq!(draft.finish()[0].tokens, 1);
    }

    #[test]
    fn a_step_carries_a_bounded_number_of_bytes() {
        let mut draft = Draft::new(100, 8);
        let work = work(0, 3, &[]);
        assert!(draft.takes(0, 2 * PAYLOAD_BYTES, &work));
        draft.admit(0, PAYLOAD_BYTES);
        assert!(!draft.takes(0, 1, &work) && draft.takes(0, 0, &work));
    }

    proptest! {
        #[test]
        fn no_row_ends_within_a_span(
            tokens in 1u32..200, start in 0u32..50, want in 1u32..300,
            gaps in prop::collection::vec((0u32..40, 1u32..60), 0..8)
        ) {
            let mut at = start;
            let spans: Vec<(u32, u32)> = gaps.iter().map(|&(gap, length)| {
                at += gap + length;
                (at - length, length)
            }).collect();
            let work = work(start, want.max(at - start), &spans);
            let mut draft = Draft::new(tokens, 4);
            if draft.share(&work) == 0 {
                prop_assert!(spans.first().is_some_and(|&(first, length)| first == start && length > tokens));
                return Ok(());
            }
            draft.add(1, vec![], work.clone());
            let row = draft.finish().remove(0);
            prop_assert!(row.tokens >= 1 && row.tokens <= tokens.min(work.tokens));
            prop_assert!(cut_at(&work.whole, start + row.tokens).is_none());
        }

        #[test]
        fn the_budget_is_never_exceeded_nor_left_while_someone_is_hungry(
            tokens in 1u32..2000, wants in prop::collection::vec(1u32..3000, 1..40)
        ) {
            let mut draft = Draft::new(tokens, 16);
            let mut asked = Vec::new();
            for (want, id) in wants.iter().zip(0u64..) {
                if draft.has_room() {
                    draft.add(id, vec![], work(0, *want, &[]));
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
