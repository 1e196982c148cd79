//! From the fields that both routes share to requests, and from answers to what both routes say.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use utoipa::ToSchema;

use super::answers::*;
use super::types::*;
use crate::api::App;
use crate::api::answer::{EndReason, Figures, Generation, TextToken};
use crate::api::error::ApiError;
use crate::api::request::{GenerateRequest, Names, Prompt, SamplingFields};
use crate::api::tgi::types::AdapterDetails;
use crate::api::validate::{
    AdapterMark, TOP_LOGPROBS, adapter_of_model, adapter_source, chosen_adapter, unsupported,
};
use crate::request::TokenInfo;

/// What is left to say per prompt once the shared fields are read.
pub struct Template {
    /// A request without its prompt.
    request: GenerateRequest,
    /// Answers per prompt.
    pub n: usize,
}

impl Template {
    /// The request for one prompt.
    pub fn with(&self, prompt: Prompt) -> GenerateRequest {
        GenerateRequest {
            prompt,
            ..self.request.clone()
        }
    }
}

/// Reads the shared fields. `alternatives` is how many are wanted with each token, if log-probabilities are.
pub fn read(
    app: &App,
    common: Common<'_>,
    max_new_tokens: Option<i64>,
    alternatives: u32,
    names: Names,
) -> Result<Template, ApiError> {
    if !common.stream && common.stream_options.is_some() {
        return Err(ApiError::field(
            "stream_options",
            "`stream_options` needs `stream`; set it or leave both out",
        ));
    }
    check_response_format(common.response_format)?;
    let source = adapter_source(app, common.adapter_source, common.api_token)?;
    let by_model = adapter_of_model(app, common.model, source)?;
    let adapter = match (by_model, chosen_adapter(common.adapter_id, common.lora_id)?) {
        (Some(model), Some(other)) if model != other => {
            let message = format!(
                "`model` asks for `{model}` and `adapter_id` for `{other}`; send one of them"
            );
            return Err(ApiError::field("adapter_id", message));
        }
        (by_model, by_field) => by_model.or(by_field),
    };
    let asked = common.n.unwrap_or(1);
    let n = usize::try_from(asked).ok().filter(|&n| n > 0);
    let n = n.ok_or_else(|| {
        ApiError::field("n", format!("`n` must be at least 1, {asked} was given"))
    })?;
    Ok(Template {
        n,
        request: GenerateRequest {
            prompt: Prompt::Ids(vec![]),
            adapter,
            adapter_source: source,
            sampling: SamplingFields {
                // OpenAI's way to ask for the most likely token.
                sample: common.temperature != Some(0.0),
                temperature: common.temperature.filter(|&temperature| temperature != 0.0),
                top_k: common.top_k.filter(|top_k| ![0, -1].contains(top_k)),
                top_p: common.top_p.filter(|&top_p| top_p != 1.0),
                typical_p: common.typical_p.filter(|&typical_p| typical_p != 1.0),
                min_p: common.min_p,
                repetition_penalty: common.repetition_penalty,
                frequency_penalty: common.frequency_penalty,
                presence_penalty: common.presence_penalty,
                logit_bias: common.logit_bias,
                seed: common.seed.map(seed).transpose()?,
            },
            max_new_tokens,
            default_max_new_tokens: None,
            min_new_tokens: common.min_tokens,
            truncate: None,
            stop: common.stop,
            keep_stop: false,
            ignore_eos: common.ignore_eos,
            top_logprobs: alternatives,
            prompt_logprobs: false,
            names,
        },
    })
}

/// OpenAI's seeds may be negative; every one of 64 bits is its own.
fn seed(seed: &serde_json::Number) -> Result<u64, ApiError> {
    let bits = seed
        .as_u64()
        .or_else(|| seed.as_i64().map(i64::cast_unsigned));
    bits.ok_or_else(|| {
        ApiError::field(
            "seed",
            format!("`seed` must be a whole number of 64 bits, {seed} was given"),
        )
    })
}

fn check_response_format(format: Option<&Value>) -> Result<(), ApiError> {
    let kind = format.map(|format| {
        format
            .get("type")
            .and_then(Value::as_str)
            .unwrap_or("without type")
    });
    match kind {
        None | Some("text") => Ok(()),
        Some(kind) => Err(unsupported(
            "response_format",
            &format!("answers cannot be held to `{kind}` yet, only to `text`"),
        )),
    }
}

/// A number of alternatives to report with each token.
pub fn alternatives(field: &str, asked: Option<i64>) -> Result<u32, ApiError> {
    let asked = asked.unwrap_or(0);
    u32::try_from(asked)
        .ok()
        .filter(|&asked| asked <= TOP_LOGPROBS)
        .ok_or_else(|| {
            let message =
                format!("`{field}` must be between 0 and {TOP_LOGPROBS}, {asked} was given");
            ApiError::field(field, message)
        })
}

/// The frame of every document of one request: its id, time and model.
#[derive(Clone)]
pub struct Frame {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
}

impl Frame {
    /// A frame with a random id; the time is now.
    pub fn new(app: &App, prefix: &str, object: &'static str, model: &str) -> Self {
        Self {
            id: format!("{prefix}-{}", crate::api::auth::random_id()),
            object,
            created: unix_seconds(),
            model: if model.is_empty() {
                app.settings.model_id.clone()
            } else {
                model.to_owned()
            },
        }
    }

    /// A document with `choices`.
    pub fn with<C: ToSchema>(&self, choices: Vec<C>) -> Completion<C> {
        Completion {
            id: self.id.clone(),
            object: self.object,
            created: self.created,
            model: self.model.clone(),
            system_fingerprint: format!("kvrun-{}", env!("CARGO_PKG_VERSION")),
            choices,
            usage: None,
            details: None,
        }
    }
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs()
}

/// "stop" or "length".
pub fn finish_reason(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Length => "length",
        EndReason::EndToken | EndReason::StopText => "stop",
    }
}

/// What is told beyond OpenAI's fields.
pub fn details(
    adapter: Option<&AdapterMark>,
    seed: Option<u64>,
    figures: &Figures,
) -> AnswerDetails {
    AnswerDetails {
        adapter: adapter.map(AdapterDetails::from),
        seed,
        cached_tokens: figures.cached,
        queue_time_ms: figures.queue.as_secs_f64() * 1e3,
        inference_time_ms: figures.inference().as_secs_f64() * 1e3,
    }
}

impl Usage {
    /// Counts a prompt, once however many answers it gets.
    pub fn add_prompt(&mut self, generations: &[Generation]) {
        let tokens = generations
            .first()
            .map_or(0, |generation| generation.prompt.len());
        self.prompt_tokens += u32::try_from(tokens).unwrap_or(u32::MAX);
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }

    /// Counts an answer.
    pub fn add_answer(&mut self, figures: &Figures) {
        self.completion_tokens += figures.generated;
        self.prompt_tokens_details.cached_tokens =
            self.prompt_tokens_details.cached_tokens.max(figures.cached);
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// A token of a chat answer with its alternatives.
pub fn chat_logprob(app: &App, token: &TextToken) -> ChatTokenLogprob {
    let entry = |id: u32, logprob: f32| {
        let text = app.text.tokenizer().token_text(id);
        ChatTokenLogprob {
            bytes: (!text.contains('\u{fffd}')).then(|| text.as_bytes().to_vec()),
            token: text,
            logprob,
            top_logprobs: None,
        }
    };
    let top = token
        .info
        .top
        .iter()
        .map(|&(id, logprob)| entry(id, logprob))
        .collect();
    ChatTokenLogprob {
        top_logprobs: Some(top),
        ..entry(token.info.id, token.info.logprob)
    }
}

impl CompletionLogprobs {
    /// Appends a token; `logprob` is `None` where nothing came before it.
    pub fn push(&mut self, app: &App, info: &TokenInfo, logprob: Option<f32>, offset: usize) {
        let tokenizer = app.text.tokenizer();
        self.tokens.push(tokenizer.token_text(info.id));
        self.token_logprobs.push(logprob);
        let top = info
            .top
            .iter()
            .map(|&(id, logprob)| (tokenizer.token_text(id), logprob));
        self.top_logprobs
            .push((!info.top.is_empty()).then(|| top.collect()));
        self.text_offset.push(offset);
    }
}
