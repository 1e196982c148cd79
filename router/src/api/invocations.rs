//! `/invocations`: SageMaker's one route for every kind of body, told apart by the field that holds the prompt.

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde_json::{Map, Value};

use super::App;
use super::body::{JsonBody, read};
use super::error::ApiError;
use super::openai::{chat, completions};
use super::request::Caller;
use super::tgi::generate;
use super::tgi::types::{CompatGenerateBody, ErrorBody};

/// Answers a body of `/`, `/v1/chat/completions` or `/v1/completions`.
#[utoipa::path(post, path = "/invocations", tag = "SageMaker", request_body = CompatGenerateBody,
    responses((status = 200), (status = 422, body = ErrorBody)))]
pub async fn invocations(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    JsonBody(body): JsonBody<Map<String, Value>>,
) -> Result<Response, ApiError> {
    let holds = |field: &str| body.get(field).is_some_and(|value| !value.is_null());
    if holds("messages") {
        chat::answer(&app, &caller, read(body.into())?).await
    } else if holds("prompt") {
        completions::answer(&app, &caller, read(body.into())?).await
    } else if holds("inputs") {
        generate::compat(&app, &caller, read::<CompatGenerateBody>(body.into())?).await
    } else {
        Err(ApiError::field(
            "inputs",
            "the body has none of `inputs`, `messages` and `prompt`; send one of them",
        ))
    }
}
