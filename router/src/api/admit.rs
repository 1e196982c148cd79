//! From checked requests to admitted ones. Everything that can be refused is refused here, before the first byte.

use metrics::counter;

use super::App;
use super::answer::Generation;
use super::error::{ApiError, Kind};
use super::request::{Caller, GenerateRequest};
use super::validate::{Checked, check_count, validate};
use crate::metrics as names;

/// What a body asks for: some prompts, and several answers to each.
pub struct Batch {
    /// One request per prompt.
    pub requests: Vec<GenerateRequest>,
    /// Independent answers to each.
    pub copies: usize,
    /// The field that asks for so many answers, for messages.
    pub field: &'static str,
    /// The route's name in metrics.
    pub method: &'static str,
}

/// One prompt's answers.
pub struct Admitted {
    /// What was checked.
    pub checked: Checked,
    /// Its answers, all queued.
    pub generations: Vec<Generation>,
}

/// Admits a whole batch or nothing of it.
pub async fn admit(app: &App, caller: &Caller, batch: Batch) -> Result<Vec<Admitted>, ApiError> {
    counter!(names::REQUEST_COUNT, "method" => batch.method).increment(1);
    let count = batch.requests.len().saturating_mul(batch.copies);
    check_count(app, batch.field, count)?;
    let mut permits = app.permits(count)?;
    let mut checked = Vec::with_capacity(batch.requests.len());
    for request in batch.requests {
        checked.push(validate(app, caller, request).await?);
    }
    let mut admitted = Vec::with_capacity(checked.len());
    for checked in checked {
        let mut generations = Vec::with_capacity(batch.copies);
        for copy in 0..batch.copies {
            let mut own = checked.clone();
            // Each answer has its own chance, and the first one is what a request for one answer gives.
            own.request.sampling.seed = own.request.sampling.seed.wrapping_add(copy as u64);
            let permit = permits
                .split(1)
                .ok_or_else(|| ApiError::new(Kind::Incomplete, "fewer permits than answers"))?;
            generations.push(Generation::submit(app, caller, &own, permit, batch.method).await?);
        }
        admitted.push(Admitted {
            checked,
            generations,
        });
    }
    let with_images = |one: &&mut Admitted| !one.checked.request.images.is_empty();
    for one in admitted.iter_mut().filter(with_images) {
        for generation in &mut one.generations {
            generation.first().await?;
        }
    }
    Ok(admitted)
}

/// The only answer of a batch that asked for one.
pub fn only(admitted: Vec<Admitted>) -> Option<(Checked, Generation)> {
    let mut first = admitted.into_iter().next()?;
    Some((first.checked, first.generations.pop()?))
}
