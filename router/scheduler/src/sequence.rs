//! One request from admission to its end: what it asked for, its journal, and what the shard holds of it.

use crate::budget::Work;
use crate::lookup::Lookup;
use crate::prefix::Key;
use crate::span::{Span, within};
use crate::step::Row;
use crate::{AdapterId, Model, Time};
use std::sync::Arc;

/// What a request asks of the scheduler; how tokens are sampled is none of its business.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Arc<[u32]>,
    /// `None` is the base model.
    pub adapter: Option<AdapterId>,
    /// Most tokens of the answer, at least one.
    pub max_new_tokens: u32,
    /// Ids that end the answer.
    pub end_tokens: Arc<[u32]>,
    /// Whose share it spends.
    pub tenant: Arc<str>,
    /// Fails after this moment.
    pub deadline: Option<Time>,
    /// Whether it may start from pages of earlier prompts.
    pub reuse_prefix: bool,
    /// Equal for requests that ask the same of the model, by which one that the shard died of is known again.
    pub fingerprint: u64,
    /// Tokens that the model reads beside the sequence: an encoder's source, or what it is to see of images.
    pub memory_tokens: u32,
    /// What images became in the prompt, in order and apart.
    pub images: Arc<[Span]>,
    /// Bytes that its admission carries beside tokens.
    pub payload: u64,
}

impl Request {
    /// Whether its pages mean the same to another sequence with the same tokens. A recurrent state is in no page, and what
    /// was read from a source is in no key; what was read from images is, with their digests.
    pub(crate) fn shares(&self, model: &Model) -> bool {
        let has_source = self.memory_tokens > 0 && self.images.is_empty();
        !model.recurrent && !has_source
    }

    /// Whether it may outgrow what the model computes as a short sequence. Fixed from its first token to its last.
    pub(crate) fn is_long(&self, model: &Model) -> bool {
        let most = self.prompt.len() as u64 + u64::from(self.max_new_tokens);
        model.long_after > 0 && most > u64::from(model.long_after)
    }

    /// Tokens it may come to: memory, prompt and answer.
    pub(crate) fn tokens(&self) -> u64 {
        u64::from(self.memory_tokens) + self.prompt.len() as u64 + u64::from(self.max_new_tokens)
    }
}

/// Prompt and committed answer: all that is needed to continue anywhere. It only grows.
#[derive(Debug, Clone)]
pub struct Journal {
    prompt: Arc<[u32]>,
    answer: Vec<u32>,
}

impl Journal {
    /// A journal without an answer.
    pub fn new(prompt: Arc<[u32]>) -> Self {
        Self {
            prompt,
            answer: Vec::new(),
        }
    }

    /// The prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// The committed answer.
    pub fn answer(&self) -> &[u32] {
        &self.answer
    }

    /// Tokens of both.
    pub fn len(&self) -> u32 {
        (self.prompt.len() + self.answer.len()) as u32
    }

    /// Whether it holds nothing; never true for an admitted request.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens from position `start` on, `count` at most.
    pub fn tokens(&self, start: usize, count: usize) -> impl Iterator<Item = u32> + '_ {
        let split = start.min(self.prompt.len());
        let answered = start - split;
        let rest = &self.answer[answered.min(self.answer.len())..];
        self.prompt[split..].iter().chain(rest).copied().take(count)
    }

    /// Commits one token.
    pub(crate) fn commit(&mut self, token: u32) {
        self.answer.push(token);
    }
}

/// An open request.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) request: Request,
    pub(crate) journal: Journal,
    pub(crate) tenant: u32,
    pub(crate) submitted: Time,
    pub(crate) started: bool,
    /// Pages on the shard, in the order of positions.
    pub(crate) table: Vec<u32>,
    /// Pages of the memory, its own from admission to release.
    pub(crate) memory: Vec<u32>,
    /// Tokens that lie in those pages, by the shard's own word.
    pub(crate) computed: u32,
    /// Tokens that will lie there when every step in flight is answered, guesses aside.
    pub(crate) planned: u32,
    /// Tokens that steps in flight sample: they will be known, and count as if they were.
    pub(crate) pending: u32,
    /// Pages of the table that the shard was told of.
    pub(crate) sent: u32,
    /// Pages whose keys were offered to the cache.
    pub(crate) published: u32,
    /// Keys of the journal's full pages, as far as they were needed.
    keys: Vec<Key>,
    root: Option<Key>,
    /// Times it gave way to an older request.
    pub(crate) preemptions: u32,
    /// Deaths of the shard in a row while a row of it was in flight, without a token in between.
    pub(crate) strikes: u32,
    /// Fails after this moment unless a token comes; set while it recovers from a lost epoch.
    pub(crate) recover_by: Option<Time>,
    /// Where guesses at its next tokens come from.
    pub(crate) lookup: Lookup,
}

impl Sequence {
    pub(crate) fn new(request: Request, tenant: u32, now: Time) -> Self {
        Self {
            journal: Journal::new(request.prompt.clone()),
            request,
            tenant,
            submitted: now,
            started: false,
            table: Vec::new(),
            memory: Vec::new(),
            computed: 0,
            planned: 0,
            pending: 0,
            sent: 0,
            published: 0,
            keys: Vec::new(),
            root: None,
            preemptions: 0,
            strikes: 0,
            recover_by: None,
            lookup: Lookup::default(),
        }
    }

    /// Tokens known or pending.
    pub(crate) fn length(&self) -> u32 {
        self.journal.len() + self.pending
    }

    /// Tokens known or pending that no step was planned for, at least one for an open request.
    pub(crate) fn remaining(&self) -> u32 {
        self.length() - self.planned
    }

    /// Whether its answer will have all tokens it asked for when the pending ones came; the last is never computed.
    pub(crate) fn is_spent(&self) -> bool {
        self.pending > 0 && self.unanswered() <= self.pending
    }

    /// Pages that its table lacks for the tokens known or pending.
    pub(crate) fn lacks(&self, page_tokens: u32) -> u32 {
        let need = self.length().div_ceil(page_tokens);
        need.saturating_sub(self.table.len() as u32)
    }

    /// A row of it is on its way.
    pub(crate) fn depart(&mut self, row: &Row) {
        self.planned = row.start + row.known();
        self.pending += u32::from(row.sample);
    }

    /// The shard answered its oldest row in flight.
    pub(crate) fn land(&mut self, row: &Row) {
        self.pending -= u32::from(row.sample);
    }

    /// By the shard's word everything before `computed` lies in its pages.
    pub(crate) fn acknowledge(&mut self, computed: u32) {
        self.computed = computed;
        self.planned = self.planned.max(computed);
    }

    /// The shard holds nothing of it any more.
    pub(crate) fn forget(&mut self) {
        self.computed = 0;
        self.planned = 0;
        self.pending = 0;
        self.published = 0;
    }

    /// What is left to compute when everything before `start` is.
    pub(crate) fn work_from(&self, start: u32, model: &Model) -> Work {
        Work {
            start,
            tokens: self.length() - start,
            whole: match model.together {
                true => self.request.images.clone(),
                false => Arc::default(),
            },
        }
    }

    /// Tokens that the answer may still get.
    pub(crate) fn unanswered(&self) -> u32 {
        self.request.max_new_tokens - self.journal.answer().len() as u32
    }

    /// Says under which root its pages are written; another root (a new digest of the adapter) starts the keys over.
    pub(crate) fn set_root(&mut self, root: Key) {
        if self.root != Some(root) {
            self.root = Some(root);
            self.keys.clear();
        }
    }

    /// Keys of the first `count` pages; none before the root is set.
    pub(crate) fn keys(&mut self, count: u32, page_tokens: u32) -> &[Key] {
        let Some(root) = self.root else {
            return &[];
        };
        let width = page_tokens as usize;
        while self.keys.len() < count as usize {
            let parent = *self.keys.last().unwrap_or(&root);
            let start = self.keys.len() * width;
            let page = self.journal.tokens(start, width);
            let images = within(&self.request.images, start as u32, (start + width) as u32);
            self.keys.push(parent.then(page, images));
        }
        &self.keys[..count as usize]
    }

    /// The earliest moment at which it fails by time alone.
    pub(crate) fn expires(&self) -> Option<Time> {
        [self.request.deadline, self.recover_by]
            .into_iter()
            .flatten()
            .min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_reads_across_the_border_of_prompt_and_answer() {
        let mut journal = Journal::new(Arc::from([1, 2, 3]));
        journal.commit(4);
        journal.commit(5);
        assert_eq!(journal.tokens(0, 9).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        assert_eq!(journal.tokens(2, 2).collect::<Vec<_>>(), [3, 4]);
        assert_eq!(journal.tokens(4, 2).collect::<Vec<_>>(), [5]);
        assert_eq!(journal.len(), 5);
    }

    #[test]
    fn keys_grow_with_the_journal_and_follow_the_root() {
        let request = Request {
            prompt: Arc::from([1, 2, 3]),
            max_new_tokens: 8,
            ..Request::default()
        };
        let mut sequence = Sequence::new(request, 0, Time::ZERO);
        let (a, b) = (Key::root("m", "a", ""), Key::root("m", "b", ""));
        sequence.set_root(a);
        let first = sequence.keys(1, 2)[0];
        sequence.journal.commit(4);
        assert_eq!(sequence.keys(2, 2)[0], first);
        assert_eq!(
            sequence.keys(2, 2)[1],
            first.then([3, 4].into_iter(), [].iter())
        );
        sequence.set_root(b);
        assert_ne!(sequence.keys(1, 2)[0], first);
    }

    #[test]
    fn a_page_s_key_says_which_image_lies_in_it() {
        let keys = |digests: [u8; 2]| {
            let span = |(start, digest)| Span {
                start,
                tokens: 3,
                digest: [digest; 32],
            };
            let request = Request {
                prompt: Arc::from([1, 9, 9, 9, 2, 9, 9, 9, 3, 4]),
                images: [1, 5].into_iter().zip(digests).map(span).collect(),
                max_new_tokens: 8,
                ..Request::default()
            };
            let mut sequence = Sequence::new(request, 0, Time::ZERO);
            sequence.set_root(Key::root("m", "", ""));
            sequence.keys(5, 2).to_vec()
        };
        let (ab, ac, bb) = (keys([1, 2]), keys([1, 3]), keys([2, 2]));
        assert_eq!(ab[..2], ac[..2]);
        assert!((2..5).all(|page| ab[page] != ac[page]));
        assert!((0..5).all(|page| ab[page] != bb[page]));
        assert_eq!(ab, keys([1, 2]));
    }
}
