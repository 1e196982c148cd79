//! What every dialect turns its bodies into: one request for text, not yet checked.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

/// What the answer continues.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Text to tokenize.
    Text {
        /// The text.
        text: String,
        /// Whether the tokenizer adds the model's own tokens, e.g. at the beginning.
        add_special: bool,
    },
    /// Text that has the model's own marker in the place of each image.
    Marked {
        /// The text.
        text: String,
        /// Where the images are, in their order.
        urls: Vec<String>,
    },
    /// Token ids as they are.
    Ids(Vec<i64>),
}

impl Prompt {
    /// The text; empty for ids.
    pub fn text(&self) -> &str {
        match self {
            Self::Text { text, .. } | Self::Marked { text, .. } => text,
            Self::Ids(_) => "",
        }
    }
}

/// Where an adapter is loaded from when a request asks for one that is not loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Source {
    /// A repository, with `--allow-dynamic-lora`.
    Hub,
    /// A folder beneath `--lora-dir`.
    Local,
}

/// What a dialect calls the fields that messages speak of.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// The prompt.
    pub prompt: &'static str,
    /// The adapter.
    pub adapter: &'static str,
    /// The most tokens of the answer.
    pub max_new_tokens: &'static str,
    /// What asks for log-probabilities of the prompt.
    pub prompt_logprobs: &'static str,
}

/// How tokens are chosen, as asked; `None` is "off" or "as the model is".
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SamplingFields {
    /// Whether to sample at all; otherwise the most likely token is taken.
    pub sample: bool,
    /// Divides the logits; 1 when `None`.
    pub temperature: Option<f64>,
    /// Keeps the most likely tokens.
    pub top_k: Option<i64>,
    /// Keeps the smallest set of tokens with this probability.
    pub top_p: Option<f64>,
    /// Keeps tokens whose surprise is near the expected one.
    pub typical_p: Option<f64>,
    /// Keeps tokens with at least this share of the best one's probability.
    pub min_p: Option<f64>,
    /// Above 1 makes tokens of prompt and answer less likely.
    pub repetition_penalty: Option<f64>,
    /// Makes tokens of the answer less likely by their count.
    pub frequency_penalty: Option<f64>,
    /// Makes tokens of the answer less likely once they occur.
    pub presence_penalty: Option<f64>,
    /// Added to the logits of ids, written as decimal strings.
    pub logit_bias: HashMap<String, f64>,
    /// Makes a sampled answer repeatable.
    pub seed: Option<u64>,
}

/// A request for one or several answers to one prompt.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// The adapter's name; `None` is the base model.
    pub adapter: Option<String>,
    /// Where the adapter is loaded from when it is not there yet; `None` then refuses the request.
    pub adapter_source: Option<Source>,
    /// How tokens are chosen.
    pub sampling: SamplingFields,
    /// Most tokens of the answer; `None` takes the default.
    pub max_new_tokens: Option<i64>,
    /// The default; `None` is as many as fit.
    pub default_max_new_tokens: Option<u32>,
    /// Tokens before the answer may end by itself.
    pub min_new_tokens: Option<i64>,
    /// Keeps only this many tokens at the prompt's end.
    pub truncate: Option<i64>,
    /// Strings that end the answer.
    pub stop: Vec<String>,
    /// Whether the string that ended the answer is its end, as on TGI's routes, or no part of it, as on OpenAI's.
    pub keep_stop: bool,
    /// Whether end tokens are ordinary ones.
    pub ignore_eos: bool,
    /// Alternatives to report with each token.
    pub top_logprobs: u32,
    /// Whether to report log-probabilities of the prompt.
    pub prompt_logprobs: bool,
    /// What the dialect calls things.
    pub names: Names,
}

/// Who asks, and since when.
#[derive(Debug, Clone)]
pub struct Caller {
    /// A digest of the API key, or "anonymous".
    pub tenant: Arc<str>,
    /// Whether adapters may be loaded, pinned and unloaded.
    pub administers: bool,
    /// The request's own id, also in logs and the `x-request-id` header.
    pub request_id: Arc<str>,
    /// When its headers were read.
    pub arrived: Instant,
    /// After this moment no answer is wanted.
    pub deadline: Instant,
    /// The matched route, for metrics.
    pub route: Arc<str>,
}
