//! `/v1/completions`.

use async_stream::stream;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures::StreamExt;

use super::answers::*;
use super::fields::{Frame, alternatives, details, finish_reason, read};
use super::streams::{Indexed, tokens};
use super::types::*;
use crate::api::App;
use crate::api::admit::{Admitted, Batch, admit};
use crate::api::answer::Generation;
use crate::api::body::JsonBody;
use crate::api::error::{ApiError, Dialect};
use crate::api::request::{Caller, Names, Prompt};
use crate::api::sse::{self, Message};
use crate::api::validate::{Checked, unsupported};
use crate::api::whole::Whole;
use crate::request::TokenInfo;

const NAMES: Names = Names {
    prompt: "prompt",
    adapter: "model",
    max_new_tokens: "max_tokens",
    prompt_logprobs: "echo",
};
/// OpenAI's own default for this route.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// Continues texts.
#[utoipa::path(post, path = "/v1/completions", tag = "OpenAI", request_body = CompletionBody, responses(
    (status = 200, body = Completion<CompletionChoice>), (status = 400), (status = 404), (status = 429)))]
pub async fn completions(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    JsonBody(body): JsonBody<CompletionBody>,
) -> Result<Response, ApiError> {
    answer(&app, &caller, body).await
}

/// How answers are written.
#[derive(Clone, Copy)]
struct Shape {
    /// Answers told per prompt.
    n: usize,
    echo: bool,
    logprobs: bool,
    usage: bool,
}

/// What the route does, for other routes that take the same body.
pub async fn answer(
    app: &App,
    caller: &Caller,
    body: CompletionBody,
) -> Result<Response, ApiError> {
    if body
        .suffix
        .as_ref()
        .is_some_and(|suffix| !suffix.is_empty())
    {
        return Err(unsupported("suffix", "answers only continue the prompt"));
    }
    let stream = body.stream == Some(true);
    let wanted = alternatives("logprobs", body.logprobs)?;
    let template = read(app, body.common(), body.max_tokens, wanted, NAMES)?;
    let copies = best_of(body.best_of, template.n, stream)?;
    let shape = Shape {
        n: template.n,
        echo: body.echo == Some(true),
        logprobs: body.logprobs.is_some(),
        usage: body
            .stream_options
            .as_ref()
            .and_then(|options| options.include_usage)
            == Some(true),
    };
    let prompt_logprobs = shape.echo && shape.logprobs;
    if prompt_logprobs && stream {
        return Err(unsupported(
            "echo",
            "streams do not report log-probabilities of the prompt",
        ));
    }
    let prompts = prompts(body.prompt)?;
    let requests = prompts.into_iter().map(|prompt| {
        let mut request = template.with(prompt);
        request.default_max_new_tokens = Some(DEFAULT_MAX_TOKENS);
        request.prompt_logprobs = prompt_logprobs;
        request
    });
    let batch = Batch {
        requests: requests.collect(),
        copies,
        field: if copies > shape.n { "best_of" } else { "n" },
        method: "completions",
    };
    let admitted = admit(app, caller, batch).await?;
    let frame = Frame::new(
        app,
        "cmpl",
        "text_completion",
        body.model.as_deref().unwrap_or_default(),
    );
    if stream {
        return Ok(sse::respond(
            caller,
            Dialect::OpenAi,
            events(app.clone(), frame, admitted, shape),
        ));
    }
    Ok(Json(whole(app, &frame, admitted, shape).await?).into_response())
}

fn best_of(asked: Option<i64>, n: usize, stream: bool) -> Result<usize, ApiError> {
    let Some(asked) = asked else { return Ok(n) };
    match usize::try_from(asked) {
        Ok(best_of) if best_of == n || (best_of > n && !stream) => Ok(best_of),
        Ok(best_of) if best_of > n => Err(ApiError::field(
            "best_of",
            "`best_of` above `n` is not available in streams; leave out `stream`",
        )),
        _ => Err(ApiError::field(
            "best_of",
            format!("`best_of` must be at least `n`, which is {n}; {asked} was given"),
        )),
    }
}

fn prompts(field: PromptField) -> Result<Vec<Prompt>, ApiError> {
    let text = |text| Prompt::Text {
        text,
        add_special: true,
    };
    let prompts: Vec<Prompt> = match field {
        PromptField::Text(one) => vec![text(one)],
        PromptField::Texts(many) => many.into_iter().map(text).collect(),
        PromptField::Ids(ids) => vec![Prompt::Ids(ids)],
        PromptField::ManyIds(many) => many.into_iter().map(Prompt::Ids).collect(),
    };
    if prompts.is_empty() {
        return Err(ApiError::field(
            "prompt",
            "`prompt` is empty; send at least one",
        ));
    }
    Ok(prompts)
}

fn echoed(app: &App, checked: &Checked, shape: Shape) -> String {
    match shape.echo {
        true if checked.prompt_text.is_empty() => {
            app.text.tokenizer().decode(checked.request.input(), true)
        }
        true => checked.prompt_text.clone(),
        false => String::new(),
    }
}

async fn whole(
    app: &App,
    frame: &Frame,
    admitted: Vec<Admitted>,
    shape: Shape,
) -> Result<Completion<CompletionChoice>, ApiError> {
    let (mut usage, mut choices, mut told) = (Usage::default(), vec![], None);
    for Admitted {
        checked,
        generations,
    } in admitted
    {
        usage.add_prompt(&generations);
        let mut answers =
            futures::future::try_join_all(generations.into_iter().map(Whole::collect)).await?;
        answers
            .iter()
            .for_each(|answer| usage.add_answer(&answer.figures));
        if answers.len() > shape.n {
            answers.sort_by(|left, right| right.score().total_cmp(&left.score()));
            answers.truncate(shape.n);
        }
        let prompt = echoed(app, &checked, shape);
        for answer in answers {
            told.get_or_insert_with(|| {
                details(checked.adapter.as_ref(), answer.seed, &answer.figures)
            });
            choices.push(CompletionChoice {
                index: choices.len(),
                text: format!("{prompt}{}", answer.text),
                logprobs: shape
                    .logprobs
                    .then(|| logprobs(app, &checked, &answer, &prompt)),
                finish_reason: Some(finish_reason(answer.reason)),
            });
        }
    }
    Ok(Completion {
        usage: Some(usage),
        details: told,
        ..frame.with(choices)
    })
}

/// The answer's tokens, after those of the prompt when these were asked for.
fn logprobs(app: &App, checked: &Checked, answer: &Whole, prompt_text: &str) -> CompletionLogprobs {
    let mut lists = CompletionLogprobs::default();
    let mut offset = 0;
    if let Some((&first, _)) = checked
        .request
        .prompt
        .split_first()
        .filter(|_| !answer.prompt.is_empty())
    {
        let first = TokenInfo {
            id: first,
            logprob: 0.0,
            top: vec![],
        };
        lists.push(app, &first, None, 0);
        if !app.text.tokenizer().is_special(first.id) {
            offset += lists.tokens.last().map_or(0, |token| token.chars().count());
        }
        for info in &answer.prompt {
            lists.push(app, info, Some(info.logprob), offset);
            // Control tokens of the prompt are no part of the echoed text.
            if !app.text.tokenizer().is_special(info.id) {
                offset += lists.tokens.last().map_or(0, |token| token.chars().count());
            }
        }
    }
    let mut offset = prompt_text.chars().count();
    for token in &answer.tokens {
        lists.push(app, &token.info, Some(token.info.logprob), offset);
        offset += if token.special {
            0
        } else {
            token.text.chars().count()
        };
    }
    lists
}

fn events(
    app: App,
    frame: Frame,
    admitted: Vec<Admitted>,
    shape: Shape,
) -> impl futures::Stream<Item = Result<Message, ApiError>> + Send + 'static {
    let choice = |index, text, logprobs, finish_reason| CompletionChoice {
        index,
        text,
        logprobs,
        finish_reason,
    };
    stream! {
        let mut usage = Usage::default();
        let (mut generations, mut offsets): (Vec<Generation>, Vec<usize>) = (vec![], vec![]);
        for Admitted { checked, generations: answers } in admitted {
            usage.add_prompt(&answers);
            let prompt = echoed(&app, &checked, shape);
            for answer in answers {
                if !prompt.is_empty() {
                    yield Ok(Message::json(&frame.with(vec![choice(generations.len(), prompt.clone(), None, None)])));
                }
                generations.push(answer);
                offsets.push(prompt.chars().count());
            }
        }
        let mut tokens = tokens(generations);
        while let Some(next) = tokens.next().await {
            let Indexed { index, token, end } = match next {
                Ok(indexed) => indexed,
                Err(error) => { yield Err(error); return; }
            };
            let logprobs = shape.logprobs.then(|| {
                let mut lists = CompletionLogprobs::default();
                lists.push(&app, &token.info, Some(token.info.logprob), offsets[index]);
                lists
            });
            let text = if token.special { String::new() } else { token.text };
            offsets[index] += text.chars().count();
            match end {
                Some((reason, figures, told)) => {
                    usage.add_answer(&figures);
                    let last = choice(index, text, logprobs, Some(finish_reason(reason)));
                    yield Ok(Message::json(&Completion { details: Some(told), ..frame.with(vec![last]) }));
                }
                None if text.is_empty() && logprobs.is_none() => {}
                None => yield Ok(Message::json(&frame.with(vec![choice(index, text, logprobs, None)]))),
            }
        }
        if shape.usage {
            yield Ok(Message::json(&Completion::<CompletionChoice> { usage: Some(usage), ..frame.with(vec![]) }));
        }
        yield Ok(Message::Done);
    }
}
