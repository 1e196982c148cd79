//! Bodies: read within limits, looked over before they are parsed, and parsed without ignoring anything.

use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::{FromRequest, Request};
use axum::http::header;
use futures::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::App;
use super::error::{ApiError, Kind};

/// Deepest nesting of arrays and objects that is parsed.
const DEPTH: usize = 64;
/// Levels of objects that hold fields: a body, and what lies in it, such as parameters and messages.
const FIELD_LEVELS: usize = 2;
/// How serde's message on a field that a type does not have begins.
const UNKNOWN: &str = "unknown field `";
/// Longest time a body may take to arrive.
const ARRIVAL: Duration = Duration::from_secs(30);
/// Time for the rest of a body that is refused.
const LINGER: Duration = Duration::from_secs(1);

/// A JSON body as a wire type. Unknown fields are refused by name where the type says so.
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let is_json = request
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .is_some_and(|value| {
                let essence = value
                    .split(';')
                    .next()
                    .unwrap_or_default()
                    .trim()
                    .to_ascii_lowercase();
                essence == "application/json"
                    || (essence.starts_with("application/") && essence.ends_with("+json"))
            });
        if !is_json {
            return Err(ApiError::new(
                Kind::MediaType,
                "the body must be JSON; send it with `Content-Type: application/json`",
            ));
        }
        let limit = app.settings.payload_limit;
        let announced = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
        let bytes = arrived(request.into_body(), announced, limit).await?;
        parse(&bytes).map(Self)
    }
}

async fn arrived(body: Body, announced: Option<usize>, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut pieces = body.into_data_stream();
    let whole = async {
        let mut bytes = Vec::new();
        let mut fits = announced.is_none_or(|announced| announced <= limit);
        while fits && let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|_| {
                ApiError::new(Kind::Validation, "the body broke off before its end")
            })?;
            fits = bytes.len() + piece.len() <= limit;
            bytes.extend_from_slice(&piece);
        }
        if fits {
            Ok(bytes)
        } else {
            Err(too_large(limit))
        }
    };
    let late = || {
        let message = format!("the body did not arrive within {} s", ARRIVAL.as_secs());
        ApiError::new(Kind::Timeout, message)
    };
    let read = tokio::time::timeout(ARRIVAL, whole).await;
    let read = read.unwrap_or_else(|_| Err(late()));
    if read.is_err() {
        linger(&mut pieces, limit).await;
    }
    read
}

/// Takes a little more of a refused body: many clients read an answer only once theirs is sent.
async fn linger(pieces: &mut BodyDataStream, limit: usize) {
    let mut room = limit.saturating_mul(4);
    let rest = async {
        while room > 0
            && let Some(Ok(piece)) = pieces.next().await
        {
            room = room.saturating_sub(piece.len());
        }
    };
    // Whether it ended or not, the answer goes out now.
    let _ = tokio::time::timeout(LINGER, rest).await;
}

fn too_large(limit: usize) -> ApiError {
    ApiError::new(
        Kind::TooLarge,
        format!("the body is larger than {limit} bytes; send less, or raise --payload-limit"),
    )
}

/// Parses bytes that a client sent.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        ApiError::new(
            Kind::Validation,
            format!("the body is not UTF-8 from byte {} on", error.valid_up_to()),
        )
    })?;
    if let Some(depth) = too_deep(text) {
        return Err(ApiError::new(
            Kind::Validation,
            format!("the body nests {depth} levels deep, the limit is {DEPTH}"),
        ));
    }
    let mut reader = serde_json::Deserializer::from_str(text);
    let read: Result<T, _> = serde_path_to_error::deserialize(&mut reader);
    match read {
        Ok(body) => match reader.end() {
            Ok(()) => Ok(body),
            Err(error) => Err(invalid("", &error)),
        },
        // It may be one that is null.
        Err(error) if error.inner().to_string().starts_with(UNKNOWN) => {
            self::read(serde_json::from_str(text).map_err(|error| invalid("", &error))?)
        }
        Err(error) => Err(invalid(&error.path().to_string(), error.inner())),
    }
}

/// Reads a document that was parsed already. A field that is null asks for nothing, so it may be one that is not known:
/// many clients write out every field they have.
pub fn read<T: DeserializeOwned>(mut value: Value) -> Result<T, ApiError> {
    drop_nulls(&mut value, FIELD_LEVELS);
    serde_path_to_error::deserialize(value)
        .map_err(|error| invalid(&error.path().to_string(), error.inner()))
}

/// Below the levels that hold fields lie values, such as a schema, in which null may mean something.
fn drop_nulls(value: &mut Value, levels: usize) {
    match value {
        Value::Object(members) if levels > 0 => {
            members.retain(|_, member| !member.is_null());
            members
                .values_mut()
                .for_each(|member| drop_nulls(member, levels - 1));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| drop_nulls(item, levels)),
        _ => {}
    }
}

/// The refusal of a body that is broken at `path`, which is "." or empty at its top.
fn invalid(path: &str, error: &serde_json::Error) -> ApiError {
    let message = error.to_string();
    let named = named_field(&message);
    let place = match path {
        "" | "." => String::new(),
        // Its last part is the field that the message names.
        _ if message.starts_with(UNKNOWN) => String::new(),
        path => format!("`{path}`: "),
    };
    ApiError {
        param: named.or_else(|| (!place.is_empty()).then(|| path.to_owned())),
        ..ApiError::new(
            Kind::Validation,
            format!("the body is not a valid request: {place}{message}"),
        )
    }
}

/// The field an unknown or missing field error speaks of.
fn named_field(message: &str) -> Option<String> {
    let at_field = message
        .strip_prefix(UNKNOWN)
        .or_else(|| message.strip_prefix("missing field `"))?;
    Some(at_field.split('`').next()?.to_owned())
}

/// The first depth beyond the limit, found without recursion.
fn too_deep(text: &str) -> Option<usize> {
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                depth += 1;
                if depth > DEPTH {
                    return Some(depth);
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_in_strings_are_no_depth() {
        assert_eq!(too_deep(&format!("[{}]", "\"[[\\\"[\",".repeat(100))), None);
        assert_eq!(too_deep(&"[".repeat(65)), Some(65));
        assert_eq!(too_deep(&"[]".repeat(1000)), None);
    }

    #[test]
    fn surrogates_and_bad_bytes_are_refused() {
        assert!(parse::<String>(b"\"\xff\"").is_err());
        assert!(parse::<String>(b"\"\\ud800\"").is_err());
        assert_eq!(parse::<String>(b"\"\\ud83d\\ude00\"").unwrap(), "😀");
    }

    #[test]
    fn null_is_dropped_where_fields_are_and_kept_in_values() {
        let mut body =
            serde_json::json!({"a": null, "b": [{"c": null, "d": {"e": null}}], "f": [null]});
        drop_nulls(&mut body, FIELD_LEVELS);
        assert_eq!(
            body,
            serde_json::json!({"b": [{"d": {"e": null}}], "f": [null]})
        );
    }
}
