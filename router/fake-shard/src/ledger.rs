//! What a shard holds in one epoch, and every rule of the protocol that can be checked from there.
//!
//! Each page remembers the chain of tokens that was written into it, so a page that is read under another prefix,
//! another adapter, or after someone else wrote to it, is found at that very step.

use crate::adapter::Adapter;
use crate::faults::{Faults, Mark};
use crate::tokens;
use kvrun_proto::{Admit, Row, RowOutcome, Step};
use std::collections::{HashMap, HashSet};

macro_rules! rule {
    ($holds:expr, $($text:tt)*) => {
        if !$holds {
            return Err(Breach::Rule(format!($($text)*)));
        }
    };
}

mod beside;
mod rules;
mod runs;
mod sequence;

use beside::Beside;
use rules::{check_row, check_shared, prompt_tokens, read, write};
use runs::Runs;
use sequence::Sequence;

/// Sizes a ledger checks against.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Page ids are `0..pages`.
    pub pages: u64,
    /// Tokens of one page.
    pub page_tokens: u32,
    /// Most tokens of one step.
    pub step_tokens: u32,
    /// Most rows of one step.
    pub step_rows: u32,
    /// Token ids are below it.
    pub vocabulary: u32,
    /// Most tokens of one sequence.
    pub positions: u32,
    /// Whether sequences keep a recurrent state, which begins with the first token and cannot be shared.
    pub recurrent: bool,
    /// The id that answers follow, when prompts are for an encoder.
    pub decoder_start: Option<u32>,
    /// What images need, when they are taken.
    pub images: Option<ImageSizes>,
}

/// What images need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSizes {
    /// Whether one row must compute all ids of an image.
    pub together: bool,
    /// Tokens of memory per image.
    pub memory: u32,
}

/// Why a step was not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Breach {
    /// The router broke a rule.
    Rule(String),
    /// A row held a token marked as poison.
    Poison,
}

/// One epoch's sequences, pages and adapters.
pub struct Ledger {
    sizes: Sizes,
    /// Number of the last step.
    number: u64,
    /// The last step that the router may have had the answer of when it sent that one.
    answered: u64,
    sequences: HashMap<u64, Sequence>,
    /// Chains written into each page, slot by slot.
    pages: Vec<Vec<u64>>,
    /// The last step that wrote to each page.
    written: Vec<u64>,
    /// Live sequences whose table holds the page.
    users: Vec<u32>,
    adapters: HashMap<u64, Adapter>,
    runs: Runs,
}

impl Ledger {
    /// An epoch that holds nothing yet.
    pub fn new(sizes: Sizes) -> Self {
        Self {
            sizes,
            number: 0,
            answered: 0,
            sequences: HashMap::new(),
            pages: vec![Vec::new(); sizes.pages as usize],
            written: vec![0; sizes.pages as usize],
            users: vec![0; sizes.pages as usize],
            adapters: HashMap::new(),
            runs: Runs::default(),
        }
    }

    /// Keeps a loaded adapter; a handle is never used twice.
    pub fn load(&mut self, handle: u64, adapter: Adapter) -> Result<(), Breach> {
        rule!(handle != 0, "adapter handle 0 is the base model");
        rule!(
            !self.adapters.contains_key(&handle),
            "adapter handle {handle} is in use"
        );
        self.adapters.insert(handle, adapter);
        Ok(())
    }

    /// Bytes of all adapters held.
    pub fn adapter_bytes(&self) -> u64 {
        self.adapters.values().map(|adapter| adapter.bytes).sum()
    }

    /// Pages of the pool.
    pub fn pages(&self) -> u64 {
        self.sizes.pages
    }

    /// Sequences admitted and not released.
    pub fn live(&self) -> usize {
        self.sequences.len()
    }

    /// Pages in the table of a live sequence.
    pub fn pages_in_use(&self) -> usize {
        self.users.iter().filter(|&&users| users > 0).count()
    }

    /// Adapters held.
    pub fn adapters(&self) -> usize {
        self.adapters.len()
    }

    /// Computes one step: release, then displace, then place, then admit, then rows. The outcome of `answered` was the last
    /// one sent when it came.
    pub fn step(
        &mut self,
        step: &Step,
        answered: u64,
        faults: &Faults,
    ) -> Result<Vec<RowOutcome>, Breach> {
        rule!(
            step.number == self.number + 1,
            "step {} after step {}",
            step.number,
            self.number
        );
        (self.number, self.answered) = (step.number, answered);
        for id in &step.release {
            let sequence = self.sequences.remove(id);
            let Some(sequence) = sequence else {
                return Err(Breach::Rule(format!(
                    "released sequence {id}, which is not admitted"
                )));
            };
            for page in sequence.pages.into_iter().chain(sequence.beside.pages) {
                self.users[page as usize] -= 1;
            }
        }
        for &handle in &step.displace {
            self.displace(handle)?;
        }
        for place in &step.place {
            self.place(place)?;
        }
        let mut total = 0;
        for admit in &step.admit {
            total += u64::from(self.admit(admit)?);
        }
        total += step
            .rows
            .iter()
            .map(|row| u64::from(row.tokens))
            .sum::<u64>();
        rule!(
            total <= u64::from(self.sizes.step_tokens),
            "{total} tokens in a step of at most {}",
            self.sizes.step_tokens
        );
        rule!(
            step.rows.len() <= self.sizes.step_rows as usize,
            "{} rows in a step of at most {}",
            step.rows.len(),
            self.sizes.step_rows
        );
        let mut once = HashSet::new();
        for row in &step.rows {
            rule!(
                once.insert(row.sequence),
                "two rows of sequence {} in one step",
                row.sequence
            );
            self.grant(row)?;
        }
        step.rows
            .iter()
            .map(|row| self.compute(row, faults))
            .collect()
    }

    /// Answers with the tokens of its memory, which this step computes.
    fn admit(&mut self, admit: &Admit) -> Result<u32, Breach> {
        let id = admit.sequence;
        rule!(
            !self.sequences.contains_key(&id),
            "sequence {id} admitted twice"
        );
        rule!(
            !admit.tokens.is_empty(),
            "sequence {id} admitted without tokens"
        );
        rule!(
            admit.prompt_tokens >= 1 && admit.prompt_tokens as usize <= admit.tokens.len(),
            "sequence {id}: prompt of {} among {} tokens",
            admit.prompt_tokens,
            admit.tokens.len()
        );
        let foreign = admit
            .tokens
            .iter()
            .find(|&&token| token >= self.sizes.vocabulary);
        if let Some(token) = foreign {
            return Err(Breach::Rule(format!(
                "sequence {id}: token {token} is outside the vocabulary"
            )));
        }
        let Some(sampling) = admit.sampling.clone() else {
            return Err(Breach::Rule(format!(
                "sequence {id} admitted without sampling"
            )));
        };
        let root = match admit.adapter {
            0 => tokens::root(""),
            handle => match self.adapters.get(&handle) {
                Some(adapter) => {
                    rule!(
                        adapter.pages == 0 || self.runs.holds(handle),
                        "sequence {id}: adapter {handle} lies in no pages"
                    );
                    tokens::root(&adapter.digest)
                }
                None => return Err(Breach::Rule(format!("sequence {id}: no adapter {handle}"))),
            },
        };
        let root = match admit.long {
            true => tokens::root_of_long(root),
            false => root,
        };
        let beside = Beside::of(admit, &self.sizes)?;
        for &page in &beside.pages {
            rule!(
                u64::from(page) < self.sizes.pages && self.users[page as usize] == 0,
                "sequence {id}: page {page} of its memory is not free"
            );
            self.runs.check_outside(page, id)?;
            self.users[page as usize] += 1;
            self.pages[page as usize] = vec![beside.memory_chain()];
        }
        let memory = beside.memory_tokens();
        let mut sequence = Sequence {
            tokens: Vec::with_capacity(admit.tokens.len()),
            chains: Vec::with_capacity(admit.tokens.len()),
            root: tokens::root_beside(root, beside.read_from_the_start()),
            beside,
            prompt_tokens: admit.prompt_tokens,
            sampling,
            adapter: admit.adapter,
            pages: Vec::new(),
            computed: 0,
            failed: None,
        };
        admit.tokens.iter().for_each(|&token| sequence.push(token));
        self.sequences.insert(id, sequence);
        Ok(memory)
    }

    /// Appends a row's pages to its sequence's table.
    fn grant(&mut self, row: &Row) -> Result<(), Breach> {
        let id = row.sequence;
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return Err(Breach::Rule(format!(
                "row of sequence {id}, which is not admitted"
            )));
        };
        for &page in &row.pages {
            rule!(
                u64::from(page) < self.sizes.pages,
                "sequence {id}: page {page} is outside the pool"
            );
            self.runs.check_outside(page, id)?;
            rule!(
                !sequence.pages.contains(&page),
                "sequence {id} was given page {page} twice"
            );
            sequence.pages.push(page);
            self.users[page as usize] += 1;
        }
        Ok(())
    }

    fn compute(&mut self, row: &Row, faults: &Faults) -> Result<RowOutcome, Breach> {
        let id = row.sequence;
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return Err(Breach::Rule(format!(
                "row of sequence {id}, which is not admitted"
            )));
        };
        let mut outcome = RowOutcome {
            sequence: id,
            ..Default::default()
        };
        if let Some((at, why)) = &sequence.failed {
            rule!(
                self.number == at + 1,
                "sequence {id} goes on after its row failed in step {at}"
            );
            outcome.error = why.clone();
            return Ok(outcome);
        }
        check_row(row, sequence, &self.sizes)?;
        let marked = [&sequence.tokens, &sequence.beside.source];
        match marked.into_iter().find_map(|ids| faults.mark_of(ids)) {
            Some(Mark::Poison) => return Err(Breach::Poison),
            Some(Mark::RowError(text)) => {
                sequence.failed = Some((self.number, text.clone()));
                outcome.error = text;
                return Ok(outcome);
            }
            None => {}
        }
        let width = self.sizes.page_tokens as usize;
        sequence.beside.read(&self.pages, id)?;
        read(sequence, row.start as usize, width, &self.pages, id)?;
        if sequence.computed == 0 {
            check_shared(row, sequence, width, &self.written, self.answered)?;
        }
        let known = sequence.tokens.len();
        row.drafts.iter().for_each(|&draft| sequence.push(draft));
        write(sequence, row, width, &mut self.pages, &self.users)?;
        for position in row.start as usize..(row.start + row.tokens) as usize {
            self.written[sequence.pages[position / width] as usize] = self.number;
        }
        sequence.truncate(known);
        sequence.computed = row.start + row.tokens - row.drafts.len() as u32;
        if sequence.sampling.prompt_logprobs {
            outcome.prompt = prompt_tokens(sequence, row, self.sizes.vocabulary);
        }
        if row.sample {
            let mut drafts = row.drafts.iter();
            loop {
                let token = sequence.sample(self.sizes.vocabulary);
                let id = token.id;
                outcome.tokens.push(token);
                if drafts.next() != Some(&id) {
                    break;
                }
                sequence.computed += 1;
            }
        }
        Ok(outcome)
    }
}
