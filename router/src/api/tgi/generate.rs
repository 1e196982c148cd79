//! `/generate`, `/generate_stream` and `/`: one prompt, one answer, whole or as events.

use async_stream::stream;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};

use super::parameters::{Alternatives, Asked, asked};
use super::types::*;
use crate::api::admit::{Admitted, Batch, admit, only};
use crate::api::answer::{EndReason, Figures, Generation, Part, TextToken};
use crate::api::body::JsonBody;
use crate::api::error::{ApiError, Dialect, Kind};
use crate::api::request::Caller;
use crate::api::sse::{self, Message};
use crate::api::whole::Whole;
use crate::api::{App, validate::AdapterMark};
use crate::request::TokenInfo;

/// Continues a text and answers when all of it is there.
#[utoipa::path(post, path = "/generate", tag = "Text Generation", request_body = GenerateBody, responses(
    (status = 200, body = GenerateAnswer), (status = 404, body = ErrorBody), (status = 422, body = ErrorBody),
    (status = 424, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn generate(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    JsonBody(body): JsonBody<GenerateBody>,
) -> Result<Response, ApiError> {
    if body.stream == Some(true) {
        return Err(ApiError::field(
            "stream",
            "`stream` is true and this route answers whole; ask /generate_stream or /",
        ));
    }
    let asked = asked(&app, body.inputs, body.parameters, false)?;
    let (headers, answer) = whole(&app, &caller, asked).await?;
    Ok((headers, Json(answer)).into_response())
}

/// Continues a text and sends an event per token.
#[utoipa::path(post, path = "/generate_stream", tag = "Text Generation", request_body = GenerateBody, responses(
    (status = 200, body = StreamEvent, content_type = "text/event-stream"), (status = 404, body = ErrorBody),
    (status = 422, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn generate_stream(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    JsonBody(body): JsonBody<GenerateBody>,
) -> Result<Response, ApiError> {
    if body.stream == Some(false) {
        return Err(ApiError::field(
            "stream",
            "`stream` is false and this route answers with events; ask /generate or /",
        ));
    }
    let asked = asked(&app, body.inputs, body.parameters, true)?;
    events(&app, &caller, asked).await
}

/// Continues a text, whole in a list of one or as events, by `stream`.
#[utoipa::path(post, path = "/", tag = "Text Generation", request_body = CompatGenerateBody, responses(
    (status = 200, body = Vec<GenerateAnswer>), (status = 422, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub async fn compat_generate(
    state: State<App>,
    caller: Extension<Caller>,
    JsonBody(body): JsonBody<CompatGenerateBody>,
) -> Result<Response, ApiError> {
    compat(&state, &caller, body).await
}

/// What `/` does, for other routes that take the same body.
pub async fn compat(
    app: &App,
    caller: &Caller,
    body: CompatGenerateBody,
) -> Result<Response, ApiError> {
    let stream = body.stream == Some(true);
    let mut asked = asked(app, body.inputs, body.parameters, stream)?;
    asked.full_text = asked.full_text.or(Some(true));
    if stream {
        return events(app, caller, asked).await;
    }
    let (headers, answer) = whole(app, caller, asked).await?;
    Ok((headers, Json([answer])).into_response())
}

async fn whole(
    app: &App,
    caller: &Caller,
    asked: Asked,
) -> Result<(HeaderMap, GenerateAnswer), ApiError> {
    let (prompt_wanted, alternatives) = (asked.request.prompt_logprobs, asked.alternatives);
    let batch = Batch {
        requests: vec![asked.request],
        copies: asked.best_of,
        field: "best_of",
        method: "generate",
    };
    let mut admitted = admit(app, caller, batch).await?;
    let Some(Admitted {
        checked,
        generations,
    }) = admitted.pop()
    else {
        return Err(ApiError::new(Kind::Incomplete, "nothing was admitted"));
    };
    let prompt = checked.request.input().clone();
    let mut answers =
        futures::future::try_join_all(generations.into_iter().map(Whole::collect)).await?;
    answers.sort_by(|left, right| right.score().total_cmp(&left.score()));
    let best = answers.remove(0);
    let writer = Writer {
        app,
        alternatives,
        prompt_tokens: count(&prompt),
        prompt: if prompt_wanted { &prompt } else { &[] },
        prefix: if asked.full_text == Some(true) {
            &checked.prompt_text
        } else {
            ""
        },
    };
    let headers = headers(
        app,
        &best.figures,
        prompt.len(),
        checked.prompt_text.chars().count(),
    );
    let generated_text = format!("{}{}", writer.prefix, best.text);
    let others =
        (!answers.is_empty()).then(|| answers.iter().map(|other| writer.best_of(other)).collect());
    let details = asked
        .details
        .then(|| writer.details(&best, others, checked.adapter.as_ref()));
    Ok((
        headers,
        GenerateAnswer {
            generated_text,
            details,
        },
    ))
}

async fn events(app: &App, caller: &Caller, asked: Asked) -> Result<Response, ApiError> {
    let batch = Batch {
        requests: vec![asked.request],
        copies: 1,
        field: "best_of",
        method: "generate_stream",
    };
    let admitted = admit(app, caller, batch).await?;
    let Some((checked, mut generation)) = only(admitted) else {
        return Err(ApiError::new(Kind::Incomplete, "nothing was admitted"));
    };
    let mut text = match asked.full_text {
        Some(true) => checked.prompt_text,
        _ => String::new(),
    };
    let (details, alternatives) = (asked.details, asked.alternatives);
    let own = app.clone();
    let messages = stream! {
        let mut index = 0;
        loop {
            let (token, reason) = match generation.next().await {
                Ok(Some(Part::Prompt(_))) => continue,
                Ok(Some(Part::Token(token))) => (token, None),
                Ok(Some(Part::Last(token, reason))) => (token, Some(reason)),
                Ok(None) => break,
                Err(error) => { yield Err(error); break; }
            };
            index += 1;
            if !token.special {
                text.push_str(&token.text);
            }
            yield Ok(Message::json(&StreamEvent {
                index,
                top_tokens: top_tokens(&own, &token.info, alternatives),
                token: wire_token(&own, token, alternatives),
                generated_text: reason.map(|_| std::mem::take(&mut text)),
                details: reason.filter(|_| details).map(|reason| stream_details(&generation, reason)),
            }));
        }
    };
    let mut response = sse::respond(caller, Dialect::Tgi, messages);
    response.headers_mut().extend([compute_type(app)]);
    Ok(response)
}

fn stream_details(generation: &Generation, reason: EndReason) -> StreamDetails {
    let figures = &generation.figures;
    StreamDetails {
        finish_reason: reason.into(),
        generated_tokens: figures.generated,
        seed: generation.seed,
        input_length: count(&generation.prompt),
        prompt_tokens: count(&generation.prompt),
        adapter: generation.adapter.as_ref().map(AdapterDetails::from),
        cached_tokens: figures.cached,
        queue_time_ms: milliseconds(figures.queue),
        inference_time_ms: milliseconds(figures.inference()),
    }
}

/// Writes whole answers to one prompt.
struct Writer<'a> {
    app: &'a App,
    alternatives: Alternatives,
    prompt_tokens: u32,
    /// Empty unless it was asked for.
    prompt: &'a [u32],
    prefix: &'a str,
}

impl Writer<'_> {
    fn details(
        &self,
        whole: &Whole,
        best_of_sequences: Option<Vec<BestOfSequence>>,
        adapter: Option<&AdapterMark>,
    ) -> Details {
        Details {
            finish_reason: whole.reason.into(),
            prompt_tokens: self.prompt_tokens,
            generated_tokens: whole.figures.generated,
            seed: whole.seed,
            prefill: self.prefill(whole),
            tokens: self.tokens(whole),
            best_of_sequences,
            top_tokens: self.top_tokens(whole),
            adapter: adapter.map(AdapterDetails::from),
            cached_tokens: whole.figures.cached,
            queue_time_ms: milliseconds(whole.figures.queue),
            inference_time_ms: milliseconds(whole.figures.inference()),
        }
    }

    fn best_of(&self, whole: &Whole) -> BestOfSequence {
        BestOfSequence {
            generated_text: format!("{}{}", self.prefix, whole.text),
            finish_reason: whole.reason.into(),
            generated_tokens: whole.figures.generated,
            seed: whole.seed,
            prefill: self.prefill(whole),
            tokens: self.tokens(whole),
            top_tokens: self.top_tokens(whole),
        }
    }

    /// The first token has nothing before it that could predict it.
    fn prefill(&self, whole: &Whole) -> Vec<PrefillToken> {
        let Some(&first) = self.prompt.first() else {
            return vec![];
        };
        let logprobs = std::iter::once((first, None));
        logprobs
            .chain(
                whole
                    .prompt
                    .iter()
                    .map(|info| (info.id, Some(info.logprob))),
            )
            .map(|(id, logprob)| PrefillToken {
                id,
                text: self.app.text.tokenizer().token_text(id),
                logprob,
            })
            .collect()
    }

    fn tokens(&self, whole: &Whole) -> Vec<Token> {
        let tokens = whole.tokens.iter().cloned();
        tokens
            .map(|token| wire_token(self.app, token, self.alternatives))
            .collect()
    }

    fn top_tokens(&self, whole: &Whole) -> Vec<Vec<Token>> {
        let lists = whole
            .tokens
            .iter()
            .map(|token| top_tokens(self.app, &token.info, self.alternatives));
        lists.filter(|list| !list.is_empty()).collect()
    }
}

fn count(ids: &[u32]) -> u32 {
    u32::try_from(ids.len()).unwrap_or(u32::MAX)
}

fn wire_token(app: &App, token: TextToken, alternatives: Alternatives) -> Token {
    let tokenizer = app.text.tokenizer();
    let within = token
        .info
        .top
        .iter()
        .map(|&(id, logprob)| AlternativeToken {
            id,
            text: tokenizer.token_text(id),
            logprob,
        });
    Token {
        id: token.info.id,
        alternative_tokens: (alternatives == Alternatives::Within).then(|| within.collect()),
        text: token.text,
        logprob: token.info.logprob,
        special: token.special,
    }
}

/// The alternatives to a token, unless they are told within it.
fn top_tokens(app: &App, info: &TokenInfo, alternatives: Alternatives) -> Vec<Token> {
    if alternatives == Alternatives::Within {
        return vec![];
    }
    let tokenizer = app.text.tokenizer();
    let tokens = info.top.iter().map(|&(id, logprob)| Token {
        id,
        text: tokenizer.token_text(id),
        logprob,
        special: tokenizer.is_special(id),
        alternative_tokens: None,
    });
    tokens.collect()
}

fn milliseconds(duration: std::time::Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn compute_type(app: &App) -> (HeaderName, HeaderValue) {
    let status = app.engine.status();
    let device = status
        .description
        .as_ref()
        .map_or("cpu", |description| description.device.as_str());
    let value = HeaderValue::from_str(device).unwrap_or(HeaderValue::from_static("cpu"));
    (HeaderName::from_static("x-compute-type"), value)
}

/// TGI's headers: times in milliseconds but for the compute time, which is in seconds.
fn headers(
    app: &App,
    figures: &Figures,
    prompt_tokens: usize,
    prompt_characters: usize,
) -> HeaderMap {
    let whole_ms = |duration: std::time::Duration| duration.as_millis().to_string();
    let values = [
        ("x-compute-time", figures.total.as_secs_f64().to_string()),
        ("x-compute-characters", prompt_characters.to_string()),
        ("x-total-time", whole_ms(figures.total)),
        ("x-validation-time", whole_ms(figures.validation)),
        ("x-queue-time", whole_ms(figures.queue)),
        ("x-inference-time", whole_ms(figures.inference())),
        ("x-time-per-token", whole_ms(figures.per_token())),
        ("x-prompt-tokens", prompt_tokens.to_string()),
        ("x-generated-tokens", figures.generated.to_string()),
    ];
    let written = values.into_iter().filter_map(|(name, value)| {
        Some((
            HeaderName::from_static(name),
            HeaderValue::from_str(&value).ok()?,
        ))
    });
    std::iter::once(compute_type(app)).chain(written).collect()
}
