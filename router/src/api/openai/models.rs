//! `/v1/models`: the base model and every adapter that a request may name.

use axum::Json;
use axum::extract::{Path, State};

use super::answers::{Model, ModelList};
use crate::api::App;
use crate::api::error::{ApiError, Kind};

/// The base model and its adapters.
#[utoipa::path(get, path = "/v1/models", tag = "Models", responses((status = 200, body = ModelList)))]
pub async fn list(State(app): State<App>) -> Json<ModelList> {
    Json(ModelList {
        object: "list",
        data: models(&app),
    })
}

/// One of them.
#[utoipa::path(get, path = "/v1/models/{model}", tag = "Models", params(("model" = String, Path,)),
    responses((status = 200, body = Model), (status = 404)))]
pub async fn get(
    State(app): State<App>,
    Path(model): Path<String>,
) -> Result<Json<Model>, ApiError> {
    let found = models(&app)
        .into_iter()
        .find(|candidate| candidate.id == model);
    found.map(Json).ok_or_else(|| {
        ApiError::new(
            Kind::NotFound,
            format!("model `{model}` is not served here; see /v1/models"),
        )
    })
}

fn models(app: &App) -> Vec<Model> {
    let entry = |id: String| Model {
        id,
        object: "model",
        created: app.started,
        owned_by: "kv.run",
        parent: None,
        digest: None,
    };
    let adapters = app
        .engine
        .adapters()
        .list()
        .into_iter()
        .filter(|adapter| adapter.state.is_usable());
    let adapters = adapters.map(|adapter| Model {
        parent: Some(app.settings.model_id.clone()),
        digest: (!adapter.digest.is_empty()).then_some(adapter.digest),
        ..entry(adapter.name)
    });
    std::iter::once(entry(app.settings.model_id.clone()))
        .chain(adapters)
        .collect()
}
