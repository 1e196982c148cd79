//! Flags and environment of `text-generation-router`; nothing else reads either.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::api::Settings;
use crate::api::auth::Keys;
use crate::api::request::Source;
use crate::engine::Overlap;
use crate::images::ImageSettings;
use crate::request::AdapterSpec;

/// Serves text generation over HTTP from the model shards behind a set of unix sockets.
#[derive(Parser, Debug, Clone)]
#[command(
    name = "text-generation-router",
    version,
    disable_help_subcommand = true
)]
pub struct Args {
    /// Address to listen on; one that others can reach needs an API key. Not read from HOSTNAME, which containers set
    #[arg(long, default_value = "127.0.0.1")]
    pub hostname: String,
    /// Port to listen on
    #[arg(long, short, env, default_value_t = 3000)]
    pub port: u16,
    /// Number of an open, listening socket to use instead; whoever opened it answers for its address
    #[arg(long)]
    pub http_fd: Option<RawFd>,
    /// Number of an open socket that takes messages for the launcher
    #[arg(long)]
    pub control_fd: Option<RawFd>,
    /// Number of an open pipe whose end means that the launcher is gone
    #[arg(long, env = "KVRUN_DEATH_FD", hide = true)]
    pub death_fd: Option<RawFd>,
    /// Port of a listener for /metrics alone
    #[arg(long, env)]
    pub prometheus_port: Option<u16>,
    /// Shard sockets are this path with -0, -1, ... appended
    #[arg(
        long,
        env,
        alias = "master-shard-uds-path",
        default_value = "/tmp/text-generation-server"
    )]
    pub shard_uds_path: PathBuf,
    /// How many shards there are
    #[arg(long, env, default_value_t = 1)]
    pub num_shard: u32,
    /// Folder with tokenizer.json and tokenizer_config.json
    #[arg(long, env)]
    pub tokenizer_name: PathBuf,
    /// Name of the base model; by default the tokenizer's folder
    #[arg(long, env)]
    pub model_id: Option<String>,
    /// Revision of the base model on the hub
    #[arg(long, env)]
    pub revision: Option<String>,
    /// Adapters to load at the start: name=folder;name=folder
    #[arg(long, env, default_value = "")]
    pub lora_adapters: String,
    /// Folder beneath which adapters may be loaded over HTTP
    #[arg(long, env)]
    pub lora_dir: Option<PathBuf>,
    /// Lets requests fetch adapters from the hub
    #[arg(long, env)]
    pub allow_dynamic_lora: bool,
    /// Where an adapter that is not loaded is loaded from when its request does not say
    #[arg(long, env, value_enum)]
    pub default_adapter_source: Option<Source>,

    /// Most answers under way or waiting
    #[arg(long, env, default_value_t = 128)]
    pub max_concurrent_requests: u32,
    /// Longest prompt in tokens
    #[arg(long, env, alias = "max-input-length")]
    pub max_input_tokens: Option<u32>,
    /// Most tokens of prompt and answer together; by default what model and memory allow
    #[arg(long, env)]
    pub max_total_tokens: Option<u32>,
    /// Most tokens computed in one step; by default 512, or as many as the longest source that an encoder reads at once
    #[arg(long, env, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_batch_prefill_tokens: Option<u32>,
    /// Tokens of KV cache; by default what memory allows
    #[arg(long, env)]
    pub max_batch_total_tokens: Option<u64>,
    /// Most requests computed in one step
    #[arg(long, env, default_value_t = 128)]
    pub max_batch_size: u32,
    /// Most answers that `best_of` picks from
    #[arg(long, env, default_value_t = 2)]
    pub max_best_of: usize,
    /// Most stop strings of a request
    #[arg(long, env, default_value_t = 4)]
    pub max_stop_sequences: usize,
    /// Most alternatives per token on TGI's routes
    #[arg(long, env, default_value_t = 5)]
    pub max_top_n_tokens: u32,
    /// Most answers of one request
    #[arg(long, env, default_value_t = 4)]
    pub max_client_batch_size: usize,
    /// Largest body in bytes
    #[arg(long, env, default_value_t = 2_000_000)]
    pub payload_limit: usize,
    /// Fetches images of requests from other servers, public addresses only; `data:` URLs are always taken
    #[arg(long, env)]
    pub allow_remote_images: bool,
    /// Largest image in bytes; one in a body must fit --payload-limit too
    #[arg(long, env, default_value_t = 10 << 20)]
    pub max_image_fetch_size: usize,
    /// Tokenizer threads
    #[arg(long, env, default_value_t = 2)]
    pub validation_workers: usize,
    /// Longest time of a request, in seconds
    #[arg(long, env, default_value_t = 600)]
    pub request_timeout: u64,
    /// Lets API keys share cached prefixes with each other
    #[arg(long, env)]
    pub share_prefix_cache: bool,
    /// Tokens of a sequence that one step computes on a guess, looked up in its own text; 0 = none
    #[arg(long, env, default_value_t = 0)]
    pub speculate: u32,
    /// Plans and sends the next step while the shards compute one; auto: where they do not compute on the CPU
    #[arg(long, env, value_enum, default_value_t)]
    pub overlap: Overlap,

    /// API keys, comma between them; from the environment only, as arguments are visible to others
    #[arg(
        long = "api-key-from-environment",
        env = "API_KEY",
        hide = true,
        hide_env_values = true,
        default_value = ""
    )]
    pub api_keys: String,
    /// File with one API key per line
    #[arg(long, env)]
    pub api_key_file: Option<PathBuf>,
    /// Keys for loading, pinning and unloading adapters, comma between them; from the environment only
    #[arg(
        long = "admin-api-key-from-environment",
        env = "ADMIN_API_KEY",
        hide = true,
        hide_env_values = true,
        default_value = ""
    )]
    pub admin_api_keys: String,
    /// File with one admin key per line; where there is one (or ADMIN_API_KEY), API keys load, pin and unload no adapter
    #[arg(long, env)]
    pub admin_api_key_file: Option<PathBuf>,
    /// Serves others without an API key
    #[arg(long, env)]
    pub allow_unauthenticated: bool,
    /// Origins whose pages may ask, comma between them
    #[arg(long, env, value_delimiter = ',')]
    pub cors_allow_origin: Vec<String>,
    /// Logs in JSON
    #[arg(long, env)]
    pub json_output: bool,
    /// What is logged, e.g. info or kvrun_router=debug
    #[arg(long, env = "LOG_LEVEL", default_value = "info")]
    pub log_level: String,
    /// Seconds that open answers get after SIGTERM
    #[arg(long, short, env, default_value_t = 90)]
    pub graceful_termination_timeout: u64,

    /// Accepted for old start scripts; steps are filled by one token budget
    #[arg(long, env)]
    pub waiting_served_ratio: Option<f32>,
    /// Accepted for old start scripts; steps are filled by one token budget
    #[arg(long, env)]
    pub max_waiting_tokens: Option<u32>,
    /// Accepted for old start scripts; there are no grammars yet
    #[arg(long, env)]
    pub disable_grammar_support: bool,
    /// Accepted for old start scripts; log-probabilities of prompts are always available
    #[arg(long, env)]
    pub enable_prefill_logprobs: bool,
    /// Accepted for old start scripts; nothing is ever sent home
    #[arg(long, env)]
    pub usage_stats: Option<String>,
}

/// A combination of flags that cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl Args {
    /// One socket per rank.
    pub fn sockets(&self) -> Vec<PathBuf> {
        let prefix = self.shard_uds_path.display();
        (0..self.num_shard)
            .map(|rank| PathBuf::from(format!("{prefix}-{rank}")))
            .collect()
    }

    /// The name of the base model.
    pub fn model_name(&self) -> String {
        self.model_id
            .clone()
            .unwrap_or_else(|| self.tokenizer_name.display().to_string())
    }

    /// The adapters to load at the start.
    pub fn adapters(&self) -> Result<Vec<AdapterSpec>, ConfigError> {
        let entries = self
            .lora_adapters
            .split(';')
            .map(str::trim)
            .filter(|entry| !entry.is_empty());
        entries
            .map(|entry| match entry.split_once('=') {
                Some((name, path)) if !name.is_empty() && !path.is_empty() => Ok(AdapterSpec {
                    name: name.to_owned(),
                    path: path.into(),
                    pinned: false,
                }),
                _ => Err(ConfigError(format!(
                    "--lora-adapters holds `{entry}`; write name=folder"
                ))),
            })
            .collect()
    }

    /// Where to listen, once it is certain that strangers cannot come in by accident.
    pub fn address(&self, keys: &Keys) -> Result<SocketAddr, ConfigError> {
        let host = self.hostname.trim_matches(['[', ']']);
        let address = match host.parse::<IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, self.port),
            Err(_) => (host, self.port)
                .to_socket_addrs()
                .ok()
                .and_then(|mut found| found.next())
                .ok_or_else(|| {
                    ConfigError(format!("--hostname {host} is no address of this machine"))
                })?,
        };
        if !address.ip().is_loopback() && keys.is_open() && !self.allow_unauthenticated {
            return Err(ConfigError(format!(
                "--hostname {host} lets others in and there is no API key; set API_KEY or --api-key-file, or add \
                 --allow-unauthenticated"
            )));
        }
        Ok(address)
    }

    /// The API keys of environment and file.
    pub fn keys(&self) -> Result<Keys, ConfigError> {
        read_keys(&self.api_keys, &self.api_key_file, "--api-key-file")
    }

    /// The admin keys of environment and file.
    pub fn admin_keys(&self) -> Result<Keys, ConfigError> {
        let file = &self.admin_api_key_file;
        read_keys(&self.admin_api_keys, file, "--admin-api-key-file")
    }

    /// How the HTTP side behaves.
    pub fn settings(&self, keys: Keys, admin_keys: Keys) -> Settings {
        Settings {
            model_id: self.model_name(),
            model_revision: self.revision.clone(),
            max_input_tokens: self.max_input_tokens,
            max_concurrent_requests: self.max_concurrent_requests.max(1) as usize,
            max_best_of: self.max_best_of,
            max_stop_sequences: self.max_stop_sequences,
            max_top_n_tokens: self.max_top_n_tokens,
            max_client_batch_size: self.max_client_batch_size.max(1),
            payload_limit: self.payload_limit,
            validation_workers: self.validation_workers.max(1),
            images: ImageSettings {
                remote: self.allow_remote_images,
                bytes: self.max_image_fetch_size,
                reachable: Vec::new(),
            },
            request_timeout: Duration::from_secs(self.request_timeout.max(1)),
            keys,
            admin_keys,
            cors_origins: self.cors_allow_origin.clone(),
            lora_dir: self.lora_dir.clone(),
            allow_dynamic_lora: self.allow_dynamic_lora,
            default_adapter_source: self.default_adapter_source,
            download_program: sibling("text-generation-server"),
        }
    }

    /// What to say about flags that have no effect any more.
    pub fn obsolete(&self) -> Vec<&'static str> {
        let flags = [
            (
                self.waiting_served_ratio.is_some(),
                "--waiting-served-ratio",
            ),
            (self.max_waiting_tokens.is_some(), "--max-waiting-tokens"),
            (self.disable_grammar_support, "--disable-grammar-support"),
            (self.enable_prefill_logprobs, "--enable-prefill-logprobs"),
            (self.usage_stats.is_some(), "--usage-stats"),
        ];
        flags
            .into_iter()
            .filter(|(given, _)| *given)
            .map(|(_, name)| name)
            .collect()
    }
}

/// Keys of a comma list and of a file, which must hold some if it is named.
fn read_keys(list: &str, file: &Option<PathBuf>, flag: &str) -> Result<Keys, ConfigError> {
    let text = match file {
        Some(path) => std::fs::read_to_string(path).map_err(|error| {
            ConfigError(format!("{flag} {} cannot be read: {error}", path.display()))
        })?,
        None => String::new(),
    };
    if file.is_some() && Keys::new(text.lines()).is_open() {
        return Err(ConfigError(format!(
            "{flag} holds no key; write one per line"
        )));
    }
    Ok(Keys::new(list.split(',').chain(text.lines())))
}

/// A program that is installed beside this one.
fn sibling(name: &str) -> PathBuf {
    let own = std::env::current_exe().ok();
    let beside = own
        .as_deref()
        .and_then(|path| path.parent())
        .map(|folder| folder.join(name));
    beside.unwrap_or_else(|| name.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Args {
        let words = ["router", "--tokenizer-name", "/m"]
            .into_iter()
            .chain(line.split_whitespace());
        Args::try_parse_from(words).unwrap()
    }

    #[test]
    fn strangers_need_a_key_or_an_express_permission() {
        let open = Keys::default();
        let locked = Keys::new(["secret"]);
        assert!(args("--hostname 127.0.0.1").address(&open).is_ok());
        assert!(args("--hostname [::1]").address(&open).is_ok());
        assert!(args("--hostname 0.0.0.0").address(&open).is_err());
        assert!(args("--hostname 0.0.0.0").address(&locked).is_ok());
        assert!(
            args("--hostname :: --allow-unauthenticated")
                .address(&open)
                .is_ok()
        );
    }

    #[test]
    fn adapters_and_sockets_are_lists() {
        let args = args("--lora-adapters a=/x;b=/y=z --num-shard 2 --shard-uds-path /run/shard");
        let adapters = args.adapters().unwrap();
        assert_eq!(adapters[1].name, "b");
        assert_eq!(adapters[1].path, PathBuf::from("/y=z"));
        assert_eq!(
            args.sockets(),
            [PathBuf::from("/run/shard-0"), PathBuf::from("/run/shard-1")]
        );
    }

    #[test]
    fn an_adapter_without_folder_is_refused() {
        let error = args("--lora-adapters a")
            .adapters()
            .unwrap_err()
            .to_string();
        assert!(error.contains("name=folder"), "{error}");
    }

    #[test]
    fn old_flags_are_named() {
        assert_eq!(
            args("--waiting-served-ratio 1.2 --max-waiting-tokens 20").obsolete(),
            ["--waiting-served-ratio", "--max-waiting-tokens"]
        );
    }
}
