//! Who asks: API keys, request ids, and the one place that writes error bodies.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Extension;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use metrics::counter;
use sha2::{Digest, Sha256};

use super::App;
use super::error::{ApiError, Dialect, Kind};
use super::request::Caller;
use crate::metrics as names;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TIMEOUT_MS: &str = "x-request-timeout-ms";

/// Digests of the API keys; the keys themselves are forgotten.
#[derive(Clone, Default)]
pub struct Keys(Vec<[u8; 32]>);

impl fmt::Debug for Keys {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} keys", self.0.len())
    }
}

impl Keys {
    /// Keys by their text; empty ones are left out.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        let keys = keys
            .into_iter()
            .map(str::trim)
            .filter(|key| !key.is_empty());
        Self(
            keys.map(|key| Sha256::digest(key.as_bytes()).into())
                .collect(),
        )
    }

    /// Whether everybody may ask.
    pub fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// The tenant behind the headers' key, or `None` when it is none of these. Takes the same time for every wrong key.
    fn tenant(&self, headers: &HeaderMap) -> Option<Arc<str>> {
        let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        let (scheme, key) = value.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let digest: [u8; 32] = Sha256::digest(key.trim().as_bytes()).into();
        let known = self
            .0
            .iter()
            .fold(false, |known, candidate| known | equal(candidate, &digest));
        known.then(|| hex(&digest[..8]).into())
    }
}

/// Compares without looking away early.
fn equal(left: &[u8; 32], right: &[u8; 32]) -> bool {
    let difference = left.iter().zip(right).fold(0, |sum, (a, b)| sum | (a ^ b));
    std::hint::black_box(difference) == 0
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A random id for requests and answers.
pub fn random_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// Refuses strangers, and tells handlers who asks.
pub async fn authenticate(
    State(app): State<App>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let (keys, admin_keys) = (&app.settings.keys, &app.settings.admin_keys);
    let admin = admin_keys.tenant(request.headers());
    let is_admin = admin.is_some();
    let known = keys.tenant(request.headers()).or(admin);
    let anyone = || keys.is_open().then(|| "anonymous".into());
    let Some(tenant) = known.or_else(anyone) else {
        return Err(stranger(
            "no valid API key; send `Authorization: Bearer KEY`",
        ));
    };
    let arrived = Instant::now();
    let caller = Caller {
        tenant,
        administers: is_admin || admin_keys.is_open(),
        request_id: request_id(&request),
        arrived,
        deadline: arrived + patience(&app, request.headers())?,
        route: route(&request),
    };
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
}

/// Lets only those pass who may change what is served; [`authenticate`] has found out who asks.
pub async fn administer(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if caller.administers {
        return Ok(next.run(request).await);
    }
    let text = "adapters are loaded, pinned and unloaded with the admin key; send `Authorization: Bearer KEY` with it";
    Err(match app.settings.keys.is_open() {
        true => stranger(text),
        false => ApiError::new(Kind::Forbidden, text),
    })
}

fn stranger(text: &str) -> ApiError {
    counter!(names::AUTH_FAILURES).increment(1);
    ApiError::new(Kind::Unauthorized, text)
}

fn patience(app: &App, headers: &HeaderMap) -> Result<Duration, ApiError> {
    let most = app.settings.request_timeout;
    let Some(asked) = headers.get(TIMEOUT_MS) else {
        return Ok(most);
    };
    let asked = asked
        .to_str()
        .ok()
        .and_then(|text| text.parse().ok())
        .filter(|&asked| asked > 0);
    match asked {
        Some(asked) => Ok(Duration::from_millis(asked).min(most)),
        None => Err(ApiError::field(
            TIMEOUT_MS,
            format!("the header `{TIMEOUT_MS}` must be a whole number of milliseconds above 0"),
        )),
    }
}

fn route(request: &Request) -> Arc<str> {
    match request.extensions().get::<MatchedPath>() {
        Some(path) => path.as_str().into(),
        None => "none".into(),
    }
}

fn request_id(request: &Request) -> Arc<str> {
    match request
        .headers()
        .get(REQUEST_ID)
        .and_then(|id| id.to_str().ok())
    {
        Some(id) => id.into(),
        None => "none".into(),
    }
}

/// Gives every request an id, and writes, counts and logs every error. No text of a client is logged.
pub async fn account(mut request: Request, next: Next) -> Response {
    let id = adopt_id(&mut request);
    let (dialect, route) = (Dialect::of_path(request.uri().path()), route(&request));
    let mut response = next.run(request).await;
    if let Some(error) = response.extensions().get::<ApiError>().cloned() {
        note_failure(&error, &route, &id.to_str().unwrap_or_default().into());
        response = error.render(dialect);
    }
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Counts and logs a refused or failed request.
pub fn note_failure(error: &ApiError, route: &str, request_id: &Arc<str>) {
    let err = error.kind.row().error_type;
    names::record_failure(err, route);
    tracing::info!(
        err,
        route,
        request_id = &**request_id,
        param = error.param.as_deref(),
        "request not answered"
    );
}

/// Keeps a sensible id that the client sent, or makes one.
fn adopt_id(request: &mut Request) -> HeaderValue {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    let sent = request
        .headers()
        .get(REQUEST_ID)
        .filter(|id| (1..=64).contains(&id.len()) && id.as_bytes().iter().copied().all(plain));
    let id = match sent {
        Some(id) => id.clone(),
        None => HeaderValue::from_str(&random_id()).unwrap_or(HeaderValue::from_static("none")),
    };
    request.headers_mut().insert(REQUEST_ID, id.clone());
    id
}
