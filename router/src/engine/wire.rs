//! Between the scheduler's words and the wire's.

use kvrun_proto::{Admit, Outcome, Row, Sampling, Step, Token};
use kvrun_scheduler::{Reply, RowReply, Scheduler};

use crate::request::TokenInfo;

/// A planned step as every rank gets it; `sampling` says how each admitted sequence is sampled.
pub(super) fn step(
    scheduler: &Scheduler,
    step: kvrun_scheduler::Step,
    sampling: impl Fn(u64) -> Sampling,
) -> Step {
    let admit = step.admit.iter().filter_map(|admission| {
        let journal = scheduler.journal(admission.sequence)?;
        Some(Admit {
            sequence: admission.sequence,
            tokens: [journal.prompt(), journal.answer()].concat(),
            prompt_tokens: journal.prompt().len() as u32,
            sampling: Some(sampling(admission.sequence)),
            adapter: admission.adapter,
            ..Default::default()
        })
    });
    Step {
        epoch: step.epoch,
        number: step.number,
        admit: admit.collect(),
        rows: step
            .rows
            .into_iter()
            .map(|row| Row {
                sequence: row.sequence,
                start: row.start,
                tokens: row.tokens,
                pages: row.pages,
                sample: row.sample,
                drafts: Vec::new(),
            })
            .collect(),
        release: step.release,
    }
}

/// An outcome as the scheduler takes it.
pub(super) fn reply(outcome: &Outcome) -> Reply {
    Reply {
        epoch: outcome.epoch,
        number: outcome.number,
        rows: outcome
            .rows
            .iter()
            .map(|row| RowReply {
                sequence: row.sequence,
                tokens: row.tokens.iter().map(|token| token.id).collect(),
                error: (!row.error.is_empty()).then(|| row.error.clone()),
            })
            .collect(),
    }
}

/// A token as a client's answer shows it.
pub(super) fn token(token: Token) -> TokenInfo {
    TokenInfo {
        id: token.id,
        logprob: token.logprob,
        top: token
            .top
            .into_iter()
            .map(|other| (other.id, other.logprob))
            .collect(),
    }
}
