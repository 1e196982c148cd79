//! What the server is and how it is: `/info`, health, metrics.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use super::App;
use super::prompt::Limits;
use crate::{capabilities, metrics};

/// Work without progress for so long means that nothing will be answered.
const STALLED: Duration = Duration::from_secs(15);

/// Answer of `/info`.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[allow(missing_docs)]
pub struct Info {
    pub model_id: String,
    pub model_sha: Option<String>,
    pub model_pipeline_tag: Option<String>,
    pub model_dtype: String,
    pub model_device_type: String,
    pub max_concurrent_requests: usize,
    pub max_best_of: usize,
    pub max_stop_sequences: usize,
    pub max_input_tokens: u32,
    pub max_total_tokens: u32,
    pub max_batch_total_tokens: u64,
    pub max_batch_prefill_tokens: u32,
    pub max_batch_size: u32,
    pub validation_workers: usize,
    pub max_client_batch_size: usize,
    pub router: &'static str,
    pub version: &'static str,
    pub sha: Option<&'static str>,
    pub docker_label: Option<&'static str>,
    /// SHA-256 over the model's configuration and weight headers.
    pub model_digest: String,
    pub architecture: String,
    pub quantize: Option<String>,
    pub kv_dtype: String,
    /// What linears multiply their weights with: the model's own type, or "int8" where coded ones take it rounded.
    pub activation_dtype: String,
    /// Tensor-parallel ranks.
    pub shards: u32,
    /// Threads on the host's processors that each rank computes with.
    pub threads: u32,
    pub vocabulary: u32,
    /// The kernel that runs each operation.
    pub kernels: BTreeMap<String, String>,
    /// Numbers of rows whose decoding steps are captured as CUDA graphs.
    pub cuda_graphs: Vec<u32>,
    /// Whether the next step is planned and sent while one is computed.
    pub overlap: bool,
    /// Where the pages of the pool are.
    pub pages: Pages,
    /// Module names that adapters may change.
    pub lora_targets: Vec<String>,
    /// What a sequence keeps on the shards: "pages", "slots", "memory".
    pub state_kinds: Vec<String>,
    /// What is off for this model, and why.
    pub off: BTreeMap<&'static str, &'static str>,
    /// Whether prompts may hold images.
    pub images: bool,
    /// Names of the adapters that can be asked for.
    pub adapters: Vec<String>,
}

/// Pages of keys and values, right now; the other four add up to `total`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Pages {
    /// Of the pool.
    pub total: u32,
    /// Hold nothing.
    pub free: u32,
    /// Of open requests.
    pub used: u32,
    /// Held by the prefix cache alone.
    pub cached: u32,
    /// Adapters lie in them.
    pub adapters: u32,
}

/// What is served, with which limits.
#[utoipa::path(get, path = "/info", tag = "Server", responses((status = 200, body = Info)))]
pub async fn info(State(app): State<App>) -> Json<Info> {
    let (status, settings) = (app.engine.status(), &app.settings);
    let description = status.description.as_deref().cloned().unwrap_or_default();
    let off = capabilities::off(&description);
    let limits = Limits::of(&status, settings.max_input_tokens).ok();
    Json(Info {
        model_id: settings.model_id.clone(),
        model_sha: settings.model_revision.clone(),
        model_pipeline_tag: Some("text-generation".to_owned()),
        model_dtype: description.dtype,
        model_device_type: description
            .device
            .split(':')
            .next()
            .unwrap_or_default()
            .to_owned(),
        max_concurrent_requests: settings.max_concurrent_requests,
        max_best_of: settings.max_best_of,
        max_stop_sequences: settings.max_stop_sequences,
        max_input_tokens: limits.map_or(0, |limits| limits.input),
        max_total_tokens: status.max_total_tokens,
        max_batch_total_tokens: u64::from(status.pages) * u64::from(status.page_tokens),
        max_batch_prefill_tokens: status.step_tokens,
        max_batch_size: status.step_rows,
        validation_workers: settings.validation_workers,
        max_client_batch_size: settings.max_client_batch_size,
        router: "text-generation-router",
        version: env!("CARGO_PKG_VERSION"),
        sha: None,
        docker_label: None,
        model_digest: description.model_digest,
        architecture: description.architecture,
        quantize: Some(description.quantize).filter(|format| !format.is_empty()),
        kv_dtype: description.kv_dtype,
        activation_dtype: description.activation_dtype,
        shards: description.world,
        threads: description.threads,
        vocabulary: description.vocabulary,
        kernels: description.kernels.into_iter().collect(),
        cuda_graphs: status.captured.clone(),
        overlap: status.overlap,
        pages: Pages {
            total: status.pages,
            free: status.free_pages,
            used: status.used_pages(),
            cached: status.cached_pages,
            adapters: status.adapter_pages,
        },
        lora_targets: description.lora_targets,
        state_kinds: description.state_kinds,
        off: off.iter().map(|off| (off.feature, off.reason)).collect(),
        images: description.images.is_some(),
        adapters: app
            .engine
            .adapters()
            .list()
            .into_iter()
            .filter(|adapter| adapter.state.is_usable())
            .map(|adapter| adapter.name)
            .collect(),
    })
}

/// Whether requests would be answered; 503 while starting, draining or stalled.
#[utoipa::path(get, path = "/health", tag = "Server", responses((status = 200), (status = 503)))]
pub async fn health(State(app): State<App>) -> Response {
    let status = app.engine.status();
    // A group that restarts keeps its requests: they wait a little and go on, so that alone is not ill health.
    let serving = status.epoch > 0 && app.absence(status.ready) < STALLED;
    if serving && !status.draining && status.stalled < STALLED {
        return StatusCode::OK.into_response();
    }
    let body = json!({"error": "unhealthy", "error_type": "healthcheck"});
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

/// Whether the process runs.
#[utoipa::path(get, path = "/livez", tag = "Server", responses((status = 200)))]
pub async fn livez() -> StatusCode {
    StatusCode::OK
}

/// Everything measured, for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "Server", responses((status = 200, body = String)))]
pub async fn metrics(State(app): State<App>) -> Response {
    let page = metrics::render(&app.page, &app.engine);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page).into_response()
}
