//! The HTTP side: routes, the dialects they speak, and what they share.
//!
//! A body goes through its dialect ([`tgi`], [`openai`]) to a [`request::GenerateRequest`], through [`validate`] to a
//! request that cannot fail on its content, through [`admit`] to the engine, and comes back as parts of an [`answer`].

pub mod adapters;
mod admit;
pub mod answer;
mod app;
pub mod auth;
mod body;
mod docs;
pub mod error;
mod images;
pub mod info;
mod invocations;
pub mod openai;
mod origin;
mod prompt;
pub mod request;
mod sampling;
mod sse;
pub mod tgi;
mod validate;
mod whole;

use axum::Router;
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{delete, get, post};
use tower_http::cors::{AllowOrigin, CorsLayer};
use utoipa::OpenApi;
use utoipa_swagger_ui::SwaggerUi;

pub use app::{App, Parts, Settings};
use error::{ApiError, Kind};
use openai::{chat, completions, models};
use tgi::{generate, tokenize};

/// Every route. All but the health checks need a key where keys are set, and those that change what is served need an
/// admin key where one is set.
pub fn routes(app: &App) -> Router {
    let administration = Router::new()
        .route("/v1/adapters", post(adapters::load))
        .route("/v1/adapters/{name}", delete(adapters::unload))
        .route("/v1/adapters/{name}/pin", post(adapters::pin))
        .route("/v1/adapters/{name}/unpin", post(adapters::unpin))
        .route(
            "/download_lora_adapter",
            post(adapters::download_lora_adapter),
        )
        .route_layer(from_fn_with_state(app.clone(), auth::administer));
    let guarded = Router::new()
        .route("/", post(generate::compat_generate))
        .route("/generate", post(generate::generate))
        .route("/generate_stream", post(generate::generate_stream))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/chat_tokenize", post(tokenize::chat_tokenize))
        .route("/invocations", post(invocations::invocations))
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*model}", get(models::get))
        .route("/v1/adapters", get(adapters::list))
        .route("/v1/adapters/{name}", get(adapters::get))
        .route("/info", get(info::info))
        .route("/metrics", get(info::metrics))
        .merge(SwaggerUi::new("/docs").url("/api-doc/openapi.json", docs::Document::openapi()))
        .merge(administration)
        .route_layer(from_fn_with_state(app.clone(), auth::authenticate));
    let open = Router::new()
        .route("/", get(info::health))
        .route("/health", get(info::health))
        .route("/ping", get(info::health))
        .route("/readyz", get(info::health))
        .route("/livez", get(info::livez));
    let routes = guarded
        .merge(open)
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .layer(from_fn(auth::account));
    match cors(&app.settings.cors_origins) {
        Some(cors) => routes.layer(cors),
        None => routes,
    }
    .with_state(app.clone())
}

/// The metrics page alone, for a listener of its own.
pub fn metrics_routes(app: &App) -> Router {
    Router::new()
        .route("/metrics", get(info::metrics))
        .with_state(app.clone())
}

async fn no_such_route() -> ApiError {
    ApiError::new(Kind::NotFound, "no such route; /docs lists all of them")
}

async fn no_such_method() -> ApiError {
    ApiError::new(
        Kind::Method,
        "this route has other methods; /docs lists them",
    )
}

/// Pages of exactly these origins may ask, or of any where `*` is one; `None` when there are none.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    let listed: Vec<HeaderValue> = origins
        .iter()
        .filter_map(|origin| origin.parse().ok())
        .collect();
    if listed.is_empty() {
        return None;
    }
    let allowed = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(listed),
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers([
            header::CONTENT_TYPE,
            header::AUTHORIZATION,
            HeaderName::from_static("x-request-id"),
        ]);
    Some(layer)
}
