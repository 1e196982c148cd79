//! Flags that bound a request, a batch and a queue.

use clap::Args;

use super::Overlap;

/// Bounds of requests and of the batch. Those left out are sized by the plan.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Limits")]
pub struct Limits {
    /// Requests that may be open at the same time; one more is answered with 429
    #[arg(long, env, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_concurrent_requests: u32,

    /// Largest `best_of` of a request to text-generation-inference's routes
    #[arg(long, env, default_value_t = 2)]
    pub max_best_of: u32,

    /// Most stop strings of a request
    #[arg(long, env, default_value_t = 4)]
    pub max_stop_sequences: u32,

    /// Most alternatives per token that a request may ask for
    #[arg(long, env, default_value_t = 5)]
    pub max_top_n_tokens: u32,

    /// Longest prompt, in tokens [default: one less than --max-total-tokens]
    #[arg(long, env, alias = "max-input-length", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_input_tokens: Option<u32>,

    /// Longest prompt and answer together, in tokens [default: the model's window, if the KV cache can hold it]
    #[arg(long, env, value_parser = clap::value_parser!(u32).range(2..))]
    pub max_total_tokens: Option<u32>,

    /// Most answers of one request: its prompts times `n` or `best_of`
    #[arg(long, env, default_value_t = 4)]
    pub max_client_batch_size: u32,

    /// Largest request body, in bytes
    #[arg(long, env, default_value_t = 2_000_000)]
    pub payload_limit: u64,

    /// Fetch images of requests from other servers, public addresses only; `data:` URLs are always taken
    #[arg(long, env, value_parser = clap::builder::FalseyValueParser::new())]
    pub allow_remote_images: bool,

    /// Largest image, in bytes; one within a body must fit --payload-limit too [default: 10 MiB]
    #[arg(long, env)]
    pub max_image_fetch_size: Option<u64>,

    /// Threads that tokenize and validate prompts
    #[arg(long, env, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub validation_workers: u32,

    /// Most prompt tokens computed in one step [default: chosen by the router]
    #[arg(long, env, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_batch_prefill_tokens: Option<u32>,

    /// Most tokens in the KV cache at once [default: all that it holds]
    #[arg(long, env, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_batch_total_tokens: Option<u32>,

    /// Longest time of a request, in seconds
    #[arg(long, env, default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    pub request_timeout: u32,

    /// Let API keys share cached prefixes with each other
    #[arg(long, env, value_parser = clap::builder::FalseyValueParser::new())]
    pub share_prefix_cache: bool,

    /// Tokens of a sequence that one step computes on a guess, looked up in its own text; answers stay the same
    #[arg(long, env, alias = "speculative-tokens")]
    pub speculate: Option<u32>,

    /// Plan and send the next step while the model computes one; `auto` does where it does not compute on the CPU
    #[arg(long, env, value_enum, default_value_t = Overlap::Auto)]
    pub overlap: Overlap,

    /// Most sequences in one step [default: chosen by the router]
    #[arg(long, env, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_batch_size: Option<u32>,
}

/// Reads `512MiB`, `2GB`, `1.5g` or a plain number of bytes; `K`, `M`, `G`, `T` alone count in powers of 1024.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    let complaint =
        || format!("`{text}` is no amount of memory; write it as 512MiB, 2GB or a number of bytes");
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| complaint())?;
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(complaint()),
    };
    let amount = number * factor;
    // 2^53: beyond it a double no longer counts single bytes, and no machine has that much.
    if !(1.0..=9_007_199_254_740_992.0).contains(&amount) {
        return Err(complaint());
    }
    Ok(amount as u64)
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn amounts_of_memory_are_read_with_their_units() {
        for (text, amount) in [
            ("1", 1),
            ("512MiB", 512 << 20),
            ("2g", 2 << 30),
            ("1.5 GiB", 3 << 29),
            ("2GB", 2_000_000_000),
        ] {
            assert_eq!(bytes(text), Ok(amount), "{text}");
        }
    }

    #[test]
    fn what_is_no_amount_is_refused() {
        for text in [
            "",
            "-1",
            "0",
            "1 parsec",
            "nan",
            "inf",
            "1e9",
            "..",
            "99999999TiB",
            "GiB",
        ] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
