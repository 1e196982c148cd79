//! What a shard keeps of one sequence.

use super::beside::Beside;
use crate::tokens;
use kvrun_proto::{Sampling, Token};

/// One sequence from its admission to its release.
pub(super) struct Sequence {
    pub(super) tokens: Vec<u32>,
    /// `chains[i]` covers tokens `0..=i`.
    pub(super) chains: Vec<u64>,
    pub(super) root: u64,
    pub(super) prompt_tokens: u32,
    pub(super) sampling: Sampling,
    pub(super) adapter: u64,
    pub(super) beside: Beside,
    pub(super) pages: Vec<u32>,
    pub(super) computed: u32,
    /// The step in which its row failed, and by what.
    pub(super) failed: Option<(u64, String)>,
}

impl Sequence {
    /// Takes back what was supposed after `known` tokens.
    pub(super) fn truncate(&mut self, known: usize) {
        self.tokens.truncate(known);
        self.chains.truncate(known);
    }

    pub(super) fn push(&mut self, token: u32) {
        let position = self.tokens.len();
        let before = self.chain_before(position);
        let seen = self.beside.seen_at(position as u32);
        self.tokens.push(token);
        self.chains.push(tokens::extend_seen(before, token, seen));
    }

    /// Samples the next token and appends it.
    pub(super) fn sample(&mut self, vocabulary: u32) -> Token {
        let answered = self.tokens.len() as u32 - self.prompt_tokens;
        let chain = self.chain_before(self.tokens.len());
        let token = tokens::sample(chain, &self.sampling, answered, vocabulary);
        self.push(token.id);
        token
    }

    pub(super) fn chain_before(&self, position: usize) -> u64 {
        match position.checked_sub(1) {
            Some(last) => self.chains[last],
            None => self.root,
        }
    }
}
