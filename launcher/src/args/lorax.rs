//! Flags that LoRAX's launcher has beyond text-generation-inference's, each with what stands in its place.
//!
//! They are read from the command line only: their variables have names such as `SOURCE` and `BACKEND`, which the
//! environment of a container may hold for other reasons.

use clap::Args;

use super::compat::Fate;

/// Flags kept for their name only. All are hidden from `--help`.
#[derive(Debug, Clone, Default, Args)]
pub struct Lorax {
    #[arg(long, hide = true)]
    adapter_id: Option<String>,
    #[arg(long, hide = true)]
    source: Option<String>,
    #[arg(long, hide = true)]
    adapter_source: Option<String>,
    #[arg(long, hide = true)]
    preloaded_adapter_ids: Vec<String>,
    #[arg(long, hide = true)]
    preloaded_adapter_source: Option<String>,
    #[arg(long, hide = true)]
    merge_adapter_weights: bool,
    #[arg(long, hide = true)]
    predibase_api_token: Option<super::Secret>,
    #[arg(long, hide = true)]
    max_active_adapters: Option<u32>,
    #[arg(long, hide = true)]
    adapter_cycle_time_s: Option<u64>,
    #[arg(long, hide = true)]
    adapter_memory_fraction: Option<f32>,
    #[arg(long, hide = true)]
    eager_prefill: Option<bool>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    chunked_prefill: Option<bool>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    prefix_caching: Option<bool>,
    #[arg(long, hide = true)]
    compile: bool,
    #[arg(long, hide = true)]
    compile_max_batch_size: Option<u32>,
    #[arg(long, hide = true)]
    compile_max_rank: Option<u32>,
    #[arg(long, hide = true)]
    compile_batch_size: Option<u32>,
    #[arg(long, hide = true)]
    backend: Option<String>,
    #[arg(long, hide = true)]
    disable_sgmv: bool,
    #[arg(long, hide = true)]
    memory_wiggle_room: Option<f32>,
    #[arg(long, hide = true)]
    embedding_model: Option<bool>,
    #[arg(long, hide = true)]
    embedding_dim: Option<u32>,
    #[arg(long, hide = true)]
    download_only: bool,
    #[arg(long, hide = true)]
    cors_allow_header: Vec<String>,
    #[arg(long, hide = true)]
    cors_expose_header: Vec<String>,
    #[arg(long, hide = true)]
    cors_allow_method: Vec<String>,
    #[arg(long, hide = true)]
    cors_allow_credentials: Option<bool>,
}

impl Lorax {
    /// The fate of every flag that was set, in the order of the flags.
    pub fn fates(&self) -> Vec<Fate> {
        let accepted = |set: bool, flag, remark| set.then_some(Fate::Accepted { flag, remark });
        let refused = |set: bool, flag, reason| set.then_some(Fate::Refused { flag, reason });
        let elsewhere = |source: &Option<String>| source.as_ref().is_some_and(|name| name != "hub");
        let any = |flags: [bool; 4]| flags.contains(&true);
        [
            refused(
                self.adapter_id.is_some(),
                "--adapter-id",
                "the base model stays as it is; load the adapter with --lora-ids, and name it in requests as `adapter_id`",
            ),
            refused(
                elsewhere(&self.source) || elsewhere(&self.adapter_source),
                "--source, --adapter-source",
                "models and adapters come from the hub or from folders; name the folder",
            ),
            accepted(
                self.source.is_some() || self.adapter_source.is_some(),
                "--source, --adapter-source",
                "a name that is no folder is looked for on the hub",
            ),
            refused(
                !self.preloaded_adapter_ids.is_empty() || self.preloaded_adapter_source.is_some(),
                "--preloaded-adapter-ids, --preloaded-adapter-source",
                "write --lora-ids \"first;second\" in its place",
            ),
            refused(
                self.merge_adapter_weights,
                "--merge-adapter-weights",
                "adapters are never merged into the base; those of a batch run side by side",
            ),
            refused(
                self.predibase_api_token.is_some(),
                "--predibase-api-token",
                "adapters come from the hub or from folders",
            ),
            accepted(
                self.max_active_adapters.is_some()
                    || self.adapter_cycle_time_s.is_some()
                    || self.adapter_memory_fraction.is_some(),
                "--max-active-adapters, --adapter-cycle-time-s, --adapter-memory-fraction",
                "as many adapters run at once as --adapter-bytes holds, and the least recently used one makes room",
            ),
            accepted(
                self.eager_prefill.is_some()
                    || self.chunked_prefill.is_some()
                    || self.prefix_caching.is_some(),
                "--eager-prefill, --chunked-prefill, --prefix-caching",
                "prompts are always computed in parts beside running answers, and what they share is kept",
            ),
            accepted(
                any([
                    self.compile,
                    self.compile_max_batch_size.is_some(),
                    self.compile_max_rank.is_some(),
                    self.compile_batch_size.is_some(),
                ]),
                "--compile, --compile-max-batch-size, --compile-max-rank, --compile-batch-size",
                "see --cuda-graphs, which captures steps with adapters of any rank",
            ),
            accepted(self.backend.is_some(), "--backend", "see --attention"),
            accepted(
                self.disable_sgmv || self.memory_wiggle_room.is_some(),
                "--disable-sgmv, --memory-wiggle-room",
                "kernels are chosen, and memory is measured, by themselves",
            ),
            refused(
                self.embedding_model == Some(true) || self.embedding_dim.is_some(),
                "--embedding-model, --embedding-dim",
                "the server generates text only",
            ),
            refused(
                self.download_only,
                "--download-only",
                "run `text-generation-server download-weights NAME` in its place",
            ),
            refused(
                any([
                    !self.cors_allow_header.is_empty(),
                    !self.cors_expose_header.is_empty(),
                    !self.cors_allow_method.is_empty(),
                    self.cors_allow_credentials == Some(true),
                ]),
                "--cors-allow-header, --cors-expose-header, --cors-allow-method, --cors-allow-credentials",
                "--cors-allow-origin alone decides; it allows GET, POST and DELETE with content-type, authorization and \
                 x-request-id",
            ),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}
