//! Steps as the shard gets them.

use super::{Beside, Client};
use kvrun_scheduler::{Scheduler, Step};
use std::collections::BTreeMap;

/// A step as the shard gets it.
pub(super) fn wire(
    scheduler: &Scheduler,
    step: &Step,
    clients: &BTreeMap<u64, Client>,
) -> kvrun_proto::Step {
    let admit = step.admit.iter().filter_map(|admission| {
        let journal = scheduler.journal(admission.sequence)?;
        let beside = clients
            .get(&admission.sequence)
            .map(|client| &client.beside);
        Some(kvrun_proto::Admit {
            sequence: admission.sequence,
            tokens: [journal.prompt(), journal.answer()].concat(),
            prompt_tokens: journal.prompt().len() as u32,
            sampling: clients
                .get(&admission.sequence)
                .map(|client| client.sampling.clone()),
            adapter: admission.adapter,
            memory_tokens: beside.map_or_else(Vec::new, |beside| beside.source.clone()),
            memory_pages: admission.memory.clone(),
            images: beside.map_or_else(Vec::new, Beside::wire),
            long: admission.long,
        })
    });
    let rows = step.rows.iter().map(|row| kvrun_proto::Row {
        sequence: row.sequence,
        start: row.start,
        tokens: row.tokens,
        pages: row.pages.clone(),
        sample: row.sample,
        drafts: row.guesses.clone(),
    });
    kvrun_proto::Step {
        epoch: step.epoch,
        number: step.number,
        release: step.release.clone(),
        displace: step.displace.clone(),
        place: step
            .place
            .iter()
            .map(|place| kvrun_proto::Placement {
                adapter: place.adapter,
                first: place.first,
            })
            .collect(),
        admit: admit.collect(),
        rows: rows.collect(),
    }
}
