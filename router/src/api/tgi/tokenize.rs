//! `/tokenize` and `/chat_tokenize`.

use axum::Json;
use axum::extract::State;

use super::types::{ChatTokenizeAnswer, ErrorBody, SimpleToken, TokenizeBody};
use crate::api::App;
use crate::api::body::JsonBody;
use crate::api::error::ApiError;
use crate::api::openai::chat;
use crate::api::openai::types::ChatBody;
use crate::api::prompt::Limits;

/// The tokens of a text.
#[utoipa::path(post, path = "/tokenize", tag = "Tokenization", request_body = TokenizeBody, responses(
    (status = 200, body = Vec<SimpleToken>), (status = 422, body = ErrorBody)))]
pub async fn tokenize(
    State(app): State<App>,
    JsonBody(body): JsonBody<TokenizeBody>,
) -> Result<Json<Vec<SimpleToken>>, ApiError> {
    simple_tokens(&app, body.inputs, body.add_special_tokens.unwrap_or(true))
        .await
        .map(Json)
}

/// The prompt that a conversation becomes, and its tokens.
#[utoipa::path(post, path = "/chat_tokenize", tag = "Tokenization", request_body = ChatBody, responses(
    (status = 200, body = ChatTokenizeAnswer), (status = 422, body = ErrorBody)))]
pub async fn chat_tokenize(
    State(app): State<App>,
    JsonBody(body): JsonBody<ChatBody>,
) -> Result<Json<ChatTokenizeAnswer>, ApiError> {
    let templated_text = chat::prompt(&app, &body)?.text().to_owned();
    let tokenize_response = simple_tokens(&app, templated_text.clone(), false).await?;
    Ok(Json(ChatTokenizeAnswer {
        tokenize_response,
        templated_text,
    }))
}

async fn simple_tokens(
    app: &App,
    text: String,
    add_special: bool,
) -> Result<Vec<SimpleToken>, ApiError> {
    let limits = Limits::of(&app.engine.status(), app.settings.max_input_tokens)?;
    let encoded = app
        .text
        .encode(text.clone(), add_special, limits.bytes())
        .await?;
    let starts: Vec<usize> = text
        .char_indices()
        .map(|(at, _)| at)
        .chain([text.len()])
        .collect();
    let tokens = encoded
        .ids
        .iter()
        .zip(&encoded.offsets)
        .map(|(&id, &(start, stop))| SimpleToken {
            id,
            text: match (starts.get(start), starts.get(stop)) {
                (Some(&from), Some(&to)) => text.get(from..to).unwrap_or_default().to_owned(),
                _ => String::new(),
            },
            start,
            stop,
        });
    Ok(tokens.collect())
}
