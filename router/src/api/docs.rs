//! The OpenAPI document behind `/docs`.

use utoipa::OpenApi;

use super::openai::{chat, completions, models};
use super::tgi::{generate, tokenize};
use super::{adapters, info, invocations};

/// Every route that is documented.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "kv.run",
        description = "Large language models, and many LoRA adapters of each, in one running batch."
    ),
    paths(
        generate::generate,
        generate::generate_stream,
        generate::compat_generate,
        tokenize::tokenize,
        tokenize::chat_tokenize,
        chat::chat_completions,
        completions::completions,
        models::list,
        models::get,
        adapters::list,
        adapters::get,
        adapters::load,
        adapters::unload,
        adapters::pin,
        adapters::unpin,
        adapters::download_lora_adapter,
        invocations::invocations,
        info::info,
        info::health,
        info::livez,
        info::metrics,
    )
)]
pub struct Document;
