//! Every value a client can get wrong, one case each: the status, the kind, and a message that names the fault.
#![allow(clippy::unwrap_used)]

mod refused;
mod served;

use refused::{chat, refused, refused_openai, send_raw};
use serde_json::{Value, json};
use served::{VOCABULARY, serve};

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_prompt() {
    let server = serve().await;
    let (status, answer) = server.ask("/generate", json!({"inputs": ""})).await;
    assert_eq!(status, 422);
    assert!(
        answer["error"]
            .as_str()
            .unwrap()
            .contains("`inputs` is empty")
    );
    for prompt in [json!(""), json!([]), json!([[]]), json!([""])] {
        refused_openai(
            &server,
            "/v1/completions",
            json!({"prompt": prompt}),
            "prompt",
        )
        .await;
    }
    refused_openai(
        &server,
        "/v1/chat/completions",
        json!({"messages": []}),
        "messages",
    )
    .await;
    assert_eq!(
        server.shard.faults().steps_seen(),
        0,
        "the shard was never called"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_over_the_limit() {
    let server = serve().await;
    let (status, answer) = server
        .ask("/generate", json!({"inputs": "x".repeat(256)}))
        .await;
    assert_eq!(status, 422);
    let message = answer["error"].as_str().unwrap();
    assert!(
        message.contains("257 tokens") && message.contains("256"),
        "{message}"
    );
    // Eight bytes per token and more are refused before they are tokenized.
    let (status, answer) = server
        .ask("/generate", json!({"inputs": "x".repeat(256 * 8 + 1)}))
        .await;
    assert_eq!(status, 422);
    assert!(
        answer["error"].as_str().unwrap().contains("2049 bytes"),
        "{answer}"
    );
    let (status, _) = server
        .ask(
            "/generate",
            json!({"inputs": "x".repeat(255), "parameters": {"max_new_tokens": 1}}),
        )
        .await;
    assert_eq!(status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_answer_lengths() {
    let server = serve().await;
    for asked in [0i64, -1, i64::MIN] {
        refused(
            &server,
            json!({"max_new_tokens": asked}),
            &["max_new_tokens", &asked.to_string()],
        )
        .await;
    }
    for asked in [507i64, 1 << 31, 1 << 32, i64::MAX] {
        refused(
            &server,
            json!({"max_new_tokens": asked}),
            &["6 tokens", &asked.to_string(), "512", "506"],
        )
        .await;
    }
    refused(&server, json!({"max_new_tokens": 1.5}), &["1.5"]).await;
    let (status, _) = server
        .ask(
            "/generate",
            json!({"inputs": "Hello", "parameters": {"max_new_tokens": 506}}),
        )
        .await;
    assert_eq!(status, 200);
    for asked in [0i64, -3, 1 << 31] {
        refused_openai(
            &server,
            "/v1/completions",
            json!({"prompt": "Hi", "max_tokens": asked}),
            "max_tokens",
        )
        .await;
        refused_openai(
            &server,
            "/v1/chat/completions",
            chat(json!({"max_completion_tokens": asked})),
            "max_tokens",
        )
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sampling_values_out_of_range_or_not_finite() {
    let server = serve().await;
    for (field, values) in [
        (
            "temperature",
            vec![json!(0), json!(-1), json!(1e39), json!(1e-40)],
        ),
        (
            "repetition_penalty",
            vec![json!(0), json!(-2.5), json!(1e300)],
        ),
        (
            "frequency_penalty",
            vec![json!(2.1), json!(-2.1), json!(1e39)],
        ),
        ("presence_penalty", vec![json!(3)]),
        ("top_p", vec![json!(0), json!(1), json!(-0.5), json!(1.5)]),
        ("typical_p", vec![json!(0), json!(1), json!(7)]),
        ("top_k", vec![json!(0), json!(-1)]),
        ("truncate", vec![json!(0), json!(-1), json!(512)]),
        ("top_n_tokens", vec![json!(6), json!(-1)]),
        ("best_of", vec![json!(0), json!(-1), json!(3)]),
        ("seed", vec![json!(-1), json!(1.5)]),
    ] {
        for value in values {
            refused(&server, json!({field: value}), &[field]).await;
        }
    }
    for (field, value) in [
        ("temperature", json!(-1)),
        ("temperature", json!(1e39)),
        ("top_p", json!(0)),
        ("min_p", json!(1.5)),
        ("n", json!(0)),
        ("n", json!(-1)),
        ("n", json!(5)),
        ("frequency_penalty", json!(9)),
        ("min_tokens", json!(-1)),
        ("top_k", json!(-2)),
        ("seed", json!(0.5)),
    ] {
        refused_openai(
            &server,
            "/v1/completions",
            json!({"prompt": "Hi", field: value}),
            field,
        )
        .await;
        refused_openai(
            &server,
            "/v1/chat/completions",
            chat(json!({field: value})),
            field,
        )
        .await;
    }
    let raw = r#"{"inputs": "Hi", "parameters": {"temperature": 1e999}}"#;
    assert_eq!(send_raw(&server, raw.as_bytes().to_vec()).await.0, 422);
    let raw = r#"{"inputs": "Hi", "parameters": {"temperature": NaN}}"#;
    assert_eq!(send_raw(&server, raw.as_bytes().to_vec()).await.0, 422);
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_outside_the_vocabulary() {
    let server = serve().await;
    for prompt in [json!([VOCABULARY]), json!([1, -1]), json!([1i64 << 40])] {
        refused_openai(
            &server,
            "/v1/completions",
            json!({"prompt": prompt}),
            "prompt",
        )
        .await;
    }
    for id in [
        VOCABULARY.to_string(),
        "-1".to_owned(),
        "x".to_owned(),
        "4294967296".to_owned(),
    ] {
        let body = json!({"prompt": "Hi", "logit_bias": {id: 1}});
        refused_openai(&server, "/v1/completions", body, "logit_bias").await;
    }
    let body = json!({"prompt": "Hi", "logit_bias": {"1": 101}});
    refused_openai(&server, "/v1/completions", body, "logit_bias").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn combinations_that_make_no_sense() {
    let server = serve().await;
    let whole = async |parameters: Value, word: &str| {
        let (status, answer) = server
            .ask(
                "/generate",
                json!({"inputs": "Hi", "parameters": parameters}),
            )
            .await;
        assert_eq!(status, 422);
        assert!(answer["error"].as_str().unwrap().contains(word), "{answer}");
    };
    whole(json!({"best_of": 2}), "sampling").await;
    whole(json!({"best_of": 2, "do_sample": true, "seed": 1}), "seed").await;
    whole(json!({"adapter_id": "a", "lora_id": "b"}), "lora_id").await;
    for (path, agrees) in [("/generate", false), ("/generate_stream", true)] {
        for stream in [false, true] {
            let body =
                json!({"inputs": "Hi", "stream": stream, "parameters": {"max_new_tokens": 1}});
            let (status, _) = server.ask(path, body).await;
            assert_eq!(
                status,
                if stream == agrees { 200 } else { 422 },
                "{path} {stream}"
            );
        }
    }
    let stream = async |parameters: Value, word: &str| {
        let (status, answer) = server
            .ask(
                "/generate_stream",
                json!({"inputs": "Hi", "parameters": parameters}),
            )
            .await;
        assert_eq!(status, 422);
        assert!(answer["error"].as_str().unwrap().contains(word), "{answer}");
    };
    stream(json!({"best_of": 2, "do_sample": true}), "best_of").await;
    stream(
        json!({"decoder_input_details": true}),
        "decoder_input_details",
    )
    .await;
    let lengths = chat(json!({"max_tokens": 4, "max_completion_tokens": 5}));
    refused_openai(&server, "/v1/chat/completions", lengths, "max_tokens").await;
    let lengths = chat(json!({"max_tokens": 4, "max_completion_tokens": 4}));
    assert_eq!(server.ask("/v1/chat/completions", lengths).await.0, 200);
    let completions = "/v1/completions";
    refused_openai(
        &server,
        completions,
        json!({"prompt": "Hi", "n": 2, "best_of": 1}),
        "best_of",
    )
    .await;
    refused_openai(
        &server,
        completions,
        json!({"prompt": "Hi", "best_of": 2, "stream": true}),
        "best_of",
    )
    .await;
    refused_openai(
        &server,
        completions,
        json!({"prompt": ["a", "b", "c"], "n": 2}),
        "n",
    )
    .await;
    refused_openai(
        &server,
        completions,
        json!({"prompt": "Hi", "stream_options": {"include_usage": true}}),
        "stream_options",
    )
    .await;
    refused_openai(
        &server,
        "/v1/chat/completions",
        chat(json!({"top_logprobs": 2})),
        "top_logprobs",
    )
    .await;
    refused_openai(
        &server,
        "/v1/chat/completions",
        chat(json!({"logprobs": true, "top_logprobs": 21})),
        "top_logprobs",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_beyond_measure() {
    let server = serve().await;
    refused(
        &server,
        json!({"stop": ["a", "b", "c", "d", "e"]}),
        &["stop", "5"],
    )
    .await;
    refused(&server, json!({"stop": [""]}), &["stop", "0 bytes"]).await;
    refused(
        &server,
        json!({"stop": ["x".repeat(257)]}),
        &["stop", "257"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conversations_that_the_template_refuses() {
    let server = serve().await;
    let tool = json!({"messages": [{"role": "tool", "content": "x"}]});
    let (status, answer) = server.ask("/v1/chat/completions", tool.clone()).await;
    assert_eq!(status, 400);
    assert!(
        answer["error"]["message"]
            .as_str()
            .unwrap()
            .contains("no tools"),
        "{answer}"
    );
    let (status, answer) = server.ask("/chat_tokenize", tool).await;
    assert_eq!(
        (status, &answer["error_type"]),
        (422, &json!("template_error"))
    );
    refused_openai(
        &server,
        "/v1/chat/completions",
        json!({"messages": [{"role": "user"}]}),
        "messages",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_that_cannot_be_loaded() {
    let server = serve().await;
    let (status, answer) = server
        .ask("/v1/adapters", json!({"name": "bad", "path": "bad"}))
        .await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (422, &json!("adapter_invalid")),
        "{answer}"
    );
    assert!(
        answer["error"]["message"]
            .as_str()
            .unwrap()
            .contains("safetensors"),
        "{answer}"
    );
    for name in ["", "a b", "a\"b", "x\u{0}"] {
        refused_openai(
            &server,
            "/v1/adapters",
            json!({"name": name, "path": "warm"}),
            "name",
        )
        .await;
    }
    for name in ["demo", "tgi", "default", "empty"] {
        assert_eq!(
            server
                .ask("/v1/adapters", json!({"name": name, "path": "warm"}))
                .await
                .0,
            409,
            "{name}"
        );
    }
    refused_openai(&server, "/v1/adapters", json!({"name": "x"}), "path").await;
    refused_openai(
        &server,
        "/v1/adapters",
        json!({"path": "warm", "id": "a/b"}),
        "path",
    )
    .await;
    server.load("warm").await;
    let (status, _) = server
        .ask("/v1/adapters", json!({"name": "warm", "path": "cold"}))
        .await;
    assert_eq!(status, 409);
    assert_eq!(
        server
            .ask("/v1/adapters", json!({"name": "warm", "path": "warm"}))
            .await
            .0,
        200
    );
}
