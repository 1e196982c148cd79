//! What `text-generation-server inspect` read from the headers of the model's and the adapters' files.

use serde::Deserialize;

/// A model and its adapters, by their headers alone. All sizes in bytes.
#[derive(Debug, Clone, Deserialize)]
pub struct Inspection {
    pub model: ModelFacts,
    pub adapters: Vec<AdapterFacts>,
}

/// What the plan needs to know of the model.
#[derive(Debug, Clone, Deserialize)]
pub struct ModelFacts {
    pub architecture: String,
    pub parameters: u64,
    /// Number format that the shard will compute in.
    pub dtype: String,
    /// Weights of the fullest rank, in `dtype`.
    pub rank_weight_bytes: u64,
    /// Number format of the KV cache.
    pub kv_dtype: String,
    /// One page of the KV cache on one rank.
    pub page_bytes: u64,
    pub page_tokens: u32,
    /// The recurrent state of one sequence on one rank; 0 in a model without.
    #[serde(default)]
    pub slot_bytes: u64,
    /// Longest sequence the model was made for; nothing where its positions have no end.
    pub max_positions: Option<u32>,
}

/// What the plan needs to know of an adapter.
#[derive(Debug, Clone, Deserialize)]
pub struct AdapterFacts {
    pub name: String,
    pub bytes: u64,
    pub rank_min: u32,
    pub rank_max: u32,
}
