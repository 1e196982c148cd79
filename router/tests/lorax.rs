//! What LoRAX's clients send and read, beside what they share with text-generation-inference's.
#![allow(clippy::unwrap_used)]

mod served;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use kvrun_router::api::request::Source;
use serde_json::{Value, json};
use served::{json_events, prompt_ids, serve, serve_with};

/// A body as lorax-client 0.6 writes it, which leaves nothing out.
fn body(stream: bool, more: Value) -> Value {
    let mut parameters = json!({
        "adapter_id": null, "adapter_source": null, "merged_adapters": null, "api_token": null, "do_sample": false,
        "max_new_tokens": 4, "ignore_eos_token": false, "repetition_penalty": null, "return_full_text": false, "stop": [],
        "seed": null, "temperature": null, "top_k": null, "top_p": null, "truncate": null, "typical_p": null,
        "best_of": null, "watermark": false, "details": true, "decoder_input_details": false,
        "return_k_alternatives": null, "response_format": null});
    let fields = more.as_object().unwrap().clone();
    parameters.as_object_mut().unwrap().extend(fields);
    json!({"inputs": "Hi", "parameters": parameters, "stream": stream})
}

#[tokio::test(flavor = "multi_thread")]
async fn its_client_s_bodies_are_answered_with_the_details_it_reads() {
    let server = serve().await;
    let (status, answer) = server.ask("/", body(false, json!({}))).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(
        answer[0]["details"]["prompt_tokens"],
        prompt_ids("Hi").len()
    );
    let events = json_events(&server.events("/", body(true, json!({}))).await);
    let last = events.last().unwrap();
    assert_eq!(last["details"]["prompt_tokens"], prompt_ids("Hi").len());
    assert_eq!(last["generated_text"], answer[0]["generated_text"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn alternatives_come_within_the_tokens() {
    let server = serve().await;
    let asked = json!({"return_k_alternatives": 2});
    let (status, answer) = server.ask("/generate", without_stream(asked.clone())).await;
    assert_eq!(status, 200, "{answer}");
    let details = &answer["details"];
    assert_eq!(details["top_tokens"], Value::Null);
    let (_, beside) = server
        .ask("/generate", without_stream(json!({"top_n_tokens": 2})))
        .await;
    let tokens = details["tokens"].as_array().unwrap();
    for (token, list) in tokens.iter().zip(top(&beside["details"])) {
        let within = token["alternative_tokens"].as_array().unwrap();
        assert_eq!(within.len(), 2);
        for (one, other) in within.iter().zip(list) {
            for field in ["id", "text", "logprob"] {
                assert_eq!(one[field], other[field]);
            }
        }
    }
    let events = json_events(&server.events("/", body(true, asked)).await);
    assert!(events.iter().all(|event| {
        event["token"]["alternative_tokens"]
            .as_array()
            .unwrap()
            .len()
            == 2
    }));
    for wrong in [
        json!({"return_k_alternatives": 6}),
        json!({"return_k_alternatives": 1, "top_n_tokens": 1}),
    ] {
        let (status, answer) = server.ask("/generate", without_stream(wrong)).await;
        assert_eq!(status, 422);
        let message = answer["error"].as_str().unwrap();
        assert!(message.contains("return_k_alternatives"), "{message}");
    }
}

fn without_stream(more: Value) -> Value {
    let mut body = body(false, more);
    body.as_object_mut().unwrap().remove("stream");
    body
}

fn top(details: &Value) -> Vec<&Vec<Value>> {
    let lists = details["top_tokens"].as_array().unwrap();
    lists.iter().map(|list| list.as_array().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_s_source_says_where_it_is_loaded_from_when_it_is_asked_for() {
    let server = serve().await;
    let named = |more: Value| {
        let mut fields = json!({"adapter_id": "warm"});
        let more = more.as_object().unwrap().clone();
        fields.as_object_mut().unwrap().extend(more);
        without_stream(fields)
    };
    let ask = async |more: Value| server.ask("/generate", named(more)).await;
    assert_eq!(ask(json!({})).await.0, 404);
    let (status, answer) = ask(json!({"adapter_source": "hub"})).await;
    assert_eq!(status, 403, "{answer}");
    let message = answer["error"].as_str().unwrap();
    assert!(message.contains("--allow-dynamic-lora"), "{message}");
    let (status, answer) = ask(json!({"adapter_source": "local"})).await;
    assert_eq!(status, 200, "{answer}");
    let digest = answer["details"]["adapter"]["digest"].as_str().unwrap();
    assert_eq!(server.look("/v1/adapters/warm").await.1["digest"], digest);
    let expected = server.greedy(&prompt_ids("Hi"), digest, 4);
    assert_eq!(answer["generated_text"], server.text(&expected));
    assert_eq!(ask(json!({})).await.0, 200, "now it is there");
    let broken = json!({"adapter_id": "bad", "adapter_source": "local"});
    assert_eq!(ask(broken).await.0, 422);
    for nowhere in ["nobody", "../model", "/etc"] {
        let asked = json!({"adapter_id": nowhere, "adapter_source": "local"});
        let (status, answer) = ask(asked).await;
        assert_eq!(
            (status, &answer["error_type"]),
            (404, &json!("not_found")),
            "{answer}"
        );
    }
    let chat = json!({"model": "cold", "adapter_source": "local", "max_tokens": 2,
        "messages": [{"role": "user", "content": "Hi"}]});
    let (status, answer) = server.ask("/v1/chat/completions", chat).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["details"]["adapter"]["id"], "cold");
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_may_say_where_adapters_come_from_that_are_not_loaded() {
    let server =
        serve_with(|setup| setup.settings.default_adapter_source = Some(Source::Local)).await;
    let asked = without_stream(json!({"adapter_id": "warm"}));
    assert_eq!(server.ask("/generate", asked).await.0, 200);
    let chat = |model: &str| json!({"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]});
    assert_eq!(
        server.ask("/v1/chat/completions", chat("cold")).await.0,
        200
    );
    let (status, answer) = server.ask("/v1/chat/completions", chat("gpt-4")).await;
    assert_eq!((status, &answer["error"]["param"]), (404, &json!("model")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_the_hub_cannot_have_is_an_unknown_one() {
    let server = serve_with(|setup| {
        setup.settings.allow_dynamic_lora = true;
        setup.settings.default_adapter_source = Some(Source::Hub);
    })
    .await;
    let chat = json!({"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]});
    let (status, answer) = server.ask("/v1/chat/completions", chat).await;
    assert_eq!((status, &answer["error"]["param"]), (404, &json!("model")));
    let asked = without_stream(json!({"adapter_id": "my adapter"}));
    let (status, answer) = server.ask("/generate", asked).await;
    assert_eq!(status, 404, "{answer}");
}

/// A program that fetches an adapter slowly and writes a line to a file each time.
fn downloader(home: &Path) -> std::path::PathBuf {
    let (program, fetched) = (home.join("text-generation-server"), home.join("fetched"));
    served::write_adapter(&fetched, 4);
    let script = format!(
        "#!/bin/sh\necho x >> '{home}/runs'\nsleep 0.3\necho '{{\"path\": \"{}\"}}'\n",
        fetched.display(),
        home = home.display()
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    program
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_for_one_new_adapter_fetch_it_a_few_times_at_most() {
    let home = tempfile::tempdir().unwrap();
    let program = downloader(home.path());
    let server = serve_with(|setup| {
        setup.settings.allow_dynamic_lora = true;
        setup.settings.download_program = program;
    })
    .await;
    let asked = json!({"adapter_id": "org/new", "adapter_source": "hub"});
    let asks = (0..24).map(|_| server.ask("/generate", without_stream(asked.clone())));
    for (status, answer) in futures::future::join_all(asks).await {
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["details"]["adapter"]["id"], "org/new");
    }
    let runs = std::fs::read_to_string(home.path().join("runs")).unwrap();
    assert!((1..=4).contains(&runs.lines().count()), "{runs}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_those_who_may_load_adapters_bring_them_by_asking() {
    let server = serve_with(|setup| {
        setup.settings.keys = kvrun_router::api::auth::Keys::new(["user"]);
        setup.settings.admin_keys = kvrun_router::api::auth::Keys::new(["admin"]);
    })
    .await;
    let asked = without_stream(json!({"adapter_id": "warm", "adapter_source": "local"}));
    for (key, expected) in [("user", 404), ("admin", 200), ("user", 200)] {
        let request = server.post("/generate", asked.clone()).bearer_auth(key);
        assert_eq!(
            request.send().await.unwrap().status().as_u16(),
            expected,
            "{key}"
        );
    }
}
