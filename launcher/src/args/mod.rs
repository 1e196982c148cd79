//! What was asked for on the command line and in the environment; nothing outside this folder reads either.
//!
//! Every flag of text-generation-inference's launcher has its place here, with its name and its environment variable:
//! kept, mapped, or (in [`compat`]) accepted with a remark or refused with the reason; LoRAX's own are in [`lorax`].

pub mod compat;
mod environment;
mod limits;
pub mod lorax;
mod model;
mod network;
mod operation;

pub use compat::Compat;
pub use environment::{Environment, is_forwarded_to_shards};
pub use limits::Limits;
pub use lorax::Lorax;
pub use model::{
    ActivationDtype, AdapterSource, Attention, Device, Dtype, GraphSizes, KvCacheDtype, Model,
    Overlap, Quantize, Sharding,
};
pub use network::Network;
pub use operation::Operation;

use std::fmt;
use std::str::FromStr;

use clap::{CommandFactory, Parser};

/// Serve a large language model, and many LoRA adapters of it, from one command.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "text-generation-launcher",
    version,
    max_term_width = 110,
    args_override_self = true
)]
pub struct Args {
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub sharding: Sharding,
    #[command(flatten)]
    pub limits: Limits,
    #[command(flatten)]
    pub network: Network,
    #[command(flatten)]
    pub operation: Operation,
    #[command(flatten)]
    pub compat: Compat,
    #[command(flatten)]
    pub lorax: Lorax,
}

impl Args {
    /// The environment variables that flags are read from. Children never inherit them: they get flags instead.
    pub fn variables() -> Vec<String> {
        let command = Self::command();
        let names = command.get_arguments().filter_map(|flag| flag.get_env());
        let names = names.map(|name| name.to_string_lossy().into_owned());
        names
            .chain(
                environment::OTHER_NAMES
                    .iter()
                    .map(|(other, _)| (*other).to_owned()),
            )
            .collect()
    }
}

/// A text that is never printed: not by `{:?}`, not in a log, not in another process's arguments.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The secret itself, for the one place that hands it on.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}
