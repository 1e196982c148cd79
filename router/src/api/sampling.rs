//! How tokens are chosen: from the numbers as they were sent to the shard's settings.

use std::collections::HashMap;

use kvrun_proto::Sampling;

use super::error::ApiError;
use super::request::SamplingFields;

/// Most ids with a bias.
const BIASED_IDS: usize = 1024;

/// Checks every number; the seed is drawn here when none was sent.
pub fn check_sampling(fields: &SamplingFields, vocabulary: u32) -> Result<Sampling, ApiError> {
    let positive = |name, value| real(name, value, "above 0", |value| value > 0.0);
    let share = |name, value| {
        real(name, value, "above 0 and below 1", |value| {
            value > 0.0 && value < 1.0
        })
    };
    let penalty = |name, value| {
        real(name, value, "from -2 to 2", |value| {
            (-2.0..=2.0).contains(&value)
        })
    };
    let top_k = match fields.top_k {
        None => 0,
        // Keeping as many tokens as there are is keeping all.
        Some(asked) if asked > 0 => u32::try_from(asked).unwrap_or(u32::MAX).min(vocabulary),
        Some(asked) => {
            let message = format!("`top_k` must be at least 1, {asked} was given");
            return Err(ApiError::field("top_k", message));
        }
    };
    let temperature = positive("temperature", fields.temperature)?.unwrap_or(1.0);
    Ok(Sampling {
        temperature: if fields.sample { temperature } else { 0.0 },
        top_k,
        top_p: share("top_p", fields.top_p)?.unwrap_or(1.0),
        typical_p: share("typical_p", fields.typical_p)?.unwrap_or(1.0),
        min_p: real("min_p", fields.min_p, "from 0 to 1", |value| {
            (0.0..=1.0).contains(&value)
        })?
        .unwrap_or(0.0),
        repetition_penalty: positive("repetition_penalty", fields.repetition_penalty)?
            .unwrap_or(1.0),
        frequency_penalty: penalty("frequency_penalty", fields.frequency_penalty)?.unwrap_or(0.0),
        presence_penalty: penalty("presence_penalty", fields.presence_penalty)?.unwrap_or(0.0),
        seed: fields.seed.unwrap_or_else(rand::random),
        logit_bias: check_bias(fields, vocabulary)?,
        ..Sampling::default()
    })
}

/// A number that single precision holds as well, within a range. `allowed` says the range in words.
fn real(
    name: &str,
    value: Option<f64>,
    allowed: &str,
    within: impl Fn(f32) -> bool,
) -> Result<Option<f32>, ApiError> {
    let Some(asked) = value else { return Ok(None) };
    let single = asked as f32;
    let faithful = single.is_normal() || (single == 0.0 && asked == 0.0);
    if faithful && within(single) {
        return Ok(Some(single));
    }
    let message = format!("`{name}` must be a finite number {allowed}, {asked} was given");
    Err(ApiError::field(name, message))
}

fn check_bias(fields: &SamplingFields, vocabulary: u32) -> Result<HashMap<u32, f32>, ApiError> {
    if fields.logit_bias.len() > BIASED_IDS {
        let message = format!(
            "`logit_bias` names {} ids, at most {BIASED_IDS} are allowed",
            fields.logit_bias.len()
        );
        return Err(ApiError::field("logit_bias", message));
    }
    let mut biases = HashMap::new();
    for (id, &bias) in &fields.logit_bias {
        let id = id
            .parse::<u32>()
            .ok()
            .filter(|&id| id < vocabulary)
            .ok_or_else(|| {
                let message = format!(
                    "`logit_bias` names `{id}`; ids of this model are 0 to {}",
                    vocabulary.saturating_sub(1)
                );
                ApiError::field("logit_bias", message)
            })?;
        let bias = real("logit_bias", Some(bias), "from -100 to 100", |value| {
            (-100.0..=100.0).contains(&value)
        })?;
        biases.insert(id, bias.unwrap_or_default());
    }
    Ok(biases)
}
