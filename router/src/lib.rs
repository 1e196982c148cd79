//! Placeholder.

pub mod engine;
pub mod request;
