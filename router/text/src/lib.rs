//! Text in and out of token ids: tokenizing in a pool, detokenizing as tokens come, stop strings, chat templates.
//!
//! Nothing here knows HTTP, the scheduler or the shard, and nothing here reads a clock or the environment.

mod detokenize;
mod pool;
mod stop;
mod strftime;
mod template;
mod tokenizer;

pub use detokenize::Detokenizer;
pub use pool::{EncodeError, TokenizerPool};
pub use stop::{Pushed, StopMatcher};
pub use template::{ChatTemplates, LoadError as TemplateLoadError, TemplateError};
pub use tokenizer::{Encoded, LoadError, Tokenizer};
