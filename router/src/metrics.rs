//! Names of everything that is measured, and the page that Prometheus reads.
//!
//! `tgi_` names keep the dashboards of text-generation-inference alive; `kvrun_` names are what it did not measure.

use std::collections::HashSet;
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::engine::Engine;
use crate::request::AdapterState;

/// Requests that reached a generating route; label `method`.
pub const REQUEST_COUNT: &str = "tgi_request_count";
/// Answers that were completed; label `method`.
pub const REQUEST_SUCCESS: &str = "tgi_request_success";
/// Requests refused or failed; label `err`.
pub const REQUEST_FAILURE: &str = "tgi_request_failure";
/// Seconds from the request's arrival to the end of its answer.
pub const REQUEST_DURATION: &str = "tgi_request_duration";
/// Seconds spent on checking and tokenizing.
pub const VALIDATION_DURATION: &str = "tgi_request_validation_duration";
/// Seconds from admission to the first scheduled row.
pub const QUEUE_DURATION: &str = "tgi_request_queue_duration";
/// Seconds from the first scheduled row to the end.
pub const INFERENCE_DURATION: &str = "tgi_request_inference_duration";
/// Seconds of inference per generated token.
pub const TOKEN_DURATION: &str = "tgi_request_mean_time_per_token_duration";
/// Tokens of an answer.
pub const GENERATED_TOKENS: &str = "tgi_request_generated_tokens";
/// Tokens of a prompt.
pub const INPUT_LENGTH: &str = "tgi_request_input_length";
/// Most tokens a request allowed for its answer.
pub const MAX_NEW_TOKENS: &str = "tgi_request_max_new_tokens";
/// Requests waiting for their first row.
pub const QUEUE_SIZE: &str = "tgi_queue_size";
/// Requests with rows in flight.
pub const BATCH_SIZE: &str = "tgi_batch_current_size";
/// Tokens in the pages of running requests.
pub const BATCH_TOKENS: &str = "tgi_batch_current_max_tokens";
/// Tokens that the page pool holds.
pub const BATCH_MAX_TOKENS: &str = "tgi_batch_max_total_tokens";
/// Seconds from sending a step to its outcome.
pub const BATCH_DURATION: &str = "tgi_batch_inference_duration";
/// Seconds of a step in the model.
pub const FORWARD_DURATION: &str = "tgi_batch_forward_duration";
/// Steps sent; label `method` is prefill or decode.
pub const BATCH_COUNT: &str = "tgi_batch_inference_count";
/// Steps answered; label `method`.
pub const BATCH_SUCCESS: &str = "tgi_batch_inference_success";
/// Steps lost with their epoch; label `method`.
pub const BATCH_FAILURE: &str = "tgi_batch_inference_failure";

/// Seconds from arrival to the first token; label `adapter`.
pub const TTFT: &str = "kvrun_ttft_seconds";
/// Seconds between two tokens of one answer; label `adapter`.
pub const INTER_TOKEN: &str = "kvrun_inter_token_seconds";
/// KV pages of the pool.
pub const KV_PAGES: &str = "kvrun_kv_pages_total";
/// KV pages that hold nothing.
pub const KV_PAGES_FREE: &str = "kvrun_kv_pages_free";
/// KV pages of open requests.
pub const KV_PAGES_USED: &str = "kvrun_kv_pages_used";
/// KV pages that only the prefix cache holds.
pub const KV_PAGES_CACHED: &str = "kvrun_kv_pages_cached";
/// KV pages that adapters lie in.
pub const KV_PAGES_ADAPTERS: &str = "kvrun_kv_pages_adapters";
/// Prompt tokens that the prefix cache saved.
pub const PREFIX_HIT_TOKENS: &str = "kvrun_prefix_hit_tokens_total";
/// Adapters; label `state`.
pub const ADAPTERS: &str = "kvrun_adapters";
/// Requests refused or failed; labels `err` and `route`.
pub const FAILURES: &str = "kvrun_request_failure_total";
/// Streams that ended without a terminal event. Must stay 0.
pub const STREAMS_WITHOUT_TERMINAL: &str = "kvrun_streams_without_terminal_total";
/// Epochs after the first.
pub const SHARD_RESTARTS: &str = "kvrun_shard_restarts_total";
/// Open requests that went on in a new epoch.
pub const REPLAYED_REQUESTS: &str = "kvrun_replayed_requests_total";
/// Requests whose pages were taken back under pressure and computed again.
pub const PREEMPTIONS: &str = "kvrun_preemptions_total";
/// Tokens that steps computed on a guess.
pub const GUESSED: &str = "kvrun_guessed_tokens_total";
/// Guessed tokens that became part of an answer.
pub const GUESSED_RIGHT: &str = "kvrun_guessed_right_tokens_total";
/// Rows that the shard failed alone.
pub const FAILED_ROWS: &str = "kvrun_failed_rows_total";
/// Requests given up because the model process died of them, or of ones that ask the same.
pub const POISON: &str = "kvrun_poison_total";
/// Seconds between receiving an outcome and sending the next step while the shards have none: the router's own time
/// between tokens.
pub const ROUTER_GAP: &str = "kvrun_router_gap_seconds";
/// The same while the shards compute a step that was sent ahead: no token waits for it.
pub const ROUTER_HIDDEN: &str = "kvrun_router_hidden_seconds";
/// Seconds of a step that were neither the shard's nor the router's turn: wire and wake-ups. What a step waited at the
/// shard behind the one before it hides them.
pub const STEP_TRANSPORT: &str = "kvrun_step_transport_seconds";
/// Seconds since the last outcome while work exists.
pub const PROGRESS_AGE: &str = "kvrun_progress_age_seconds";
/// Requests without a valid key.
pub const AUTH_FAILURES: &str = "kvrun_auth_failures_total";

/// Adapters that get a label of their own; later ones share "other".
const LABELLED_ADAPTERS: usize = 64;

const SECONDS: [f64; 24] = [
    0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.1,
    0.15, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0,
];
/// Parts of one step: 5 µs to 50 ms, finest around the tenth of a millisecond that the router may take.
const WITHIN_A_STEP: [f64; 24] = [
    5e-6, 7.5e-6, 1e-5, 1.5e-5, 2e-5, 3e-5, 4e-5, 5e-5, 7.5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 4e-4,
    5e-4, 7.5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 5e-2,
];
const TOKENS: [f64; 14] = [
    1.0, 4.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 32768.0,
    131072.0,
];

/// Installs the recorder of this process, once; later calls give the same page.
pub fn install() -> PrometheusHandle {
    static PAGE: OnceLock<PrometheusHandle> = OnceLock::new();
    PAGE.get_or_init(|| {
        let recorder = builder().build_recorder();
        let page = recorder.handle();
        // Only an embedding program can have set another one before; then its page is the one that counts.
        if metrics::set_global_recorder(recorder).is_ok() {
            describe();
        }
        page
    })
    .clone()
}

fn builder() -> PrometheusBuilder {
    let seconds = [
        Matcher::Suffix("duration".into()),
        Matcher::Suffix("seconds".into()),
    ];
    let tokens =
        [GENERATED_TOKENS, INPUT_LENGTH, MAX_NEW_TOKENS].map(|name| Matcher::Full(name.into()));
    let within_a_step =
        [ROUTER_GAP, ROUTER_HIDDEN, STEP_TRANSPORT].map(|name| Matcher::Full(name.into()));
    let with = |builder: PrometheusBuilder, matcher: Matcher, buckets: &[f64]| {
        builder
            .set_buckets_for_metric(matcher, buckets)
            .expect("the bucket lists are not empty")
    };
    let builder = seconds
        .into_iter()
        .fold(PrometheusBuilder::new(), |builder, matcher| {
            with(builder, matcher, &SECONDS)
        });
    let builder = within_a_step.into_iter().fold(builder, |builder, matcher| {
        with(builder, matcher, &WITHIN_A_STEP)
    });
    tokens
        .into_iter()
        .fold(builder, |builder, matcher| with(builder, matcher, &TOKENS))
}

fn describe() {
    for (name, text) in [
        (REQUEST_COUNT, "Requests that reached a generating route."),
        (REQUEST_SUCCESS, "Answers that were completed."),
        (REQUEST_FAILURE, "Requests refused or failed, by kind."),
        (FAILURES, "Requests refused or failed, by kind and route."),
        (
            STREAMS_WITHOUT_TERMINAL,
            "Streams that ended without a terminal event; must stay 0.",
        ),
        (
            PREFIX_HIT_TOKENS,
            "Prompt tokens that the prefix cache saved.",
        ),
        (
            SHARD_RESTARTS,
            "Times a shard group came back after the first start.",
        ),
        (
            REPLAYED_REQUESTS,
            "Open requests that went on in a new epoch.",
        ),
        (
            PREEMPTIONS,
            "Requests whose pages were taken back under pressure.",
        ),
        (GUESSED, "Tokens that steps computed on a guess."),
        (
            GUESSED_RIGHT,
            "Guessed tokens that became part of an answer.",
        ),
        (FAILED_ROWS, "Rows that the shard failed alone."),
        (
            POISON,
            "Requests given up because the model process died of them.",
        ),
        (AUTH_FAILURES, "Requests without a valid key."),
    ] {
        describe_counter!(name, text);
    }
    for (name, text) in [
        (QUEUE_SIZE, "Requests waiting for their first row."),
        (BATCH_SIZE, "Requests with rows in flight."),
        (BATCH_MAX_TOKENS, "Tokens that the page pool holds."),
        (KV_PAGES, "KV pages of the pool."),
        (KV_PAGES_FREE, "KV pages that hold nothing."),
        (KV_PAGES_USED, "KV pages of open requests."),
        (
            KV_PAGES_CACHED,
            "KV pages that only the prefix cache holds.",
        ),
        (KV_PAGES_ADAPTERS, "KV pages that adapters lie in."),
        (ADAPTERS, "Adapters by state."),
        (
            PROGRESS_AGE,
            "Seconds since the last outcome while work exists.",
        ),
    ] {
        describe_gauge!(name, text);
    }
    for (name, text) in [
        (TTFT, "Seconds from arrival to the first token, by adapter."),
        (
            INTER_TOKEN,
            "Seconds between two tokens of one answer, by adapter.",
        ),
        (
            REQUEST_DURATION,
            "Seconds from arrival to the end of the answer.",
        ),
        (
            VALIDATION_DURATION,
            "Seconds spent on checking and tokenizing.",
        ),
        (
            QUEUE_DURATION,
            "Seconds from admission to the first scheduled row.",
        ),
        (
            INFERENCE_DURATION,
            "Seconds from the first scheduled row to the end.",
        ),
        (TOKEN_DURATION, "Seconds of inference per generated token."),
        (
            ROUTER_GAP,
            "Seconds between receiving an outcome and sending the next step while the shards have none.",
        ),
        (
            ROUTER_HIDDEN,
            "Seconds between receiving an outcome and sending a step while the shards compute another.",
        ),
        (
            STEP_TRANSPORT,
            "Seconds of a step that were neither the shard's nor the router's.",
        ),
        (GENERATED_TOKENS, "Tokens of an answer."),
        (INPUT_LENGTH, "Tokens of a prompt."),
        (
            MAX_NEW_TOKENS,
            "Most tokens a request allowed for its answer.",
        ),
    ] {
        describe_histogram!(name, text);
    }
    // Counters that alerts watch exist from the start, at zero.
    counter!(STREAMS_WITHOUT_TERMINAL).absolute(0);
    counter!(REPLAYED_REQUESTS).increment(0);
    counter!(AUTH_FAILURES).absolute(0);
    counter!(POISON).increment(0);
    counter!(PREFIX_HIT_TOKENS).increment(0);
}

/// The label of an adapter: its name, "base", or "other" once too many names were seen.
pub fn adapter_label(name: Option<&str>) -> String {
    static SEEN: LazyLock<Mutex<HashSet<String>>> = LazyLock::new(Mutex::default);
    match name {
        None => "base".to_owned(),
        Some(name) => label_among(
            &mut SEEN.lock().unwrap_or_else(PoisonError::into_inner),
            name,
        ),
    }
}

fn label_among(seen: &mut HashSet<String>, name: &str) -> String {
    if !seen.contains(name) {
        if seen.len() == LABELLED_ADAPTERS {
            return "other".to_owned();
        }
        seen.insert(name.to_owned());
    }
    name.to_owned()
}

/// The page, with the gauges of `engine` read now.
pub fn render(page: &PrometheusHandle, engine: &Engine) -> String {
    let status = engine.status();
    gauge!(QUEUE_SIZE).set(status.queued);
    gauge!(BATCH_SIZE).set(status.running);
    gauge!(BATCH_MAX_TOKENS).set(f64::from(status.pages) * f64::from(status.page_tokens));
    let used = status.used_pages();
    gauge!(BATCH_TOKENS).set(f64::from(used) * f64::from(status.page_tokens));
    gauge!(KV_PAGES).set(status.pages);
    gauge!(KV_PAGES_FREE).set(status.free_pages);
    gauge!(KV_PAGES_CACHED).set(status.cached_pages);
    gauge!(KV_PAGES_ADAPTERS).set(status.adapter_pages);
    gauge!(KV_PAGES_USED).set(used);
    gauge!(PROGRESS_AGE).set(status.stalled.as_secs_f64());
    counter!(SHARD_RESTARTS).absolute(status.epoch.saturating_sub(1));
    let adapters = engine.adapters().list();
    for state in [
        AdapterState::Known,
        AdapterState::Loading,
        AdapterState::Ready,
        AdapterState::Draining,
        AdapterState::Failed,
    ] {
        let count = adapters
            .iter()
            .filter(|adapter| adapter.state == state)
            .count();
        gauge!(ADAPTERS, "state" => state.as_str()).set(count as f64);
    }
    page.run_upkeep();
    page.render()
}

/// One answer's durations, in seconds, and sizes, in tokens.
#[derive(Debug, Clone, Copy)]
pub struct AnswerFigures {
    /// From arrival to the end.
    pub total: f64,
    /// Of that, checking and tokenizing.
    pub validation: f64,
    /// Of that, waiting for the first row.
    pub queue: f64,
    /// Of that, from the first row to the end.
    pub inference: f64,
    /// Tokens of the answer.
    pub generated: u32,
}

/// Counts a completed answer.
pub fn record_answer(method: &'static str, figures: AnswerFigures) {
    counter!(REQUEST_SUCCESS, "method" => method).increment(1);
    histogram!(REQUEST_DURATION).record(figures.total);
    histogram!(VALIDATION_DURATION).record(figures.validation);
    histogram!(QUEUE_DURATION).record(figures.queue);
    histogram!(INFERENCE_DURATION).record(figures.inference);
    histogram!(TOKEN_DURATION).record(figures.inference / f64::from(figures.generated.max(1)));
    histogram!(GENERATED_TOKENS).record(figures.generated);
}

/// Counts a refused or failed request.
pub fn record_failure(err: &'static str, route: &str) {
    counter!(REQUEST_FAILURE, "err" => err).increment(1);
    counter!(FAILURES, "err" => err, "route" => route.to_owned()).increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapter_labels_are_bounded() {
        let mut seen = HashSet::new();
        let mut label = |number: usize| label_among(&mut seen, &format!("adapter-{number}"));
        let labels: HashSet<String> = (0..200).map(&mut label).collect();
        assert_eq!(labels.len(), LABELLED_ADAPTERS + 1);
        assert_eq!(
            (label(3), label(150)),
            ("adapter-3".to_owned(), "other".to_owned())
        );
        assert_eq!(adapter_label(None), "base");
    }
}
