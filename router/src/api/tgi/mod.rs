//! text-generation-inference's routes: `/generate`, `/generate_stream`, `/`, `/tokenize`, `/chat_tokenize`.

pub mod generate;
mod parameters;
pub mod tokenize;
pub mod types;
