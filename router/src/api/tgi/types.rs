//! Bodies of text-generation-inference's routes, field for field.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::answer::EndReason;
use crate::api::validate::AdapterMark;

/// Body of `/generate` and `/generate_stream`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GenerateBody {
    /// The text to continue.
    #[schema(example = "My name is Olivier and I")]
    pub inputs: String,
    /// How to continue it. Without any, the answer is sampled.
    pub parameters: Option<GenerateParameters>,
    /// What the route does anyway: false on `/generate`, true on `/generate_stream`.
    pub stream: Option<bool>,
}

/// Body of `/`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CompatGenerateBody {
    /// The text to continue.
    pub inputs: String,
    /// How to continue it.
    pub parameters: Option<GenerateParameters>,
    /// Whether to answer with events.
    pub stream: Option<bool>,
}

/// How to continue a text.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GenerateParameters {
    /// Answers to pick the best from, by mean log-probability.
    pub best_of: Option<i64>,
    /// Divides the logits; above 0.
    pub temperature: Option<f64>,
    /// Above 1 discourages repetition; above 0.
    pub repetition_penalty: Option<f64>,
    /// Discourages tokens by their count in the answer; -2 to 2.
    pub frequency_penalty: Option<f64>,
    /// Discourages tokens that the answer has; -2 to 2.
    pub presence_penalty: Option<f64>,
    /// Keeps so many most likely tokens; above 0.
    pub top_k: Option<i64>,
    /// Keeps the smallest set of tokens with this probability; above 0, below 1.
    pub top_p: Option<f64>,
    /// Typical decoding mass; above 0, below 1.
    pub typical_p: Option<f64>,
    /// Samples even if nothing else asks for it.
    pub do_sample: Option<bool>,
    /// Most tokens of the answer; without it, as many as fit.
    pub max_new_tokens: Option<i64>,
    /// Puts the prompt before the answer.
    pub return_full_text: Option<bool>,
    /// Strings that end the answer; the one that does stays at its end.
    pub stop: Option<Vec<String>>,
    /// Keeps so many tokens at the prompt's end.
    pub truncate: Option<i64>,
    /// Not supported.
    pub watermark: Option<bool>,
    /// Reports tokens, times and the adapter.
    pub details: Option<bool>,
    /// Reports the prompt's log-probabilities; not in streams.
    pub decoder_input_details: Option<bool>,
    /// Makes a sampled answer repeatable.
    #[schema(value_type = Option<u64>)]
    pub seed: Option<serde_json::Number>,
    /// Alternatives to report beside the tokens, as `top_tokens`.
    pub top_n_tokens: Option<i64>,
    /// Alternatives to report in each token, as `alternative_tokens`: LoRAX's `top_n_tokens`.
    pub return_k_alternatives: Option<i64>,
    /// Not supported yet.
    #[schema(value_type = Option<Object>)]
    pub grammar: Option<serde_json::Value>,
    /// Not supported yet: LoRAX's `grammar`.
    #[schema(value_type = Option<Object>)]
    pub response_format: Option<serde_json::Value>,
    /// The adapter to answer with.
    pub adapter_id: Option<String>,
    /// Where to load the adapter from if it is not loaded yet, as LoRAX does: `hub` (needs `--allow-dynamic-lora`) or
    /// `local`, beneath `--lora-dir`.
    pub adapter_source: Option<String>,
    /// Not supported.
    #[schema(value_type = Option<Object>)]
    pub merged_adapters: Option<serde_json::Value>,
    /// Not supported: adapters are loaded with the server's own credentials.
    pub api_token: Option<String>,
    /// The same as `adapter_id`; "empty" is the base model.
    pub lora_id: Option<String>,
    /// Treats end tokens as ordinary ones.
    pub ignore_eos_token: Option<bool>,
}

/// Why an answer ended, in TGI's words.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// As many tokens as asked for.
    Length,
    /// The model ended it.
    EosToken,
    /// A stop string ended it.
    StopSequence,
}

impl From<EndReason> for FinishReason {
    fn from(reason: EndReason) -> Self {
        match reason {
            EndReason::Length => Self::Length,
            EndReason::EndToken => Self::EosToken,
            EndReason::StopText => Self::StopSequence,
        }
    }
}

/// A token of an answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The text that came with it.
    pub text: String,
    /// Its log-probability.
    pub logprob: f32,
    /// Whether it is a control token, whose text is no part of the answer.
    pub special: bool,
    /// Alternatives to it, when `return_k_alternatives` asks for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alternative_tokens: Option<Vec<AlternativeToken>>,
}

/// A token that might have stood in another's place.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct AlternativeToken {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub text: String,
    /// Its log-probability.
    pub logprob: f32,
}

/// A token of a prompt.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct PrefillToken {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub text: String,
    /// Its log-probability given those before it; null for the first.
    pub logprob: Option<f32>,
}

/// The adapter that shaped an answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct AdapterDetails {
    /// Its name.
    pub id: String,
    /// SHA-256 of its content.
    pub digest: String,
}

impl From<&AdapterMark> for AdapterDetails {
    fn from(mark: &AdapterMark) -> Self {
        Self {
            id: mark.name.clone(),
            digest: mark.digest.clone(),
        }
    }
}

/// One of the answers that `best_of` made.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct BestOfSequence {
    /// Its text.
    pub generated_text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens of it.
    pub generated_tokens: u32,
    /// Its seed.
    pub seed: Option<u64>,
    /// Log-probabilities of the prompt.
    pub prefill: Vec<PrefillToken>,
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// Alternatives to its tokens.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub top_tokens: Vec<Vec<Token>>,
}

/// What `details` asks for.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Details {
    /// Why the answer ended.
    pub finish_reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub generated_tokens: u32,
    /// The seed, when the answer was sampled.
    pub seed: Option<u64>,
    /// The prompt's tokens, when `decoder_input_details` asks for them.
    pub prefill: Vec<PrefillToken>,
    /// Tokens of the answer.
    pub tokens: Vec<Token>,
    /// The other answers of `best_of`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best_of_sequences: Option<Vec<BestOfSequence>>,
    /// Alternatives to the tokens.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub top_tokens: Vec<Vec<Token>>,
    /// The adapter that was applied; null for the base model.
    pub adapter: Option<AdapterDetails>,
    /// Prompt tokens that the prefix cache saved.
    pub cached_tokens: u32,
    /// Milliseconds in the queue.
    pub queue_time_ms: f64,
    /// Milliseconds from the first scheduled row to the end.
    pub inference_time_ms: f64,
}

/// Answer of `/generate`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct GenerateAnswer {
    /// The answer.
    pub generated_text: String,
    /// Its details, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<Details>,
}

/// What `details` asks for in a stream.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct StreamDetails {
    /// Why the answer ended.
    pub finish_reason: FinishReason,
    /// Tokens of the answer.
    pub generated_tokens: u32,
    /// The seed, when the answer was sampled.
    pub seed: Option<u64>,
    /// Tokens of the prompt.
    pub input_length: u32,
    /// The same, under LoRAX's name.
    pub prompt_tokens: u32,
    /// The adapter that was applied; null for the base model.
    pub adapter: Option<AdapterDetails>,
    /// Prompt tokens that the prefix cache saved.
    pub cached_tokens: u32,
    /// Milliseconds in the queue.
    pub queue_time_ms: f64,
    /// Milliseconds from the first scheduled row to the end.
    pub inference_time_ms: f64,
}

/// One event of `/generate_stream`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct StreamEvent {
    /// Counts tokens from 1.
    pub index: u32,
    /// The token.
    pub token: Token,
    /// Alternatives to it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub top_tokens: Vec<Token>,
    /// The whole answer, with the last token; null before.
    pub generated_text: Option<String>,
    /// Details, with the last token, when asked for.
    pub details: Option<StreamDetails>,
}

/// How errors are told outside `/v1/`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What was asked, what was found, what to do.
    pub error: String,
    /// The kind.
    #[schema(example = "validation")]
    pub error_type: String,
}

/// Body of `/tokenize`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenizeBody {
    /// The text to tokenize.
    pub inputs: String,
    /// Whether the model's own tokens are added; true by default.
    pub add_special_tokens: Option<bool>,
}

/// One token of `/tokenize`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct SimpleToken {
    /// Its id.
    pub id: u32,
    /// Its text as it stands in the input; empty for added tokens.
    pub text: String,
    /// Where it starts, in characters.
    pub start: usize,
    /// Where it ends, in characters.
    pub stop: usize,
}

/// Answer of `/chat_tokenize`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatTokenizeAnswer {
    /// The tokens.
    pub tokenize_response: Vec<SimpleToken>,
    /// The prompt they make up.
    pub templated_text: String,
}
