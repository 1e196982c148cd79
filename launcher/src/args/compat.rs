//! Flags of text-generation-inference that have no effect here, each with the reason.
//!
//! They are accepted so that an existing start command works unchanged. A flag whose absence would change what the
//! operator gets is refused instead.

use clap::Args;
use clap::builder::FalseyValueParser;

/// Flags kept for their name only. All are hidden from `--help`.
#[derive(Debug, Clone, Default, Args)]
pub struct Compat {
    #[arg(long, env, hide = true, value_parser = FalseyValueParser::new())]
    trust_remote_code: bool,
    #[arg(long, env, hide = true)]
    rope_scaling: Option<String>,
    #[arg(long, env, hide = true)]
    rope_factor: Option<f32>,
    #[arg(long, env, hide = true)]
    tokenizer_config_path: Option<String>,
    #[arg(long, env, hide = true, value_parser = FalseyValueParser::new())]
    disable_custom_kernels: bool,
    #[arg(long, env, hide = true)]
    shard_uds_path: Option<String>,
    #[arg(long, env, hide = true)]
    master_addr: Option<String>,
    #[arg(long, env, hide = true)]
    master_port: Option<u32>,
    #[arg(long, env, hide = true, value_parser = FalseyValueParser::new())]
    enable_prefill_logprobs: bool,
    #[arg(long, env, hide = true, value_parser = FalseyValueParser::new())]
    disable_grammar_support: bool,
    #[arg(long, env, hide = true)]
    waiting_served_ratio: Option<f32>,
    #[arg(long, env, hide = true)]
    max_waiting_tokens: Option<u32>,
    #[arg(long, env, hide = true, value_parser = FalseyValueParser::new())]
    ngrok: bool,
    #[arg(long, env, hide = true, hide_env_values = true)]
    ngrok_authtoken: Option<super::Secret>,
    #[arg(long, env, hide = true)]
    ngrok_edge: Option<String>,
    #[arg(long, env, hide = true)]
    otlp_endpoint: Option<String>,
    #[arg(long, env, hide = true)]
    otlp_service_name: Option<String>,
    #[arg(long, env, hide = true)]
    usage_stats: Option<String>,
    #[arg(long, env, hide = true)]
    watermark_gamma: Option<f32>,
    #[arg(long, env, hide = true)]
    watermark_delta: Option<f32>,
}

/// What becomes of a flag that has no effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// The server starts; the remark is logged once.
    Accepted {
        flag: &'static str,
        remark: &'static str,
    },
    /// The server does not start.
    Refused {
        flag: &'static str,
        reason: &'static str,
    },
}

impl Compat {
    /// The fate of every flag that was set, in the order of the flags.
    pub fn fates(&self) -> Vec<Fate> {
        let accepted = |set: bool, flag, remark| set.then_some(Fate::Accepted { flag, remark });
        let refused = |set: bool, flag, reason| set.then_some(Fate::Refused { flag, reason });
        [
            accepted(
                self.trust_remote_code,
                "--trust-remote-code",
                "code from a model's repository is never run; its architecture must be one of the built-in ones",
            ),
            refused(
                self.rope_scaling.is_some() || self.rope_factor.is_some(),
                "--rope-scaling, --rope-factor",
                "the positions are read from the model; set rope_scaling in its config.json",
            ),
            refused(
                self.tokenizer_config_path.is_some(),
                "--tokenizer-config-path",
                "the tokenizer's configuration is read from the model; put tokenizer_config.json into its folder",
            ),
            accepted(
                self.disable_custom_kernels,
                "--disable-custom-kernels",
                "kernels are chosen by what the processor has, and fall back by themselves",
            ),
            accepted(
                self.shard_uds_path.is_some(),
                "--shard-uds-path",
                "sockets lie in a private folder of this instance, so that two instances never meet",
            ),
            accepted(
                self.master_addr.is_some() || self.master_port.is_some(),
                "--master-addr, --master-port",
                "the processes of one machine meet over a file of this instance",
            ),
            accepted(
                self.enable_prefill_logprobs,
                "--enable-prefill-logprobs",
                "log-probabilities of the prompt are always available",
            ),
            accepted(
                self.disable_grammar_support,
                "--disable-grammar-support",
                "a grammar costs nothing unless a request brings one",
            ),
            accepted(
                self.waiting_served_ratio.is_some() || self.max_waiting_tokens.is_some(),
                "--waiting-served-ratio, --max-waiting-tokens",
                "every step has one budget of tokens, so nothing waits for a ratio",
            ),
            refused(
                self.ngrok || self.ngrok_authtoken.is_some() || self.ngrok_edge.is_some(),
                "--ngrok",
                "the server opens no tunnels; run one beside it",
            ),
            accepted(
                self.otlp_endpoint.is_some() || self.otlp_service_name.is_some(),
                "--otlp-endpoint, --otlp-service-name",
                "no traces are sent; see /metrics",
            ),
            accepted(self.usage_stats.is_some(), "--usage-stats", "nothing is ever sent"),
            accepted(
                self.watermark_gamma.is_some() || self.watermark_delta.is_some(),
                "--watermark-gamma, --watermark-delta",
                "no watermark is written into answers",
            ),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}
