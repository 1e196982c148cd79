//! What a client is told when a request cannot be answered: one table of kinds, two ways of writing them.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use kvrun_text::{EncodeError, TemplateError};
use serde_json::{Value, json};

use crate::request::{Failure, LoadError, Refusal, UnknownAdapter};

/// How errors and answers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `{"error", "error_type"}`, as text-generation-inference writes them.
    Tgi,
    /// `{"error": {"message", "type", "param", "code"}}`, as OpenAI's clients read them.
    OpenAi,
}

impl Dialect {
    /// Everything under `/v1/` speaks OpenAI's dialect.
    pub fn of_path(path: &str) -> Self {
        if path.starts_with("/v1/") {
            Self::OpenAi
        } else {
            Self::Tgi
        }
    }
}

/// Kinds of errors; [`Kind::row`] says how each is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A value is missing, wrong or not supported.
    Validation,
    /// The chat template does not take the conversation.
    Template,
    /// The adapter does not fit the model.
    AdapterInvalid,
    /// No key, or not a known one.
    Unauthorized,
    /// Switched off here, or outside the allowed folder.
    Forbidden,
    /// No such route, model or adapter.
    NotFound,
    /// The route exists, the method does not.
    Method,
    /// The body came too slowly.
    Timeout,
    /// The name is taken.
    Conflict,
    /// The body is too large.
    TooLarge,
    /// The body is not JSON by its header.
    MediaType,
    /// The queue is full.
    Overloaded,
    /// Starting, draining, or no shard.
    Unavailable,
    /// No room for the adapter.
    NoRoom,
    /// The shard failed this request.
    Generation,
    /// The deadline passed.
    Deadline,
    /// The grace time ended while the answer was under way.
    ShuttingDown,
    /// The answer broke off; a bug.
    Incomplete,
}

/// One row of the table.
pub struct Row {
    /// Status on TGI's routes.
    pub tgi: u16,
    /// `error_type` on TGI's routes, and the label of the failure metrics.
    pub error_type: &'static str,
    /// Status under `/v1/`.
    pub openai: u16,
    /// `type` under `/v1/`.
    pub openai_type: &'static str,
    /// Whether sending the same again may help; `false` is told to clients that retry by themselves.
    pub retry: Option<bool>,
}

impl Kind {
    /// How this kind is written.
    pub fn row(self) -> Row {
        let row = |tgi, error_type, openai, openai_type, retry| Row {
            tgi,
            error_type,
            openai,
            openai_type,
            retry,
        };
        let invalid = "invalid_request_error";
        match self {
            Self::Validation => row(422, "validation", 400, invalid, None),
            Self::Template => row(422, "template_error", 400, invalid, None),
            Self::AdapterInvalid => row(422, "adapter_invalid", 422, invalid, None),
            Self::Unauthorized => row(401, "unauthorized", 401, "authentication_error", None),
            Self::Forbidden => row(403, "forbidden", 403, "permission_error", None),
            Self::NotFound => row(404, "not_found", 404, invalid, None),
            Self::Method => row(405, "method_not_allowed", 405, invalid, None),
            Self::Timeout => row(408, "timeout", 408, invalid, None),
            Self::Conflict => row(409, "conflict", 409, invalid, Some(false)),
            Self::TooLarge => row(413, "too_large", 413, invalid, None),
            Self::MediaType => row(415, "media_type", 415, invalid, None),
            Self::Overloaded => row(429, "overloaded", 429, "rate_limit_error", Some(true)),
            Self::Unavailable => row(503, "unavailable", 503, "server_error", Some(true)),
            Self::ShuttingDown => row(503, "shutting_down", 503, "server_error", Some(true)),
            Self::NoRoom => row(
                507,
                "insufficient_storage",
                507,
                "server_error",
                Some(false),
            ),
            Self::Generation => row(424, "generation", 424, "server_error", Some(false)),
            Self::Deadline => row(504, "deadline", 504, "server_error", Some(false)),
            Self::Incomplete => row(
                500,
                "incomplete_generation",
                500,
                "server_error",
                Some(false),
            ),
        }
    }
}

/// A request that cannot be answered, in words for the client.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Its kind.
    pub kind: Kind,
    /// What was asked, what was found, what to do.
    pub message: String,
    /// The field at fault, if one is.
    pub param: Option<String>,
    /// When to come back.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    /// An error of `kind`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            param: None,
            retry_after: None,
        }
    }

    /// A field with a value that cannot be used; the message should name it too.
    pub fn field(param: &str, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.to_owned()),
            ..Self::new(Kind::Validation, message)
        }
    }

    /// The same error with a time to come back.
    pub fn after(self, retry_after: Duration) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..self
        }
    }

    /// The body in a dialect; also the payload of an error event in a stream.
    pub fn body(&self, dialect: Dialect) -> Value {
        let row = self.kind.row();
        match dialect {
            Dialect::Tgi => json!({"error": self.message, "error_type": row.error_type}),
            Dialect::OpenAi => json!({"error": {
                "message": self.message,
                "type": row.openai_type,
                "param": self.param,
                "code": row.error_type,
            }}),
        }
    }

    /// The whole response in a dialect.
    pub fn render(&self, dialect: Dialect) -> Response {
        let row = self.kind.row();
        let status = match dialect {
            Dialect::Tgi => row.tgi,
            Dialect::OpenAi => row.openai,
        };
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self.body(dialect))).into_response();
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after {
            let seconds = wait.as_secs_f64().ceil().clamp(1.0, 60.0) as u64;
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(retry) = row.retry {
            let value = HeaderValue::from_static(if retry { "true" } else { "false" });
            headers.insert(HeaderName::from_static("x-should-retry"), value);
        }
        if self.kind == Kind::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// The layer around every route writes the body, because only it knows the dialect.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.render(Dialect::Tgi);
        response.extensions_mut().insert(self);
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::Overloaded { retry_after } => {
                Self::new(Kind::Overloaded, message).after(retry_after)
            }
            Refusal::TooLong { .. } | Refusal::Indivisible { .. } => {
                Self::new(Kind::Validation, message)
            }
            Refusal::UnknownAdapter(_) => Self::new(Kind::NotFound, message),
            Refusal::Quarantined { .. } => Self::new(Kind::Generation, message),
            Refusal::Draining | Refusal::NotReady => {
                Self::new(Kind::Unavailable, message).after(Duration::from_secs(1))
            }
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        match failure {
            Failure::Row(_) | Failure::Adapter(_) | Failure::Unavailable(_) | Failure::Deadly => {
                Self::new(Kind::Generation, message)
            }
            Failure::Image(_) => Self::new(Kind::Validation, message),
            Failure::Deadline => Self::new(Kind::Deadline, message),
            Failure::ShuttingDown => {
                Self::new(Kind::ShuttingDown, message).after(Duration::from_secs(1))
            }
        }
    }
}

impl From<UnknownAdapter> for ApiError {
    fn from(unknown: UnknownAdapter) -> Self {
        Self::new(Kind::NotFound, unknown.to_string())
    }
}

impl From<LoadError> for ApiError {
    fn from(error: LoadError) -> Self {
        let message = error.to_string();
        match error {
            LoadError::Invalid(_) => Self::new(Kind::AdapterInvalid, message),
            LoadError::NotFound(_) => Self::new(Kind::NotFound, message),
            LoadError::NoRoom(_) => Self::new(Kind::NoRoom, message),
            LoadError::Taken { .. } => Self::new(Kind::Conflict, message),
            LoadError::Unavailable(_) => {
                Self::new(Kind::Unavailable, message).after(Duration::from_secs(1))
            }
        }
    }
}

impl From<EncodeError> for ApiError {
    fn from(error: EncodeError) -> Self {
        let message = error.to_string();
        match error {
            EncodeError::TooLong { .. } | EncodeError::TooSlow { .. } | EncodeError::Unfit(_) => {
                Self::field("inputs", message)
            }
            EncodeError::Busy => Self::new(Kind::Overloaded, message).after(Duration::from_secs(1)),
        }
    }
}

impl From<TemplateError> for ApiError {
    fn from(error: TemplateError) -> Self {
        Self {
            param: Some("messages".to_owned()),
            ..Self::new(Kind::Template, error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shard_died_of_is_refused_in_a_way_that_nobody_retries() {
        let remaining = Duration::from_secs(599);
        let error = ApiError::from(Refusal::Quarantined { remaining });
        let answer = error.render(Dialect::OpenAi);
        assert_eq!(answer.status(), 424);
        assert_eq!(answer.headers()["x-should-retry"], "false");
        assert!(error.message.contains("599 s"), "{error}");
    }

    #[test]
    fn a_text_that_tokenizes_too_slowly_is_the_senders_to_change() {
        let limit = Duration::from_secs(2);
        let error = ApiError::from(EncodeError::TooSlow { limit });
        assert_eq!(error.render(Dialect::Tgi).status(), 422);
        assert_eq!(error.render(Dialect::OpenAi).status(), 400);
        assert!(error.message.contains("2 s"), "{error}");
    }
}
