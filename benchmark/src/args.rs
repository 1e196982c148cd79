//! Flags of `text-generation-benchmark`; nothing else reads them or the environment.

use clap::{Parser, ValueEnum};

/// Measure a running server: time to first token, time between tokens, tokens per second.
///
/// Asks over HTTP, as its users do. Prompts differ from request to request, so a prefix cache gains nothing.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "text-generation-benchmark",
    version,
    args_override_self = true,
    max_term_width = 110
)]
pub struct Args {
    /// Where the server listens
    #[arg(long, default_value = "http://127.0.0.1:3000")]
    pub url: String,

    /// The routes to ask
    #[arg(long, value_enum, default_value_t = Api::Tgi)]
    pub api: Api,

    /// Name of the model for --api openai, where an adapter's name does not stand in its place; `tgi` is the base model of
    /// kv.run and text-generation-inference, whatever it is called
    #[arg(long, default_value = "tgi")]
    pub model: String,

    /// Key to show to the server
    #[arg(long, env, hide_env_values = true, default_value = "")]
    pub api_key: String,

    /// Numbers of requests under way at the same time, one measurement each
    #[arg(long, short, value_delimiter = ',', default_value = "1,2,4,8,16,32", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch_size: Vec<u32>,

    /// Tokens in each prompt, as near as the server's tokenizer allows
    #[arg(long, short, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub sequence_length: u32,

    /// Tokens to generate for each prompt
    #[arg(long, short, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub decode_length: u32,

    /// Requests that each of the simultaneous callers makes, one after the other
    #[arg(long, short, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub runs: u32,

    /// Such requests before the measurement
    #[arg(long, short, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub warmups: u32,

    /// Send this many requests a second at random moments, whether or not earlier ones are answered, in place of
    /// waiting callers. --batch-size then bounds those under way, and --runs times it is how many are sent
    #[arg(long, value_parser = positive)]
    pub rate: Option<f64>,

    /// Adapters to spread the requests over, in turn; `base` among them means none
    #[arg(long, value_delimiter = ',')]
    pub adapters: Vec<String>,

    /// Sample instead of taking the likeliest token
    #[arg(long)]
    pub do_sample: bool,
    /// Softens (> 1) or sharpens (< 1) the choice
    #[arg(long, value_parser = positive)]
    pub temperature: Option<f64>,
    /// Choose among this many likeliest tokens
    #[arg(long)]
    pub top_k: Option<u32>,
    /// Choose among the likeliest tokens that together have this probability
    #[arg(long)]
    pub top_p: Option<f64>,
    /// Choose among tokens of typical information content
    #[arg(long)]
    pub typical_p: Option<f64>,
    /// Divides the logits of tokens that have occurred
    #[arg(long)]
    pub repetition_penalty: Option<f64>,
    /// Lowers the logits of tokens by how often they occurred
    #[arg(long)]
    pub frequency_penalty: Option<f64>,

    /// First number of the random prompts; the same number asks the same
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// How to write the result to standard output
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub output: Output,

    /// Write lines instead of drawing; so it is where standard output is no terminal
    #[arg(long)]
    pub no_tui: bool,

    /// Accepted for old scripts: prompts are measured with the server's own tokenizer
    #[arg(long, short, env, hide = true)]
    pub tokenizer_name: Option<String>,
}

/// Which routes are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Api {
    /// `/generate_stream`
    Tgi,
    /// `/v1/completions`
    Openai,
}

/// How the result is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For a terminal.
    Table,
    /// For a page.
    Markdown,
    /// For a program.
    Json,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err(format!("`{text}` is not a number above 0")),
    }
}
