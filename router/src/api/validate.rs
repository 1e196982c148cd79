//! From a request as it was sent to one that cannot fail on its content any more.

use std::sync::Arc;

use super::App;
use super::adapters::bring;
use super::error::{ApiError, Kind};
use super::prompt::{Limits, Reading, read};
use super::request::{Caller, GenerateRequest, Source};
use super::sampling::check_sampling;
use crate::request::{AdapterId, ValidRequest};

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
        .filter(|&asked| asked <= 0 || asked > i64::from(limits.longest()))
    {
        let message = format!(
            "`truncate` must be at least 1 and below {}, {asked} was given",
            limits.longest() + 1
        );
        return Err(ApiError::field("truncate", message));
    }
    let adapter = match &request.adapter {
        Some(name) => {
            let found = resolve(app, caller, name, request.adapter_source).await;
            let at_fault = Some(request.names.adapter.to_owned());
            Some(found.map_err(|error| ApiError {
                param: at_fault,
                ..error
            })?)
        }
        None => None,
    };
    if let (true, Some(_)) = (request.prompt_logprobs, limits.decoder_start) {
        let why = "an encoder reads the prompt and predicts none of its tokens";
        return Err(unsupported(request.names.prompt_logprobs, why));
    }
    let how = Reading {
        limits,
        truncate: request.truncate,
        images: status
            .description
            .as_ref()
            .and_then(|model| model.images.as_ref()),
        field: request.names.prompt,
    };
    let prompt = read(app, request.prompt, how).await?;
    let max_new_tokens = prompt.answer_length(
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
            prompt: prompt.ids,
            source: prompt.source,
            images: prompt.images,
            memory_tokens: prompt.memory_tokens,
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
        prompt_text: prompt.text,
    })
}

async fn resolve(
    app: &App,
    caller: &Caller,
    name: &str,
    source: Option<Source>,
) -> Result<AdapterMark, ApiError> {
    let adapters = app.engine.adapters();
    if let (Some(source), Err(_)) = (source, adapters.resolve(name)) {
        bring(app, caller, name, source).await?;
    }
    let id = adapters.resolve(name)?;
    let digest = adapters.get(id).map(|info| info.digest).unwrap_or_default();
    Ok(AdapterMark {
        id,
        name: name.to_owned(),
        digest,
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

/// LoRAX's `adapter_source`, and its `api_token`, which is refused.
pub fn adapter_source(
    app: &App,
    source: Option<&str>,
    api_token: Option<&str>,
) -> Result<Option<Source>, ApiError> {
    if api_token.is_some_and(|token| !token.is_empty()) {
        return Err(unsupported(
            "api_token",
            "adapters are loaded with the server's own credentials",
        ));
    }
    match source {
        None | Some("") => Ok(app.settings.default_adapter_source),
        Some("hub") => Ok(Some(Source::Hub)),
        Some("local") => Ok(Some(Source::Local)),
        Some(other) => Err(ApiError::field(
            "adapter_source",
            format!("`adapter_source` is `{other}`; only `hub` and `local` are known here"),
        )),
    }
}

/// Whether a name stands for the base model, where no adapter has it: the model's own, and those that clients send who
/// were not told any. "dummy" is that of the hub's InferenceClient.
pub fn is_base(app: &App, name: &str) -> bool {
    matches!(name, "tgi" | "default" | "dummy") || name == app.settings.model_id
}

/// The adapter meant by OpenAI's `model`; 404 where there is none and `source` says nowhere to load it from.
pub fn adapter_of_model(
    app: &App,
    model: &str,
    source: Option<Source>,
) -> Result<Option<String>, ApiError> {
    match app.engine.adapters().resolve(model) {
        Ok(_) => Ok(Some(model.to_owned())),
        Err(_) if model.is_empty() || is_base(app, model) => Ok(None),
        Err(_) if source.is_some() => Ok(Some(model.to_owned())),
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
