//! `/v1/chat/completions`.

use async_stream::stream;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures::StreamExt;
use serde_json::Value;

use super::answers::*;
use super::conversation::conversation;
use super::fields::{Frame, alternatives, chat_logprob, details, finish_reason, read};
use super::streams::{Indexed, tokens};
use super::types::*;
use crate::api::App;
use crate::api::admit::{Batch, admit};
use crate::api::answer::Generation;
use crate::api::body::JsonBody;
use crate::api::error::{ApiError, Dialect};
use crate::api::request::{Caller, Names, Prompt};
use crate::api::sse::{self, Message};
use crate::api::validate::unsupported;
use crate::api::whole::Whole;

const NAMES: Names = Names {
    prompt: "messages",
    adapter: "model",
    max_new_tokens: "max_tokens",
    prompt_logprobs: "logprobs",
};

/// Goes on with a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "OpenAI", request_body = ChatBody, responses(
    (status = 200, body = Completion<ChatChoice>), (status = 400), (status = 404), (status = 429)))]
pub async fn chat_completions(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    JsonBody(body): JsonBody<ChatBody>,
) -> Result<Response, ApiError> {
    answer(&app, &caller, body).await
}

/// What the route does, for other routes that take the same body.
pub async fn answer(app: &App, caller: &Caller, body: ChatBody) -> Result<Response, ApiError> {
    let prompt = prompt(app, &body)?;
    let with_logprobs = body.logprobs == Some(true);
    if body.top_logprobs.is_some() && !with_logprobs {
        return Err(ApiError::field(
            "top_logprobs",
            "`top_logprobs` needs `logprobs`; set it or leave both out",
        ));
    }
    let wanted = alternatives("top_logprobs", body.top_logprobs)?;
    let max_new_tokens = match (body.max_completion_tokens, body.max_tokens) {
        (Some(newer), Some(older)) if newer != older => {
            let message = format!(
                "`max_completion_tokens` is {newer} and `max_tokens`, its older name, {older}; send one of them"
            );
            return Err(ApiError::field("max_tokens", message));
        }
        (newer, older) => newer.or(older),
    };
    let template = read(app, body.common(), max_new_tokens, wanted, NAMES)?;
    let batch = Batch {
        requests: vec![template.with(prompt)],
        copies: template.n,
        field: "n",
        method: "chat_completions",
    };
    let generations: Vec<Generation> = admit(app, caller, batch)
        .await?
        .into_iter()
        .flat_map(|admitted| admitted.generations)
        .collect();
    let model = body.model.as_deref().unwrap_or_default();
    let mut usage = Usage::default();
    usage.add_prompt(&generations);
    if body.stream == Some(true) {
        let frame = Frame::new(app, "chatcmpl", "chat.completion.chunk", model);
        let with_usage = body
            .stream_options
            .and_then(|options| options.include_usage)
            == Some(true);
        let messages = events(
            app.clone(),
            frame,
            generations,
            usage,
            with_logprobs,
            with_usage,
        );
        return Ok(sse::respond(caller, Dialect::OpenAi, messages));
    }
    let frame = Frame::new(app, "chatcmpl", "chat.completion", model);
    Ok(Json(whole(app, &frame, generations, usage, with_logprobs).await?).into_response())
}

async fn whole(
    app: &App,
    frame: &Frame,
    generations: Vec<Generation>,
    mut usage: Usage,
    with_logprobs: bool,
) -> Result<Completion<ChatChoice>, ApiError> {
    let adapter = generations
        .first()
        .and_then(|generation| generation.adapter.clone());
    let answers =
        futures::future::try_join_all(generations.into_iter().map(Whole::collect)).await?;
    answers
        .iter()
        .for_each(|answer| usage.add_answer(&answer.figures));
    let told = answers
        .first()
        .map(|answer| details(adapter.as_ref(), answer.seed, &answer.figures));
    let choices = answers
        .into_iter()
        .enumerate()
        .map(|(index, answer)| ChatChoice {
            index,
            logprobs: with_logprobs.then(|| ChatLogprobs {
                content: answer
                    .tokens
                    .iter()
                    .map(|token| chat_logprob(app, token))
                    .collect(),
            }),
            message: AssistantMessage {
                role: "assistant",
                content: answer.text,
            },
            finish_reason: Some(finish_reason(answer.reason)),
        });
    Ok(Completion {
        usage: Some(usage),
        details: told,
        ..frame.with(choices.collect())
    })
}

fn events(
    app: App,
    frame: Frame,
    generations: Vec<Generation>,
    mut usage: Usage,
    with_logprobs: bool,
    with_usage: bool,
) -> impl futures::Stream<Item = Result<Message, ApiError>> + Send + 'static {
    let chunk = |index, delta, logprobs, finish_reason| ChatChunkChoice {
        index,
        delta,
        logprobs,
        finish_reason,
    };
    stream! {
        for index in 0..generations.len() {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
            yield Ok(Message::json(&frame.with(vec![chunk(index, delta, None, None)])));
        }
        let mut tokens = tokens(generations);
        while let Some(next) = tokens.next().await {
            let Indexed { index, token, end } = match next {
                Ok(indexed) => indexed,
                Err(error) => { yield Err(error); return; }
            };
            let logprobs = with_logprobs.then(|| ChatLogprobs { content: vec![chat_logprob(&app, &token)] });
            let text = if token.special { String::new() } else { token.text };
            if !text.is_empty() || logprobs.is_some() {
                let delta = Delta { role: None, content: Some(text) };
                yield Ok(Message::json(&frame.with(vec![chunk(index, delta, logprobs, None)])));
            }
            if let Some((reason, figures, told)) = end {
                usage.add_answer(&figures);
                let last = chunk(index, Delta::default(), None, Some(finish_reason(reason)));
                yield Ok(Message::json(&Completion { details: Some(told), ..frame.with(vec![last]) }));
            }
        }
        if with_usage {
            yield Ok(Message::json(&Completion::<ChatChunkChoice> { usage: Some(usage), ..frame.with(vec![]) }));
        }
        yield Ok(Message::Done);
    }
}

/// The prompt that a body's conversation becomes.
pub fn prompt(app: &App, body: &ChatBody) -> Result<Prompt, ApiError> {
    if body.tools.as_ref().is_some_and(|tools| !is_nothing(tools)) {
        return Err(unsupported("tools", "answers cannot call tools yet"));
    }
    if body
        .tool_choice
        .as_ref()
        .is_some_and(|choice| !is_nothing(choice) && choice != "none" && choice != "auto")
    {
        return Err(unsupported("tool_choice", "answers cannot call tools yet"));
    }
    if body.messages.is_empty() {
        return Err(ApiError::field(
            "messages",
            "`messages` is empty; send at least one",
        ));
    }
    conversation(app, &body.messages)
}

pub(super) fn is_nothing(value: &Value) -> bool {
    value.is_null() || value.as_array().is_some_and(Vec::is_empty)
}
