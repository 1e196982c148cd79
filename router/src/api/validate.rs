//! From a request as it was sent to one that cannot fail on its content any more.

use std::sync::Arc;

use super::App;
use super::error::{ApiError, Kind};
use super::request::{Caller, GenerateRequest, Names, Prompt};
use super::sampling::check_sampling;
use crate::request::{AdapterId, Status, ValidRequest};

/// Bytes of text per allowed token that are still tokenized; longer texts are refused unread.
const BYTES_PER_TOKEN: usize = 8;
/// Longest stop string, in bytes.
const STOP_BYTES: usize = 256;
/// Most alternatives that the wire carries with each token.
pub const TOP_LOGPROBS: u32 = 20;

/// An adapter as answers name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterMark {
    /// The registry's id of it.
    pub id: AdapterId,
    /// The name clients use.
    pub name: String,
    /// SHA-256 of its content.
    pub digest: String,
}

/// A checked request, with what the answer needs beside the engine's part.
#[derive(Debug, Clone)]
pub struct Checked {
    /// The engine's part.
    pub request: ValidRequest,
    /// The adapter it resolved to.
    pub adapter: Option<AdapterMark>,
    /// Strings that end the answer.
    pub stop: Vec<String>,
    /// Whether the one that does belongs to it.
    pub keep_stop: bool,
    /// The prompt as text, as sent; empty when it came as ids.
    pub prompt_text: String,
}

impl Checked {
    /// Whether chance plays a part, so that the seed matters.
    pub fn is_sampled(&self) -> bool {
        self.request.sampling.temperature > 0.0
    }
}

/// How long sequences may be right now, in tokens.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Prompt and answer together.
    pub total: u32,
    /// The prompt.
    pub input: u32,
    /// Ids are below this.
    pub vocabulary: u32,
}

impl Limits {
    /// Limits of the serving epoch, or 503 where there is none.
    pub fn of(status: &Status, max_input_tokens: Option<u32>) -> Result<Self, ApiError> {
        let (Some(description), true) = (&status.description, status.max_total_tokens > 1) else {
            return Err(crate::request::Refusal::NotReady.into());
        };
        let longest = status.max_total_tokens - 1;
        Ok(Self {
            total: status.max_total_tokens,
            input: max_input_tokens.map_or(longest, |limit| limit.min(longest)),
            vocabulary: description.vocabulary,
        })
    }

    /// Most bytes of a prompt that are looked at.
    pub fn bytes(&self) -> usize {
        (self.input as usize).saturating_mul(BYTES_PER_TOKEN)
    }
}

/// Checks everything about a request and tokenizes its prompt.
pub async fn validate(
    app: &App,
    caller: &Caller,
    request: GenerateRequest,
) -> Result<Checked, ApiError> {
    let status = app.engine.status();
    let limits = Limits::of(&status, app.settings.max_input_tokens)?;
    let mut sampling = check_sampling(&request.sampling, limits.vocabulary)?;
    check_stop(&request.stop, app.settings.max_stop_sequences)?;
    if request.max_new_tokens.is_some_and(|asked| asked <= 0) {
        let field = request.names.max_new_tokens;
        let asked = request.max_new_tokens.unwrap_or_default();
        return Err(ApiError::field(
            field,
            format!("`{field}` must be at least 1, {asked} was given"),
        ));
    }
    if let Some(asked) = request
        .truncate
        .filter(|&asked| asked <= 0 || asked >= i64::from(limits.total))
    {
        let message = format!(
            "`truncate` must be at least 1 and below {}, {asked} was given",
            limits.total
        );
        return Err(ApiError::field("truncate", message));
    }
    let adapter = request
        .adapter
        .as_deref()
        .map(|name| resolve(app, name))
        .transpose()?;
    let (prompt, prompt_text) =
        prompt_ids(app, request.prompt, request.truncate, limits, request.names).await?;
    let max_new_tokens = answer_length(
        prompt.len(),
        request.max_new_tokens,
        request.default_max_new_tokens,
        limits,
        request.names,
    )?;
    let end_tokens: Arc<[u32]> = match &status.description {
        Some(description) if !request.ignore_eos => description.end_tokens.as_slice().into(),
        _ => Arc::default(),
    };
    if let Some(asked) = request.min_new_tokens {
        let least = u32::try_from(asked)
            .ok()
            .filter(|&least| least <= max_new_tokens)
            .ok_or_else(|| {
                let message = format!(
                    "`min_tokens` must be between 0 and {max_new_tokens}, {asked} was given"
                );
                ApiError::field("min_tokens", message)
            })?;
        sampling.suppressed = end_tokens.to_vec();
        sampling.suppressed_until = least;
    }
    sampling.top_logprobs = request.top_logprobs;
    sampling.prompt_logprobs = request.prompt_logprobs;
    Ok(Checked {
        request: ValidRequest {
            prompt,
            adapter: adapter.as_ref().map(|adapter| adapter.id),
            sampling,
            max_new_tokens,
            end_tokens,
            tenant: caller.tenant.clone(),
            deadline: Some(caller.deadline),
            reuse_prefix: !request.prompt_logprobs,
        },
        adapter,
        stop: request.stop,
        keep_stop: request.keep_stop,
        prompt_text,
    })
}

fn resolve(app: &App, name: &str) -> Result<AdapterMark, ApiError> {
    let adapters = app.engine.adapters();
    let id = adapters.resolve(name)?;
    let digest = adapters.get(id).map(|info| info.digest).unwrap_or_default();
    Ok(AdapterMark {
        id,
        name: name.to_owned(),
        digest,
    })
}

async fn prompt_ids(
    app: &App,
    prompt: Prompt,
    truncate: Option<i64>,
    limits: Limits,
    names: Names,
) -> Result<(Arc<[u32]>, String), ApiError> {
    let field = names.prompt;
    let (mut ids, text) = match prompt {
        Prompt::Text { text, .. } if text.is_empty() => {
            return Err(ApiError::field(
                field,
                format!("`{field}` is empty; send at least one character"),
            ));
        }
        Prompt::Text { text, add_special } => {
            let encoded = app
                .text
                .encode(text.clone(), add_special, limits.bytes())
                .await
                .map_err(|error| ApiError {
                    message: format!("`{field}`: {error} (at most {} tokens)", limits.input),
                    ..ApiError::from(error)
                })?;
            (encoded.ids, text)
        }
        Prompt::Ids(ids) => (check_ids(&ids, limits, field)?, String::new()),
    };
    if let Some(keep) = truncate.and_then(|keep| usize::try_from(keep).ok()) {
        ids.drain(..ids.len().saturating_sub(keep));
    }
    if ids.is_empty() {
        return Err(ApiError::field(
            field,
            format!("`{field}` gives no tokens; send at least one"),
        ));
    }
    // The tokenizer may know more ids than the model has logits for.
    if let Some(id) = ids.iter().find(|&&id| id >= limits.vocabulary) {
        return Err(outside(field, i64::from(*id), limits.vocabulary));
    }
    if ids.len() > limits.input as usize {
        let message = format!(
            "`{field}` has {} tokens and at most {} are allowed; shorten it or set `truncate`",
            ids.len(),
            limits.input
        );
        return Err(ApiError::field(field, message));
    }
    Ok((ids.into(), text))
}

fn check_ids(ids: &[i64], limits: Limits, field: &str) -> Result<Vec<u32>, ApiError> {
    ids.iter()
        .map(|&id| {
            u32::try_from(id)
                .ok()
                .filter(|&id| id < limits.vocabulary)
                .ok_or_else(|| outside(field, id, limits.vocabulary))
        })
        .collect()
}

fn outside(field: &str, id: i64, vocabulary: u32) -> ApiError {
    let message = format!(
        "`{field}` holds token id {id}; ids of this model are 0 to {}",
        vocabulary.saturating_sub(1)
    );
    ApiError::field(field, message)
}

fn answer_length(
    prompt: usize,
    asked: Option<i64>,
    default: Option<u32>,
    limits: Limits,
    names: Names,
) -> Result<u32, ApiError> {
    let room = limits
        .total
        .saturating_sub(u32::try_from(prompt).unwrap_or(u32::MAX));
    let Some(asked) = asked else {
        return Ok(default.map_or(room, |default| default.min(room)));
    };
    u32::try_from(asked).ok().filter(|&asked| asked <= room).ok_or_else(|| {
        let Names { prompt: field, max_new_tokens } = names;
        let message = format!(
            "`{field}` has {prompt} tokens and `{max_new_tokens}` asks for {asked} more, together at most {} are \
             allowed; ask for at most {room}",
            limits.total
        );
        ApiError::field(max_new_tokens, message)
    })
}

fn check_stop(stop: &[String], most: usize) -> Result<(), ApiError> {
    if stop.len() > most {
        let message = format!(
            "`stop` takes at most {most} strings, {} were given",
            stop.len()
        );
        return Err(ApiError::field("stop", message));
    }
    for text in stop {
        if text.is_empty() || text.len() > STOP_BYTES {
            let message = format!(
                "a string of `stop` has {} bytes; 1 to {STOP_BYTES} are allowed",
                text.len()
            );
            return Err(ApiError::field("stop", message));
        }
    }
    Ok(())
}

/// Refuses a number of answers beyond the limit, before any of them costs anything.
pub fn check_count(app: &App, field: &str, count: usize) -> Result<(), ApiError> {
    let most = app.settings.max_client_batch_size;
    if count == 0 || count > most {
        let message = format!(
            "one request may ask for 1 to {most} answers, {count} were asked for by `{field}`"
        );
        return Err(ApiError::field(field, message));
    }
    Ok(())
}

/// Refuses a field that this server knows and does not have.
pub fn unsupported(field: &str, why: &str) -> ApiError {
    ApiError::field(
        field,
        format!("`{field}` is not supported: {why}; leave it out"),
    )
}

/// The adapter meant by `adapter_id` and kv.run's `lora_id`; both may name the base model.
pub fn chosen_adapter(
    adapter_id: Option<String>,
    lora_id: Option<String>,
) -> Result<Option<String>, ApiError> {
    let adapter = adapter_id.filter(|name| !name.is_empty() && name != "__base_model__");
    let lora = lora_id.filter(|name| !name.is_empty() && name != "empty");
    match (adapter, lora) {
        (Some(adapter), Some(lora)) if adapter != lora => Err(ApiError::field(
            "lora_id",
            format!(
                "`adapter_id` asks for `{adapter}` and `lora_id` for `{lora}`; send one of them"
            ),
        )),
        (adapter, lora) => Ok(adapter.or(lora)),
    }
}

/// The adapter meant by OpenAI's `model`, or 404.
pub fn adapter_of_model(app: &App, model: &str) -> Result<Option<String>, ApiError> {
    if matches!(model, "" | "tgi" | "default") || model == app.settings.model_id {
        return Ok(None);
    }
    match app.engine.adapters().resolve(model) {
        Ok(_) => Ok(Some(model.to_owned())),
        Err(_) => Err(ApiError {
            param: Some("model".to_owned()),
            ..ApiError::new(
                Kind::NotFound,
                format!(
                    "model `{model}` is not served here; /v1/models lists the base model and its adapters"
                ),
            )
        }),
    }
}
