//! `/invocations`: SageMaker's one route for every kind of body, told apart by the field that holds the prompt.

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::App;
use super::body::JsonBody;
use super::error::{ApiError, Kind};
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
    if body.contains_key("messages") {
        chat::answer(&app, &caller, read(body)?).await
    } else if body.contains_key("prompt") {
        completions::answer(&app, &caller, read(body)?).await
    } else if body.contains_key("inputs") {
        generate::compat(&app, &caller, read::<CompatGenerateBody>(body)?).await
    } else {
        Err(ApiError::field(
            "inputs",
            "the body has none of `inputs`, `messages` and `prompt`; send one of them",
        ))
    }
}

fn read<T: DeserializeOwned>(body: Map<String, Value>) -> Result<T, ApiError> {
    serde_json::from_value(Value::Object(body)).map_err(|error| {
        ApiError::new(
            Kind::Validation,
            format!("the body is not a valid request: {error}"),
        )
    })
}
