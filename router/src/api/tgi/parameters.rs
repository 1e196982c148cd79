//! From TGI's parameters to a request, with TGI's rules and defaults.

use serde_json::Number;

use super::types::GenerateParameters;
use crate::api::App;
use crate::api::error::ApiError;
use crate::api::request::{GenerateRequest, Names, Prompt, SamplingFields};
use crate::api::validate::{adapter_source, chosen_adapter, unsupported};

/// What the handlers need beside the request itself.
pub struct Asked {
    /// The request.
    pub request: GenerateRequest,
    /// Answers to pick the best from.
    pub best_of: usize,
    /// Whether details are wanted.
    pub details: bool,
    /// Whether the prompt goes before the answer.
    pub full_text: Option<bool>,
    /// Where alternatives to tokens are told.
    pub alternatives: Alternatives,
}

/// Where alternatives to tokens are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alternatives {
    /// In lists beside the tokens, as TGI's `top_n_tokens` asks.
    Beside,
    /// In each token, as LoRAX's `return_k_alternatives` asks.
    Within,
}

const NAMES: Names = Names {
    prompt: "inputs",
    adapter: "adapter_id",
    max_new_tokens: "max_new_tokens",
    prompt_logprobs: "decoder_input_details",
};

/// Reads a body's fields. Parameters that are absent altogether mean sampling; present ones mean greedy unless they say
/// otherwise.
pub fn asked(
    app: &App,
    inputs: String,
    parameters: Option<GenerateParameters>,
    stream: bool,
) -> Result<Asked, ApiError> {
    let absent = parameters.is_none();
    let parameters = parameters.unwrap_or_default();
    refuse_unsupported(&parameters)?;
    let sample = absent
        || parameters.do_sample == Some(true)
        || parameters.temperature.is_some()
        || parameters.top_k.is_some()
        || parameters.top_p.is_some()
        || parameters.typical_p.is_some();
    let seed = parameters.seed.as_ref().map(seed).transpose()?;
    let best_of = best_of(app, &parameters, sample, seed.is_some(), stream)?;
    let prompt_logprobs = parameters.decoder_input_details == Some(true);
    if prompt_logprobs && stream {
        return Err(ApiError::field(
            "decoder_input_details",
            "`decoder_input_details` is not available in streams; use /generate",
        ));
    }
    let (top_logprobs, alternatives) = alternatives(app, &parameters)?;
    Ok(Asked {
        best_of,
        alternatives,
        details: parameters.details == Some(true) || prompt_logprobs,
        full_text: parameters.return_full_text,
        request: GenerateRequest {
            prompt: Prompt::Text {
                text: inputs,
                add_special: true,
            },
            adapter: chosen_adapter(parameters.adapter_id, parameters.lora_id)?,
            adapter_source: adapter_source(
                app,
                parameters.adapter_source.as_deref(),
                parameters.api_token.as_deref(),
            )?,
            sampling: SamplingFields {
                sample,
                temperature: parameters.temperature,
                top_k: parameters.top_k,
                top_p: parameters.top_p,
                typical_p: parameters.typical_p,
                repetition_penalty: parameters.repetition_penalty,
                frequency_penalty: parameters.frequency_penalty,
                presence_penalty: parameters.presence_penalty,
                seed,
                ..SamplingFields::default()
            },
            max_new_tokens: parameters.max_new_tokens,
            default_max_new_tokens: None,
            min_new_tokens: None,
            truncate: parameters.truncate,
            stop: parameters.stop.unwrap_or_default(),
            keep_stop: true,
            ignore_eos: parameters.ignore_eos_token == Some(true),
            top_logprobs,
            prompt_logprobs,
            names: NAMES,
        },
    })
}

fn alternatives(
    app: &App,
    parameters: &GenerateParameters,
) -> Result<(u32, Alternatives), ApiError> {
    let (field, asked, place) = match (parameters.top_n_tokens, parameters.return_k_alternatives) {
        (None, None) => return Ok((0, Alternatives::Beside)),
        (Some(asked), None) => ("top_n_tokens", asked, Alternatives::Beside),
        (None, Some(asked)) => ("return_k_alternatives", asked, Alternatives::Within),
        (Some(_), Some(_)) => {
            return Err(ApiError::field(
                "return_k_alternatives",
                "`return_k_alternatives` and `top_n_tokens` ask for the same in two shapes; send one of them",
            ));
        }
    };
    let most = app.settings.max_top_n_tokens;
    match u32::try_from(asked) {
        Ok(asked) if asked <= most => Ok((asked, place)),
        _ => {
            let message = format!("`{field}` must be between 0 and {most}, {asked} was given");
            Err(ApiError::field(field, message))
        }
    }
}

fn seed(seed: &Number) -> Result<u64, ApiError> {
    seed.as_u64().ok_or_else(|| {
        ApiError::field(
            "seed",
            format!("`seed` must be a whole number from 0 to 2^64 - 1, {seed} was given"),
        )
    })
}

fn best_of(
    app: &App,
    parameters: &GenerateParameters,
    sample: bool,
    seeded: bool,
    stream: bool,
) -> Result<usize, ApiError> {
    let most = app.settings.max_best_of;
    let asked = parameters.best_of.unwrap_or(1);
    let refuse = |message: String| Err(ApiError::field("best_of", message));
    match usize::try_from(asked) {
        Ok(1) => Ok(1),
        Ok(count) if count > 0 && count <= most => {
            if !sample {
                refuse("`best_of` above 1 needs sampling; set `do_sample`".to_owned())
            } else if seeded {
                refuse("`best_of` above 1 draws its own seeds; leave out `seed`".to_owned())
            } else if stream {
                refuse("`best_of` above 1 is not available in streams; use /generate".to_owned())
            } else {
                Ok(count)
            }
        }
        _ => refuse(format!(
            "`best_of` must be between 1 and {most}, {asked} was given"
        )),
    }
}

fn refuse_unsupported(parameters: &GenerateParameters) -> Result<(), ApiError> {
    if parameters.watermark == Some(true) {
        return Err(unsupported("watermark", "answers carry no watermark"));
    }
    let grammars = [
        ("grammar", &parameters.grammar),
        ("response_format", &parameters.response_format),
    ];
    if let Some((field, _)) = grammars.iter().find(|(_, grammar)| grammar.is_some()) {
        return Err(unsupported(
            field,
            "answers cannot be held to a grammar yet",
        ));
    }
    if parameters.merged_adapters.is_some() {
        return Err(unsupported("merged_adapters", "an answer has one adapter"));
    }
    Ok(())
}
