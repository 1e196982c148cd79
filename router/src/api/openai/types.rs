//! Bodies of OpenAI's routes. What is not written here is refused by name.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Number, Value};
use utoipa::ToSchema;

/// Declares a body with its own fields and those that both routes share.
macro_rules! body {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[$doc])* pub $field: $type,)*
            /// The base model or an adapter; "", "tgi", "default" and "dummy" are the base model.
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
            /// Treats end tokens as ordinary ones; LoRAX calls it `ignore_eos_token`.
            #[serde(alias = "ignore_eos_token")]
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
            /// Where to load the adapter from if it is not loaded yet, as LoRAX does: `hub` (needs
            /// `--allow-dynamic-lora`) or `local`, beneath `--lora-dir`.
            pub adapter_source: Option<String>,
            /// Not supported: adapters are loaded with the server's own credentials.
            pub api_token: Option<String>,
        }

        impl $name {
            /// The fields that both routes share.
            pub fn common(&self) -> Common<'_> {
                Common {
                    model: self.model.as_deref().unwrap_or_default(),
                    adapter_id: self.adapter_id.clone(),
                    lora_id: self.lora_id.clone(),
                    adapter_source: self.adapter_source.as_deref(),
                    api_token: self.api_token.as_deref(),
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
    pub adapter_source: Option<&'a str>,
    pub api_token: Option<&'a str>,
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
#[serde(untagged, expecting = "expected a string or a list of strings")]
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
#[serde(
    untagged,
    expecting = "expected a text, texts, token ids or lists of token ids"
)]
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
    /// Its text, or parts of it and images.
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
#[serde(untagged, expecting = "expected a text or a list of parts")]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Parts of type "text", and of type "image_url" for models that take images; `detail` has no effect.
    Parts(Vec<Value>),
}
