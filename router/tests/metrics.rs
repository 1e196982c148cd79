//! The metrics page. All servers of this process share one recorder, so counts are compared as differences.
#![allow(clippy::unwrap_used)]

mod served;

use std::collections::HashMap;
use std::time::Duration;

use serde_json::json;
use served::{Served, serve};

/// One test at a time: they share the recorder.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

async fn page(server: &Served) -> HashMap<String, f64> {
    let text = server
        .get("/metrics")
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    let lines = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect()
}

fn grown(before: &HashMap<String, f64>, after: &HashMap<String, f64>, name: &str) -> f64 {
    after.get(name).copied().unwrap_or(0.0) - before.get(name).copied().unwrap_or(0.0)
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_and_refusals_are_counted() {
    let _turn = TURN.lock().await;
    let server = serve().await;
    server.load("warm").await;
    let before = page(&server).await;
    let body =
        json!({"inputs": "Hi", "parameters": {"max_new_tokens": 5, "ignore_eos_token": true}});
    server.ask("/generate", body.clone()).await;
    server.events("/generate_stream", body).await;
    let adapted = json!({"inputs": "Hi", "parameters": {"max_new_tokens": 5, "adapter_id": "warm", "ignore_eos_token": true}});
    server.ask("/generate", adapted).await;
    server.ask("/generate", json!({"inputs": ""})).await;
    server
        .ask(
            "/v1/completions",
            json!({"prompt": "Hi", "model": "nobody"}),
        )
        .await;
    server.idle().await;
    let after = page(&server).await;
    let expect = |name: &str, count: f64| assert_eq!(grown(&before, &after, name), count, "{name}");
    expect("tgi_request_count{method=\"generate\"}", 3.0);
    expect("tgi_request_success{method=\"generate\"}", 2.0);
    expect("tgi_request_success{method=\"generate_stream\"}", 1.0);
    expect("tgi_request_failure{err=\"validation\"}", 1.0);
    expect(
        "kvrun_request_failure_total{err=\"validation\",route=\"/generate\"}",
        1.0,
    );
    expect(
        "kvrun_request_failure_total{err=\"not_found\",route=\"/v1/completions\"}",
        1.0,
    );
    expect("kvrun_ttft_seconds_count{adapter=\"base\"}", 2.0);
    expect("kvrun_ttft_seconds_count{adapter=\"warm\"}", 1.0);
    expect("kvrun_inter_token_seconds_count{adapter=\"warm\"}", 4.0);
    expect("tgi_request_generated_tokens_sum", 15.0);
    expect("tgi_request_input_length_sum", 9.0);
    for name in [
        "duration",
        "validation_duration",
        "queue_duration",
        "inference_duration",
        "mean_time_per_token_duration",
    ] {
        expect(&format!("tgi_request_{name}_count"), 3.0);
        assert!(
            after.contains_key(&format!("tgi_request_{name}_bucket{{le=\"+Inf\"}}")),
            "{name} is a histogram"
        );
    }
    assert_eq!(after["kvrun_streams_without_terminal_total"], 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn gauges_show_the_pool_and_return_to_rest() {
    let _turn = TURN.lock().await;
    let server = serve().await;
    server.load("warm").await;
    server.shard.faults().step_delay(Duration::from_millis(10));
    let body =
        json!({"inputs": "Hi", "parameters": {"max_new_tokens": 100, "ignore_eos_token": true}});
    let mut stream = server.post("/generate_stream", body).send().await.unwrap();
    stream.chunk().await.unwrap();
    let busy = page(&server).await;
    assert_eq!(busy["tgi_batch_current_size"], 1.0);
    assert!(busy["kvrun_kv_pages_used"] >= 1.0);
    assert_eq!(busy["kvrun_adapters{state=\"ready\"}"], 1.0);
    drop(stream);
    server.idle().await;
    let idle = page(&server).await;
    assert_eq!(
        (
            idle["tgi_batch_current_size"],
            idle["tgi_queue_size"],
            idle["kvrun_kv_pages_used"]
        ),
        (0.0, 0.0, 0.0)
    );
    assert_eq!(
        idle["kvrun_kv_pages_free"]
            + idle["kvrun_kv_pages_cached"]
            + idle["kvrun_kv_pages_adapters"],
        idle["kvrun_kv_pages_total"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn cached_prompts_are_counted() {
    let _turn = TURN.lock().await;
    let server = serve().await;
    let before = page(&server).await;
    let body =
        json!({"inputs": "x".repeat(100), "parameters": {"max_new_tokens": 2, "details": true}});
    assert_eq!(
        server.ask("/generate", body.clone()).await.1["details"]["cached_tokens"],
        0
    );
    server.idle().await;
    let (_, again) = server.ask("/generate", body).await;
    let cached = again["details"]["cached_tokens"].as_f64().unwrap();
    assert!(cached >= 80.0, "{again}");
    assert!(
        grown(
            &before,
            &page(&server).await,
            "kvrun_prefix_hit_tokens_total"
        ) >= cached
    );
}
