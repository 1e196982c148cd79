//! Flags for whoever runs the server.

use std::path::PathBuf;

use clap::Args;
use clap::builder::FalseyValueParser;

/// How the server is run and watched.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Operation")]
pub struct Operation {
    /// Print what would be started, and with how much memory, then stop
    #[arg(long, value_parser = FalseyValueParser::new())]
    pub plan: bool,

    /// Log one JSON object per line
    #[arg(long, env, value_parser = FalseyValueParser::new())]
    pub json_output: bool,

    /// Seconds that open answers get to finish after SIGTERM
    #[arg(long, short, env, default_value_t = 90, value_parser = clap::value_parser!(u32).range(0..=86_400))]
    pub graceful_termination_timeout: u32,

    /// Deaths of one process group within ten minutes after which the launcher gives up with exit code 75; 0 never
    #[arg(long, env, default_value_t = 5)]
    pub restart_budget: u32,

    /// Print versions, processor, memory and devices first
    #[arg(long, short, value_parser = FalseyValueParser::new())]
    pub env: bool,

    /// Where downloaded repositories are kept [default: the hub library's own place]
    #[arg(long, env, hide_env_values = true)]
    pub huggingface_hub_cache: Option<PathBuf>,

    /// The same, for weights that an operator has put there beforehand
    #[arg(long, env, hide_env_values = true)]
    pub weights_cache_override: Option<PathBuf>,
}
