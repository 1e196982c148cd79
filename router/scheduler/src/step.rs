//! What the core says and hears: steps, replies, events. The wire's types are not known here.

use crate::Time;

/// One turn of the shards. Release comes first, then adapters leave pages and come into others, then admission, then the
/// rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The epoch it belongs to.
    pub epoch: u64,
    /// 1, 2, 3, ... within the epoch.
    pub number: u64,
    /// Sequences that the shard forgets.
    pub release: Vec<u64>,
    /// Handles of adapters that give up their pages.
    pub displace: Vec<u64>,
    /// Adapters that come into pages.
    pub place: Vec<Placement>,
    /// Sequences that the shard has not seen; their tokens are in the journal.
    pub admit: Vec<Admission>,
    /// What to compute.
    pub rows: Vec<Row>,
}

/// An adapter on its way into a run of adjacent pages, as many as it was loaded with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// The shard's name for it.
    pub adapter: u64,
    /// The lowest of the pages.
    pub first: u32,
}

/// A sequence on its way to the shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admission {
    /// The request's id.
    pub sequence: u64,
    /// The shard's name for its adapter; 0 is the base model.
    pub adapter: u64,
    /// Pages for what it reads beside its tokens.
    pub memory: Vec<u32>,
    /// Whether it is computed as a long sequence.
    pub long: bool,
}

/// Some tokens of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The request's id.
    pub sequence: u64,
    /// Position of the first token to compute.
    pub start: u32,
    /// Tokens to compute, at least one.
    pub tokens: u32,
    /// Pages appended to the sequence's table.
    pub pages: Vec<u32>,
    /// Whether a token is sampled after the last, and after every guess.
    pub sample: bool,
    /// Tokens that may follow the last known one; `tokens` counts them, and they are computed after it.
    pub guesses: Vec<u32>,
}

impl Row {
    /// Tokens of it that are known.
    pub fn known(&self) -> u32 {
        self.tokens - self.guesses.len() as u32
    }
}

/// The shards' answer to a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The epoch it was computed in.
    pub epoch: u64,
    /// The step's number.
    pub number: u64,
    /// One per row, in their order.
    pub rows: Vec<RowReply>,
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowReply {
    /// The request's id.
    pub sequence: u64,
    /// What was sampled: none for an inner chunk, else the guesses that were right and one token more.
    pub tokens: Vec<u32>,
    /// Why this row, and only this row, failed.
    pub error: Option<String>,
}

/// What was made of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceptance {
    /// It answered the step in flight.
    Committed,
    /// It is from an old epoch or repeats a step; nothing changed.
    Stale,
}

/// A reply that no correct shard sends; the epoch must end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// An answer to a step that was not sent.
    #[error("outcome of step {got}, the step in flight is {expected}")]
    Number {
        /// The outcome's.
        got: u64,
        /// The step in flight, or the next one.
        expected: u64,
    },
    /// Not the rows that were asked for.
    #[error("outcome of step {number} has other rows than the step")]
    Rows {
        /// The step's number.
        number: u64,
    },
    /// A token too many or too few.
    #[error("sequence {sequence} got {got} tokens, sampling was {asked}")]
    Tokens {
        /// The request's id.
        sequence: u64,
        /// Tokens of the outcome.
        got: usize,
        /// Whether the row sampled.
        asked: bool,
    },
    /// A token after a guess that was wrong.
    #[error("sequence {sequence} went on after a guess that was wrong")]
    Guess {
        /// The request's id.
        sequence: u64,
    },
}

/// Something happened to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The request's id.
    pub request: u64,
    /// What happened.
    pub what: What,
}

/// What happens to a request, in order; exactly one terminal comes last, unless it is cancelled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// Its first row was planned.
    Started {
        /// Time since admission.
        queued: Time,
        /// Prompt tokens found in the prefix cache.
        cached_tokens: u32,
    },
    /// A token was committed to its journal.
    Token {
        /// The row of the reply that brought it.
        row: usize,
        /// Its place among that row's tokens.
        place: usize,
    },
    /// Complete. Terminal.
    Finished(Finish),
    /// Ended early. Terminal.
    Failed(Failure),
}

/// Why an answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// It has all tokens it asked for.
    Length,
    /// Its last token ends answers.
    EndToken,
}

/// Why a request ended early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The shard failed its row.
    Row(String),
    /// Its deadline passed.
    Deadline,
    /// The server ends.
    ShuttingDown,
    /// Its adapter cannot be loaded.
    Adapter(String),
    /// Replays did not bring it through.
    Unavailable(String),
    /// The shard died of it, or of one that asks the same.
    Deadly,
}

/// Why a request was not admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The queue is full; room is expected after this time.
    Overloaded(Time),
    /// It can never fit.
    TooLong {
        /// Tokens of prompt and answer.
        asked: u32,
        /// Most that fit.
        limit: u32,
    },
    /// Its memory, or an image of it, has to be computed in one step and is larger than one.
    Indivisible {
        /// Tokens in one piece.
        asked: u32,
        /// Most that a step takes in one piece.
        limit: u32,
    },
    /// The shard died of one that asks the same; it may come again after this time.
    Quarantined(Time),
    /// Its adapter is unknown, failed or leaving.
    UnknownAdapter,
    /// No epoch has begun yet.
    NotReady,
}
