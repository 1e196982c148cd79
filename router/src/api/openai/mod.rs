//! OpenAI's routes: `/v1/chat/completions`, `/v1/completions`, `/v1/models`.

pub mod answers;
pub mod chat;
pub mod completions;
mod conversation;
mod fields;
pub mod models;
mod streams;
pub mod types;

pub use fields::unix_seconds;
