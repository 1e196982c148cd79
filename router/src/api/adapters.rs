//! `/v1/adapters`: list, load, pin and unload adapters while requests run; kv.run's `/download_lora_adapter`.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::App;
use super::body::JsonBody;
use super::error::{ApiError, Kind};
use super::origin::{self, Origin};
use super::request::{Caller, Source};
use super::validate::{is_base, unsupported};
use crate::request::{AdapterInfo, AdapterSpec, AdapterState, LoadError, UnknownAdapter};

/// Longest name of an adapter, in bytes.
const NAME_BYTES: usize = 200;

/// An adapter of the registry.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Adapter {
    /// The name that requests ask for.
    pub name: String,
    /// "adapter".
    pub object: &'static str,
    /// Where it came from: a folder.
    pub source: String,
    /// "known", "loading", "ready", "draining", "gone" or "failed".
    pub state: &'static str,
    /// SHA-256 of its content; null before its first load.
    pub digest: Option<String>,
    /// Bytes it takes on the fullest rank.
    pub bytes: u64,
    /// Tensors applied, every one of its file.
    pub matched: u32,
    /// Least LoRA rank in it.
    pub rank_min: u32,
    /// Greatest LoRA rank in it.
    pub rank_max: u32,
    /// Module names it changes.
    pub targets: Vec<String>,
    /// Open requests that use it.
    pub users: u32,
    /// Whether it stays when room is short.
    pub pinned: bool,
    /// Why the last load failed.
    pub error: Option<String>,
}

impl Adapter {
    fn of(app: &App, info: AdapterInfo) -> Self {
        let root = app.settings.lora_dir.as_deref();
        let shown = root
            .and_then(|root| info.path.strip_prefix(root).ok())
            .unwrap_or(&info.path);
        Self {
            source: shown.display().to_string(),
            name: info.name,
            object: "adapter",
            state: info.state.as_str(),
            digest: (!info.digest.is_empty()).then_some(info.digest),
            bytes: info.bytes,
            matched: info.matched,
            rank_min: info.rank_min,
            rank_max: info.rank_max,
            targets: info.targets,
            users: info.users,
            pinned: info.pinned,
            error: info.error,
        }
    }
}

/// All adapters.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct AdapterList {
    /// "list".
    pub object: &'static str,
    /// By name.
    pub data: Vec<Adapter>,
}

/// What to load: a folder of the server's adapter folder, or a repository of the hub.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadBody {
    /// The name that requests will ask for; by default that of the folder or repository.
    pub name: Option<String>,
    /// A folder beneath `--lora-dir`.
    pub path: Option<String>,
    /// A repository, `org/name` or `org/name@revision`; needs `--allow-dynamic-lora`.
    pub id: Option<String>,
    /// Whether it stays when room is short.
    pub pinned: Option<bool>,
}

/// Body of `/download_lora_adapter`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DownloadBody {
    /// A folder beneath `--lora-dir`, or a repository of the hub.
    pub lora_id: String,
    /// Not supported: the server uses its own token.
    pub hf_api_token: Option<String>,
}

/// Answer of `/download_lora_adapter`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct DownloadAnswer {
    /// The name to ask for.
    pub lora_id: String,
    /// The adapter.
    pub adapter: Adapter,
}

/// All adapters and their states.
#[utoipa::path(get, path = "/v1/adapters", tag = "Adapters", responses((status = 200, body = AdapterList)))]
pub async fn list(State(app): State<App>) -> Json<AdapterList> {
    let adapters = app.engine.adapters().list();
    Json(AdapterList {
        object: "list",
        data: adapters
            .into_iter()
            .map(|info| Adapter::of(&app, info))
            .collect(),
    })
}

/// One adapter.
#[utoipa::path(get, path = "/v1/adapters/{name}", tag = "Adapters", params(("name" = String, Path,)),
    responses((status = 200, body = Adapter), (status = 404)))]
pub async fn get(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<Adapter>, ApiError> {
    let found = app
        .engine
        .adapters()
        .list()
        .into_iter()
        .find(|info| info.name == name);
    let info = found.ok_or_else(|| ApiError::from(UnknownAdapter(name)))?;
    Ok(Json(Adapter::of(&app, info)))
}

/// Loads an adapter beside the running requests and answers when it is usable.
#[utoipa::path(post, path = "/v1/adapters", tag = "Adapters", request_body = LoadBody, responses(
    (status = 200, body = Adapter), (status = 403), (status = 404), (status = 409), (status = 422), (status = 507)))]
pub async fn load(
    State(app): State<App>,
    JsonBody(body): JsonBody<LoadBody>,
) -> Result<Json<Adapter>, ApiError> {
    let origin = match (body.path, body.id) {
        (Some(path), None) => Origin::Folder(path),
        (None, Some(id)) => Origin::Hub(id),
        _ => return Err(ApiError::field("path", "send either `path` or `id`")),
    };
    load_from(&app, body.name, origin, body.pinned == Some(true))
        .await
        .map(Json)
}

/// Unloads an adapter: new requests get 404 at once, running ones finish.
#[utoipa::path(delete, path = "/v1/adapters/{name}", tag = "Adapters", params(("name" = String, Path,)),
    responses((status = 200, body = Adapter), (status = 202, body = Adapter), (status = 404)))]
pub async fn unload(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<(StatusCode, Json<Adapter>), ApiError> {
    let info = app.engine.adapters().unload(&name).await?;
    let status = match info.state {
        AdapterState::Draining => StatusCode::ACCEPTED,
        _ => StatusCode::OK,
    };
    Ok((status, Json(Adapter::of(&app, info))))
}

/// Keeps an adapter loaded even when room is short.
#[utoipa::path(post, path = "/v1/adapters/{name}/pin", tag = "Adapters", params(("name" = String, Path,)),
    responses((status = 200, body = Adapter), (status = 404)))]
pub async fn pin(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<Adapter>, ApiError> {
    let info = app.engine.adapters().pin(&name, true)?;
    Ok(Json(Adapter::of(&app, info)))
}

/// Lets an adapter leave when room is short.
#[utoipa::path(post, path = "/v1/adapters/{name}/unpin", tag = "Adapters", params(("name" = String, Path,)),
    responses((status = 200, body = Adapter), (status = 404)))]
pub async fn unpin(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<Adapter>, ApiError> {
    let info = app.engine.adapters().pin(&name, false)?;
    Ok(Json(Adapter::of(&app, info)))
}

/// Loads an adapter as older kv.run clients ask for it.
#[utoipa::path(post, path = "/download_lora_adapter", tag = "Adapters", request_body = DownloadBody, responses(
    (status = 200, body = DownloadAnswer), (status = 403), (status = 404), (status = 422)))]
pub async fn download_lora_adapter(
    State(app): State<App>,
    JsonBody(body): JsonBody<DownloadBody>,
) -> Result<Json<DownloadAnswer>, ApiError> {
    if body
        .hf_api_token
        .as_ref()
        .is_some_and(|token| !token.is_empty())
    {
        return Err(unsupported(
            "hf_api_token",
            "the server uses the token it was started with",
        ));
    }
    let loaded = app
        .engine
        .adapters()
        .list()
        .into_iter()
        .find(|info| info.name == body.lora_id);
    let adapter = match loaded {
        Some(info) => Adapter::of(&app, info),
        None => {
            let here = origin::folder(app.settings.lora_dir.as_deref(), &body.lora_id).is_ok();
            let origin = if here || !body.lora_id.contains('/') {
                Origin::Folder(body.lora_id.clone())
            } else {
                Origin::Hub(body.lora_id.clone())
            };
            load_from(&app, Some(body.lora_id.clone()), origin, false).await?
        }
    };
    Ok(Json(DownloadAnswer {
        lora_id: body.lora_id,
        adapter,
    }))
}

/// Loads an adapter that a request names with its source, unless it has come meanwhile.
pub async fn bring(app: &App, caller: &Caller, name: &str, source: Source) -> Result<(), ApiError> {
    if !caller.administers {
        return Err(ApiError::from(UnknownAdapter(name.to_owned())));
    }
    let (own, name) = (app.clone(), name.to_owned());
    let load = tokio::spawn(async move {
        let _turn = own.loads.acquire().await;
        if own.engine.adapters().resolve(&name).is_ok() {
            return Ok(());
        }
        let (root, hub) = (
            own.settings.lora_dir.as_deref(),
            own.settings.allow_dynamic_lora,
        );
        let origin = match source {
            // Where loading is allowed, a name that leads nowhere is only an unknown one.
            Source::Hub if hub && !origin::is_repository(&name) => {
                return Err(UnknownAdapter(name).into());
            }
            Source::Local if root.is_some() && origin::folder(root, &name).is_err() => {
                return Err(UnknownAdapter(name).into());
            }
            Source::Hub => Origin::Hub(name.clone()),
            Source::Local => Origin::Folder(name.clone()),
        };
        load_from(&own, Some(name), origin, false).await.map(drop)
    });
    let late = |_| {
        ApiError::new(
            Kind::Deadline,
            "the adapter was not loaded in time; try again",
        )
    };
    let ended = tokio::time::timeout_at(caller.deadline.into(), load)
        .await
        .map_err(late)?;
    ended.map_err(interrupted)?
}

fn interrupted(_: tokio::task::JoinError) -> ApiError {
    LoadError::Unavailable("the load was interrupted; try again".to_owned()).into()
}

async fn load_from(
    app: &App,
    name: Option<String>,
    origin: Origin,
    pinned: bool,
) -> Result<Adapter, ApiError> {
    let name = match name {
        Some(name) => name,
        None => origin.default_name(),
    };
    check_name(app, &name)?;
    // The load belongs to the registry: a client that leaves does not undo it for others who wait.
    let (own, wanted) = (app.clone(), name.clone());
    let load = tokio::spawn(async move {
        let spec = AdapterSpec {
            path: origin.resolve(&own.settings).await?,
            name: wanted,
            pinned,
        };
        Ok(own.engine.adapters().load(spec).await?)
    });
    match load.await.map_err(interrupted)? {
        Ok(info) => {
            tracing::info!(
                adapter = name,
                digest = info.digest,
                bytes = info.bytes,
                "adapter loaded"
            );
            Ok(Adapter::of(app, info))
        }
        Err(error) => {
            let error: ApiError = error;
            tracing::warn!(adapter = name, %error, "adapter not loaded");
            Err(error)
        }
    }
}

fn check_name(app: &App, name: &str) -> Result<(), ApiError> {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./@".contains(letter);
    if name.is_empty() || name.len() > NAME_BYTES || !name.chars().all(plain) {
        let message =
            format!("`name` must be 1 to {NAME_BYTES} letters, digits or any of - _ . / @");
        return Err(ApiError::field("name", message));
    }
    if matches!(name, "empty" | "__base_model__") || is_base(app, name) {
        return Err(ApiError::new(
            Kind::Conflict,
            format!("`{name}` means the base model; pick another name"),
        ));
    }
    Ok(())
}
