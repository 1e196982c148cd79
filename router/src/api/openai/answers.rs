//! Answers of OpenAI's routes, whole and in pieces.

use std::collections::HashMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::api::tgi::types::AdapterDetails;

/// Tokens that a request took.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens of the prompts.
    pub prompt_tokens: u32,
    /// Tokens of the answers.
    pub completion_tokens: u32,
    /// Both.
    pub total_tokens: u32,
    /// More on the prompts.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// More on the prompts' tokens.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Tokens that the prefix cache saved.
    pub cached_tokens: u32,
}

/// What this server tells beyond OpenAI's fields.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct AnswerDetails {
    /// The adapter that was applied; null for the base model.
    pub adapter: Option<AdapterDetails>,
    /// The seed, when the answer was sampled.
    pub seed: Option<u64>,
    /// Prompt tokens that the prefix cache saved.
    pub cached_tokens: u32,
    /// Milliseconds in the queue.
    pub queue_time_ms: f64,
    /// Milliseconds from the first scheduled row to the end.
    pub inference_time_ms: f64,
}

/// A chat answer, or an event of one: then `choices` hold deltas.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Completion<C: ToSchema> {
    /// Random; the same in all events of a stream.
    pub id: String,
    /// What this is: "chat.completion", "chat.completion.chunk" or "text_completion".
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model as it was asked for.
    pub model: String,
    /// This server and its version.
    pub system_fingerprint: String,
    /// The answers.
    pub choices: Vec<C>,
    /// Tokens taken; in streams on the last event, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// What was applied and how long it took; in streams on events that end an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<AnswerDetails>,
}

/// One chat answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatChoice {
    /// Which answer.
    pub index: usize,
    /// What the assistant says.
    pub message: AssistantMessage,
    /// Its log-probabilities, when asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// "stop" or "length".
    pub finish_reason: Option<&'static str>,
}

/// What the assistant says.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct AssistantMessage {
    /// "assistant".
    pub role: &'static str,
    /// The answer.
    pub content: String,
}

/// A piece of a chat answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatChunkChoice {
    /// Which answer.
    pub index: usize,
    /// The piece.
    pub delta: Delta,
    /// Its log-probabilities, when asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// "stop" or "length" on the last piece.
    pub finish_reason: Option<&'static str>,
}

/// A piece of what the assistant says.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct Delta {
    /// "assistant", on the first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// More text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Log-probabilities of a chat answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One entry per token.
    pub content: Vec<ChatTokenLogprob>,
}

/// A token of a chat answer, and alternatives to it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatTokenLogprob {
    /// Its text.
    pub token: String,
    /// Its log-probability.
    pub logprob: f32,
    /// Its bytes; null when it is only a part of a character.
    pub bytes: Option<Vec<u8>>,
    /// Alternatives; null on an alternative.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(no_recursion)]
    pub top_logprobs: Option<Vec<ChatTokenLogprob>>,
}

/// One text answer, or a piece of one.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// Which answer.
    pub index: usize,
    /// The answer.
    pub text: String,
    /// Its log-probabilities, when asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// "stop" or "length"; null on all pieces but the last.
    pub finish_reason: Option<&'static str>,
}

/// Log-probabilities of a text answer, as parallel lists.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    /// Texts of the tokens.
    pub tokens: Vec<String>,
    /// Their log-probabilities; null where nothing came before.
    pub token_logprobs: Vec<Option<f32>>,
    /// Alternatives by text.
    pub top_logprobs: Vec<Option<HashMap<String, f32>>>,
    /// Where each starts in the text, in characters.
    pub text_offset: Vec<usize>,
}

/// A model that can be asked for.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Model {
    /// The name to ask for.
    pub id: String,
    /// "model".
    pub object: &'static str,
    /// When this server started, in seconds since 1970.
    pub created: u64,
    /// "kv.run".
    pub owned_by: &'static str,
    /// The base model, for an adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// SHA-256 of the adapter's content.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// All models that can be asked for.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ModelList {
    /// "list".
    pub object: &'static str,
    /// The base model, then its adapters.
    pub data: Vec<Model>,
}
