//! Server-sent events: one terminal event per stream, comments while nothing happens.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use serde::Serialize;

use super::auth::note_failure;
use super::error::{ApiError, Dialect};
use super::request::Caller;

const SILENCE: Duration = Duration::from_secs(10);

/// What a stream says next.
pub enum Message {
    /// A JSON document.
    Json(String),
    /// The end mark of OpenAI's streams.
    Done,
}

impl Message {
    /// A document.
    pub fn json(document: &impl Serialize) -> Self {
        // The wire types have string keys and finite numbers or nulls only, so this cannot fail.
        Self::Json(serde_json::to_string(document).unwrap_or_else(|_| "{}".to_owned()))
    }
}

/// A response of events. The first error becomes the stream's terminal event.
pub fn respond<S>(caller: &Caller, dialect: Dialect, messages: S) -> Response
where
    S: Stream<Item = Result<Message, ApiError>> + Send + 'static,
{
    let (route, request_id) = (caller.route.clone(), caller.request_id.clone());
    let events = messages.map(move |message| {
        let data = match message {
            Ok(Message::Json(document)) => document,
            Ok(Message::Done) => "[DONE]".to_owned(),
            Err(error) => {
                note_failure(&error, &route, &request_id);
                error.body(dialect).to_string()
            }
        };
        Ok::<_, Infallible>(Event::default().data(data))
    });
    let mut response = Sse::new(events)
        .keep_alive(KeepAlive::new().interval(SILENCE))
        .into_response();
    // Tells nginx and its like not to collect events before passing them on.
    response.headers_mut().insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    response
}
