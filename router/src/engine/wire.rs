//! Between the scheduler's words and the wire's.

use std::collections::HashMap;

use kvrun_proto::{Admit, Image, Outcome, Placement, Row, Step, Token};
use kvrun_scheduler::{Reply, RowReply, Scheduler};

use super::tell::Open;
use crate::request::{self, TokenInfo};

/// A planned step as every rank gets it; `open` has what the scheduler does not know of admitted requests.
pub(super) fn step(
    scheduler: &Scheduler,
    step: kvrun_scheduler::Step,
    open: &HashMap<u64, Open>,
) -> Step {
    let admit = step.admit.iter().filter_map(|admission| {
        let journal = scheduler.journal(admission.sequence)?;
        let open = open.get(&admission.sequence)?;
        Some(Admit {
            sequence: admission.sequence,
            tokens: [journal.prompt(), journal.answer()].concat(),
            prompt_tokens: journal.prompt().len() as u32,
            sampling: Some(open.sampling()),
            adapter: admission.adapter,
            memory_tokens: open.source.to_vec(),
            memory_pages: admission.memory.clone(),
            images: open.images.iter().map(image).collect(),
            long: admission.long,
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
                drafts: row.guesses,
            })
            .collect(),
        release: step.release,
        displace: step.displace,
        place: step.place.into_iter().map(placement).collect(),
    }
}

fn placement(place: kvrun_scheduler::Placement) -> Placement {
    Placement {
        adapter: place.adapter,
        first: place.first,
    }
}

fn image(image: &request::Image) -> Image {
    Image {
        data: image.data.to_vec(),
        at: image.at,
        tokens: image.tokens,
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
