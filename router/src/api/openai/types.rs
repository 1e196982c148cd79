//! Bodies of OpenAI's routes. What is not written here is refused by name.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};
use utoipa::ToSchema;

use crate::api::tgi::types::AdapterDetails;

/// Declares a body with its own fields and those that both routes share.
macro_rules! body {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[$doc])* pub $field: $type,)*
            /// The base model or an adapter; "", "tgi" and "default" are the base model.
            pub model: Option<String>,
            /// Most tokens of the answer.
            pub max_tokens: Option<i64>,
            /// Divides the logits; 0 takes the most likely token, 1 is the default.
            pub temperature: Option<f64>,
            /// Keeps the smallest set of tokens with this probability; 1 keeps all.
            pub top_p: Option<f64>,
            /// Keeps so many most likely tokens; 0 and -1 keep all.
            pub top_k: Option<i64>,
            /// Keeps tokens with at least this share of the best one's probability.
            pub min_p: Option<f64>,
            /// Typical decoding mass; 1 keeps all.
            pub typical_p: Option<f64>,
            /// Above 1 discourages repetition.
            pub repetition_penalty: Option<f64>,
            /// Discourages tokens by their count in the answer; -2 to 2.
            pub frequency_penalty: Option<f64>,
            /// Discourages tokens that the answer has; -2 to 2.
            pub presence_penalty: Option<f64>,
            /// Added to the logits of ids, which are written as strings; -100 to 100.
            pub logit_bias: Option<HashMap<String, f64>>,
            /// Answers to make.
            pub n: Option<i64>,
            /// Makes a sampled answer repeatable.
            #[schema(value_type = Option<i64>)]
            pub seed: Option<Number>,
            /// One string or several that end the answer; they are not part of it.
            pub stop: Option<OneOrMany>,
            /// Whether to answer with events.
            pub stream: Option<bool>,
            /// What a stream says beside the answer.
            pub stream_options: Option<StreamOptions>,
            /// Tokens before the answer may end by itself.
            pub min_tokens: Option<i64>,
            /// Treats end tokens as ordinary ones.
            pub ignore_eos: Option<bool>,
            /// `{"type": "text"}` only.
            #[schema(value_type = Option<Object>)]
            pub response_format: Option<Value>,
            /// The caller's own mark for its user. It has no effect on answers.
            pub user: Option<String>,
            /// The adapter to answer with, where `model` names the base.
            pub adapter_id: Option<String>,
            /// The same as `adapter_id`; "empty" is the base model.
            pub lora_id: Option<String>,
        }

        impl $name {
            /// The fields that both routes share.
            pub fn common(&self) -> Common<'_> {
                Common {
                    model: self.model.as_deref().unwrap_or_default(),
                    adapter_id: self.adapter_id.clone(),
                    lora_id: self.lora_id.clone(),
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    typical_p: self.typical_p,
                    repetition_penalty: self.repetition_penalty,
                    frequency_penalty: self.frequency_penalty,
                    presence_penalty: self.presence_penalty,
                    logit_bias: self.logit_bias.clone().unwrap_or_default(),
                    n: self.n,
                    seed: self.seed.as_ref(),
                    stop: self.stop.clone().map(OneOrMany::into_vec).unwrap_or_default(),
                    stream: self.stream == Some(true),
                    stream_options: self.stream_options.as_ref(),
                    min_tokens: self.min_tokens,
                    ignore_eos: self.ignore_eos == Some(true),
                    response_format: self.response_format.as_ref(),
                }
            }
        }
    };
}

/// The fields that both routes share, absent ones filled in where the absence has one meaning.
#[allow(missing_docs)]
pub struct Common<'a> {
    pub model: &'a str,
    pub adapter_id: Option<String>,
    pub lora_id: Option<String>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub typical_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub logit_bias: HashMap<String, f64>,
    pub n: Option<i64>,
    pub seed: Option<&'a Number>,
    pub stop: Vec<String>,
    pub stream: bool,
    pub stream_options: Option<&'a StreamOptions>,
    pub min_tokens: Option<i64>,
    pub ignore_eos: bool,
    pub response_format: Option<&'a Value>,
}

body! {
    /// Body of `/v1/completions`.
    CompletionBody {
        /// A text, several texts, token ids, or several lists of token ids.
        prompt: PromptField,
        /// Puts the prompt before the answer.
        echo: Option<bool>,
        /// Answers to pick the `n` best from, by mean log-probability; not in streams.
        best_of: Option<i64>,
        /// Alternatives to report with each token; 0 reports the tokens alone.
        logprobs: Option<i64>,
        /// Not supported.
        suffix: Option<String>,
    }
}

body! {
    /// Body of `/v1/chat/completions`.
    ChatBody {
        /// The conversation so far.
        messages: Vec<ChatMessage>,
        /// Most tokens of the answer; the newer name of `max_tokens`.
        max_completion_tokens: Option<i64>,
        /// Whether to report log-probabilities.
        logprobs: Option<bool>,
        /// Alternatives to report with each token.
        top_logprobs: Option<i64>,
        /// Not supported yet.
        #[schema(value_type = Option<Vec<Object>>)]
        tools: Option<Value>,
        /// "none" only.
        #[schema(value_type = Option<String>)]
        tool_choice: Option<Value>,
    }
}

/// One string or a list of them.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

/// Prompts in each form that OpenAI knows.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum PromptField {
    /// One text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// The token ids of one prompt.
    Ids(Vec<i64>),
    /// The token ids of several prompts.
    ManyIds(Vec<Vec<i64>>),
}

/// What a stream says beside the answer.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// Whether a last event tells the usage.
    pub include_usage: Option<bool>,
}

/// One message of a conversation.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    /// "system", "user", "assistant", or what the model's template knows.
    pub role: String,
    /// Its text, or parts of type "text".
    pub content: Option<Content>,
    /// Who speaks, where the template knows names.
    pub name: Option<String>,
    /// Null or empty: tools are not supported yet.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tool_calls: Option<Value>,
    /// Null, as answers carry it.
    pub refusal: Option<String>,
}

/// What a message says.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Parts; those of type "text" are joined, others are refused.
    Parts(Vec<Value>),
}

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
