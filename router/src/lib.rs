//! The router: HTTP on one side, model shards on the other, one running batch between them.
//!
//! [`api`] turns bodies into requests and answers into events; [`engine`] owns the scheduler and the shards;
//! [`request`] is the border between them. [`server`] accepts connections; [`args`] alone reads flags and environment.

pub mod api;
pub mod args;
pub mod capabilities;
mod control;
pub mod engine;
pub mod images;
mod inherited;
pub mod metrics;
mod patience;
pub mod request;
mod run;
pub mod server;

pub use run::{Listeners, run, run_from_args, run_with};
