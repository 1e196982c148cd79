//! Flags that say where the server listens and who may call it.

use std::path::PathBuf;

use clap::Args;
use clap::builder::FalseyValueParser;

use super::Secret;

/// Address and access.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Network")]
pub struct Network {
    /// Address to listen on. It is 127.0.0.1 unless set; text-generation-inference listens on 0.0.0.0, which here
    /// needs an API key or --allow-unauthenticated. From the environment (HOSTNAME) only an IP address or `localhost`
    /// is taken, because shells and containers keep the machine's name there
    #[arg(long, value_name = "ADDRESS")]
    pub hostname: Option<String>,

    /// Port to listen on; 0 takes a free one
    #[arg(long, short, env, default_value_t = 3000)]
    pub port: u16,

    /// Port for /metrics alone, beside the main one, which serves it too
    #[arg(long, env)]
    pub prometheus_port: Option<u16>,

    /// Origins that browsers may call from; repeat the flag or write a comma list
    #[arg(long, env, value_delimiter = ',')]
    pub cors_allow_origin: Vec<String>,

    /// Keys that callers must show, as a comma list. Better set in the environment or by --api-key-file: arguments
    /// can be read by every user of the machine
    #[arg(long, env, hide_env_values = true)]
    pub api_key: Option<Secret>,

    /// File with one key per line
    #[arg(long, env, hide_env_values = true)]
    pub api_key_file: Option<PathBuf>,

    /// Keys for loading, pinning and unloading adapters, as a comma list. Where one is set, callers with other keys
    /// cannot do that; they do all else. Better set in the environment or by --admin-api-key-file
    #[arg(long, env, hide_env_values = true)]
    pub admin_api_key: Option<Secret>,

    /// File with one admin key per line
    #[arg(long, env, hide_env_values = true)]
    pub admin_api_key_file: Option<PathBuf>,

    /// Serve a public address without any key
    #[arg(long, env, value_parser = FalseyValueParser::new())]
    pub allow_unauthenticated: bool,
}
