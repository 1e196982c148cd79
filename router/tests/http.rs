//! TGI's routes and the adapters' over a real shard wire: what is answered when all goes well.
#![allow(clippy::unwrap_used)]

mod served;

use std::time::Duration;

use serde_json::{Value, json};
use served::{BOS, EOS, prompt_ids, serve, serve_with};

#[tokio::test(flavor = "multi_thread")]
async fn generate_answers_the_shard_s_tokens_as_text() {
    let server = serve().await;
    let expected = server.greedy(&prompt_ids("Hello"), "", 20);
    let body = json!({"inputs": "Hello", "parameters": {"max_new_tokens": 20, "details": true}});
    let response = server.post("/generate", body).send().await.unwrap();
    let headers = response.headers().clone();
    let (status, answer) = served::read(response).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["generated_text"], server.text(&expected));
    let details = &answer["details"];
    assert_eq!(
        details["finish_reason"],
        if expected.contains(&EOS) {
            "eos_token"
        } else {
            "length"
        }
    );
    assert_eq!(details["generated_tokens"], expected.len());
    assert_eq!(
        (&details["seed"], &details["adapter"]),
        (&Value::Null, &Value::Null)
    );
    let ids: Vec<u32> = details["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["id"].as_u64().unwrap() as u32)
        .collect();
    assert_eq!(ids, expected);
    assert_eq!(headers["x-prompt-tokens"], "6");
    assert_eq!(headers["x-generated-tokens"], expected.len().to_string());
    assert_eq!(headers["x-compute-characters"], "5");
    assert_eq!(headers["x-compute-type"], "cpu");
    for name in [
        "x-compute-time",
        "x-total-time",
        "x-validation-time",
        "x-queue-time",
        "x-inference-time",
        "x-time-per-token",
    ] {
        assert!(
            headers[name].to_str().unwrap().parse::<f64>().is_ok(),
            "{name}"
        );
    }
    assert_eq!(headers["x-request-id"].len(), 32);
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_route_gives_a_list_with_the_prompt_in_front() {
    let server = serve().await;
    let parameters = json!({"max_new_tokens": 4});
    let (_, plain) = server
        .ask(
            "/generate",
            json!({"inputs": "Hi", "parameters": parameters}),
        )
        .await;
    let (status, list) = server
        .ask("/", json!({"inputs": "Hi", "parameters": parameters}))
        .await;
    assert_eq!(status, 200);
    assert_eq!(
        list[0]["generated_text"],
        format!("Hi{}", plain["generated_text"].as_str().unwrap())
    );
    let events = server
        .events(
            "/",
            json!({"inputs": "Hi", "stream": true, "parameters": parameters}),
        )
        .await;
    assert_eq!(
        served::json_events(&events).last().unwrap()["generated_text"],
        list[0]["generated_text"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_decide_between_greedy_and_sampling() {
    let server = serve().await;
    let ask = async |parameters: Value| {
        let body = json!({"inputs": "Hi", "parameters": parameters});
        server.ask("/generate", body).await.1
    };
    let greedy = ask(json!({"details": true, "max_new_tokens": 8})).await;
    assert_eq!(greedy["details"]["seed"], Value::Null);
    let seeded = json!({"details": true, "max_new_tokens": 8, "do_sample": true, "seed": 7});
    let (once, again) = (ask(seeded.clone()).await, ask(seeded).await);
    assert_eq!(once["details"]["seed"], 7);
    assert_eq!(once["generated_text"], again["generated_text"]);
    let warm = json!({"details": true, "max_new_tokens": 8, "temperature": 0.9});
    let (first, second) = (ask(warm.clone()).await, ask(warm).await);
    assert!(first["details"]["seed"].is_u64());
    assert_ne!(first["details"]["seed"], second["details"]["seed"]);
    let repeated = ask(
        json!({"details": true, "max_new_tokens": 8, "temperature": 0.9,
        "seed": first["details"]["seed"]}),
    )
    .await;
    assert_eq!(repeated["generated_text"], first["generated_text"]);
    // Without any parameters, TGI samples.
    let (_, bare) = server
        .ask("/", json!({"inputs": "Hi", "parameters": null}))
        .await;
    assert!(bare[0]["generated_text"].is_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_best_of_two_has_the_greater_mean_log_probability() {
    let server = serve().await;
    let body = json!({"inputs": "Hi", "parameters": {"best_of": 2, "do_sample": true, "details": true, "max_new_tokens": 6}});
    let (status, answer) = server.ask("/generate", body).await;
    assert_eq!(status, 200, "{answer}");
    let mean = |tokens: &Value| {
        let logprobs: Vec<f64> = tokens
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["logprob"].as_f64().unwrap())
            .collect();
        logprobs.iter().sum::<f64>() / logprobs.len() as f64
    };
    let details = &answer["details"];
    let others = details["best_of_sequences"].as_array().unwrap();
    assert_eq!(others.len(), 1);
    assert!(mean(&details["tokens"]) >= mean(&others[0]["tokens"]));
    assert_ne!(details["seed"], others[0]["seed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn prompt_and_top_log_probabilities_are_reported() {
    let server = serve().await;
    let parameters = json!({"decoder_input_details": true, "top_n_tokens": 3, "max_new_tokens": 4});
    let (status, answer) = server
        .ask(
            "/generate",
            json!({"inputs": "Hey", "parameters": parameters}),
        )
        .await;
    assert_eq!(status, 200, "{answer}");
    let prefill = answer["details"]["prefill"].as_array().unwrap();
    let ids: Vec<u32> = prefill
        .iter()
        .map(|token| token["id"].as_u64().unwrap() as u32)
        .collect();
    assert_eq!(ids, prompt_ids("Hey"));
    assert_eq!(
        (&prefill[0]["text"], &prefill[0]["logprob"]),
        (&json!("<s>"), &Value::Null)
    );
    assert!(prefill[1..].iter().all(|token| token["logprob"].is_f64()));
    let top = answer["details"]["top_tokens"].as_array().unwrap();
    assert_eq!(
        top.len(),
        answer["details"]["tokens"].as_array().unwrap().len()
    );
    assert!(
        top.iter()
            .all(|alternatives| alternatives.as_array().unwrap().len() == 3)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn truncate_keeps_the_end_of_the_prompt() {
    let server = serve().await;
    let expected = server.greedy(&"end".bytes().map(u32::from).collect::<Vec<_>>(), "", 5);
    // The last is longer than any text that is tokenized whole, and cut within a character.
    for long in ["x".repeat(400), "x".repeat(40_000), "xé日".repeat(5_000)] {
        let body = json!({"inputs": long + "end", "parameters": {"truncate": 3, "max_new_tokens": 5, "details": true}});
        let (status, answer) = server.ask("/generate", body).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["generated_text"], server.text(&expected));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_whole_and_streamed_answers_alike_and_only_openai_s_lose_it() {
    let server = serve().await;
    let (_, free) = server
        .ask(
            "/generate",
            json!({"inputs": "stop", "parameters": {"max_new_tokens": 40}}),
        )
        .await;
    let whole = free["generated_text"].as_str().unwrap();
    // A stop in the middle of the text that begins inside one token and ends inside another.
    let at = whole
        .char_indices()
        .map(|(at, _)| at)
        .nth(whole.chars().count() / 2)
        .unwrap();
    let stop: String = whole[at..].chars().take(7).collect();
    let cut = &whole[..whole.find(&stop).unwrap()];
    let expected = format!("{cut}{stop}");
    let parameters = json!({"max_new_tokens": 40, "stop": [stop], "details": true});
    let body = json!({"inputs": "stop", "parameters": parameters});
    let (_, answer) = server.ask("/generate", body.clone()).await;
    assert_eq!(answer["generated_text"], expected);
    assert_eq!(answer["details"]["finish_reason"], "stop_sequence");
    let events = served::json_events(&server.events("/generate_stream", body).await);
    let joined: String = events
        .iter()
        .filter(|event| event["token"]["special"] == false)
        .map(|event| event["token"]["text"].as_str().unwrap())
        .collect();
    assert_eq!(joined, expected);
    let last = events.last().unwrap();
    assert_eq!(last["generated_text"], expected);
    assert_eq!(last["details"]["finish_reason"], "stop_sequence");
    let mut body = json!({"model": "tgi", "prompt": "stop", "max_tokens": 40, "temperature": 0.0, "stop": [stop]});
    let (_, answer) = server.ask("/v1/completions", body.clone()).await;
    assert_eq!(answer["choices"][0]["text"], cut);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    body["stream"] = json!(true);
    let mut events = server.events("/v1/completions", body).await;
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    let joined: String = served::json_events(&events)
        .iter()
        .map(|event| event["choices"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(joined, cut);
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_and_conversations_are_tokenized() {
    let server = serve().await;
    let (_, tokens) = server.ask("/tokenize", json!({"inputs": "aé"})).await;
    let ids: Vec<u64> = tokens
        .as_array()
        .unwrap()
        .iter()
        .map(|token| token["id"].as_u64().unwrap())
        .collect();
    assert_eq!(ids, [u64::from(BOS), 0x61, 0xC3, 0xA9]);
    assert_eq!(
        tokens[1],
        json!({"id": 0x61, "text": "a", "start": 0, "stop": 1})
    );
    let (_, bare) = server
        .ask(
            "/tokenize",
            json!({"inputs": "a", "add_special_tokens": false}),
        )
        .await;
    assert_eq!(bare.as_array().unwrap().len(), 1);
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let (_, chat) = server.ask("/chat_tokenize", chat).await;
    assert_eq!(chat["templated_text"], "<s><user>Hi<assistant>");
    assert_eq!(chat["tokenize_response"][0]["id"], BOS);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_says_what_it_is_and_that_it_is_well() {
    let server = serve().await;
    for path in ["/health", "/readyz", "/livez", "/ping", "/"] {
        assert_eq!(server.look(path).await.0, 200, "{path}");
    }
    let (_, info) = server.look("/info").await;
    assert_eq!(info["model_id"], "demo");
    assert_eq!(info["max_total_tokens"], 512);
    assert_eq!(info["max_input_tokens"], 256);
    assert_eq!(info["model_dtype"], "float32");
    assert_eq!(info["activation_dtype"], "float32");
    assert_eq!(info["model_device_type"], "cpu");
    assert_eq!(info["cuda_graphs"], json!([1, 2]));
    assert_eq!((&info["shards"], &info["threads"]), (&json!(1), &json!(1)));
    assert_eq!(info["router"], "text-generation-router");
}

#[tokio::test(flavor = "multi_thread")]
async fn sagemaker_s_route_takes_every_kind_of_body() {
    let server = serve().await;
    let (status, list) = server
        .ask(
            "/invocations",
            json!({"inputs": "Hi", "parameters": {"max_new_tokens": 2}}),
        )
        .await;
    assert_eq!((status, list[0]["generated_text"].is_string()), (200, true));
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2});
    assert_eq!(
        server.ask("/invocations", chat).await.1["object"],
        "chat.completion"
    );
    assert_eq!(
        server.ask("/invocations", json!({"prompt": "Hi"})).await.1["object"],
        "text_completion"
    );
    assert_eq!(
        server.ask("/invocations", json!({"text": "Hi"})).await.0,
        422
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_is_reached_by_all_its_selectors_and_named_in_details() {
    let server = serve().await;
    let digest = server.load("warm").await;
    let expected = server.text(&server.greedy(&prompt_ids("Hi"), &digest, 8));
    let base = server.text(&server.greedy(&prompt_ids("Hi"), "", 8));
    assert_ne!(expected, base);
    for selector in ["adapter_id", "lora_id"] {
        let parameters = json!({selector: "warm", "max_new_tokens": 8, "details": true});
        let (status, answer) = server
            .ask(
                "/generate",
                json!({"inputs": "Hi", "parameters": parameters}),
            )
            .await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["generated_text"], expected);
        assert_eq!(
            answer["details"]["adapter"],
            json!({"id": "warm", "digest": digest})
        );
    }
    let completion = json!({"model": "warm", "prompt": "Hi", "max_tokens": 8, "temperature": 0});
    let (_, answer) = server.ask("/v1/completions", completion).await;
    assert_eq!(answer["choices"][0]["text"], expected);
    assert_eq!(answer["details"]["adapter"]["digest"], digest);
    let parameters = json!({"lora_id": "empty", "max_new_tokens": 8, "adapter_source": "local"});
    let (_, answer) = server
        .ask(
            "/generate",
            json!({"inputs": "Hi", "parameters": parameters}),
        )
        .await;
    assert_eq!(answer["generated_text"], base);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_adapter_is_never_the_base() {
    let server = serve().await;
    for path in ["/generate", "/generate_stream"] {
        for selector in ["adapter_id", "lora_id"] {
            let body =
                json!({"inputs": "Hi", "parameters": {selector: "nobody", "max_new_tokens": 2}});
            let (status, answer) = server.ask(path, body).await;
            assert_eq!(
                (status, &answer["error_type"]),
                (404, &json!("not_found")),
                "{answer}"
            );
        }
    }
    let chat = json!({"model": "nobody", "messages": [{"role": "user", "content": "Hi"}]});
    let (status, answer) = server.ask("/v1/chat/completions", chat).await;
    assert_eq!((status, &answer["error"]["param"]), (404, &json!("model")));
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_come_and_go_over_http() {
    let server = serve().await;
    let digest = server.load("warm").await;
    let (_, one) = server.look("/v1/adapters/warm").await;
    assert_eq!(
        (&one["state"], &one["rank_max"], &one["source"]),
        (&json!("ready"), &json!(8), &json!("warm"))
    );
    let (_, pinned) = read_post(&server, "/v1/adapters/warm/pin").await;
    assert_eq!(pinned["pinned"], true);
    assert_eq!(
        read_post(&server, "/v1/adapters/warm/unpin").await.1["pinned"],
        false
    );
    let (_, list) = server.look("/v1/adapters").await;
    assert_eq!(list["data"][0]["digest"], digest);
    let (_, models) = server.look("/v1/models").await;
    let names: Vec<&str> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["demo", "warm"]);
    assert_eq!(server.look("/v1/models/warm").await.1["parent"], "demo");
    let (_, again) = server
        .ask("/download_lora_adapter", json!({"lora_id": "cold"}))
        .await;
    assert_eq!(
        (&again["lora_id"], &again["adapter"]["state"]),
        (&json!("cold"), &json!("ready"))
    );
    let (status, gone) =
        served::read(server.delete("/v1/adapters/warm").send().await.unwrap()).await;
    assert!(status == 200 || status == 202, "{gone}");
    let body = json!({"inputs": "Hi", "parameters": {"adapter_id": "warm"}});
    assert_eq!(server.ask("/generate", body).await.0, 404);
    for path in ["/v1/adapters/nobody/pin", "/v1/adapters/nobody/unpin"] {
        assert_eq!(read_post(&server, path).await.0, 404);
    }
    assert_eq!(
        server
            .delete("/v1/adapters/nobody")
            .send()
            .await
            .unwrap()
            .status(),
        404
    );
    assert_eq!(server.look("/v1/adapters/nobody").await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_shown_from_the_allowed_one_on_however_that_is_written() {
    let server = serve_with(|setup| {
        let root = setup.settings.lora_dir.take().unwrap();
        setup.settings.lora_dir = Some(root.join("../adapters"));
    })
    .await;
    server.load("warm").await;
    let (_, adapter) = server.look("/v1/adapters/warm").await;
    assert_eq!(adapter["source"], "warm");
}

async fn read_post(server: &served::Served, path: &str) -> (u16, Value) {
    served::read(
        server
            .client
            .post(format!("{}{path}", server.url))
            .send()
            .await
            .unwrap(),
    )
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unloaded_adapter_finishes_what_runs() {
    let server = serve().await;
    let digest = server.load("warm").await;
    server.shard.faults().step_delay(Duration::from_millis(20));
    let body = json!({"inputs": "Hi", "parameters": {"adapter_id": "warm", "max_new_tokens": 30, "ignore_eos_token": true}});
    let mut stream = server.post("/generate_stream", body).send().await.unwrap();
    let first = stream.chunk().await.unwrap().unwrap();
    let gone = server.delete("/v1/adapters/warm").send().await.unwrap();
    assert_eq!(gone.status(), 202);
    assert_eq!(server.look("/info").await.1["adapters"], json!([]));
    let rest = stream.text().await.unwrap();
    let events = served::json_events(&served::data(
        &(String::from_utf8(first.to_vec()).unwrap() + &rest),
    ));
    assert_eq!(events.len(), 30);
    let ids: Vec<u32> = events
        .iter()
        .map(|event| event["token"]["id"].as_u64().unwrap() as u32)
        .collect();
    assert_eq!(
        ids[..10],
        server.greedy(&prompt_ids("Hi"), &digest, 30)[..10]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_requests_are_told_when_to_come_back() {
    let server = serve_with(|setup| setup.settings.max_concurrent_requests = 1).await;
    server.shard.faults().step_delay(Duration::from_millis(30));
    let body =
        json!({"inputs": "Hi", "parameters": {"max_new_tokens": 40, "ignore_eos_token": true}});
    let mut first = server
        .post("/generate_stream", body.clone())
        .send()
        .await
        .unwrap();
    first.chunk().await.unwrap().unwrap();
    for path in ["/generate", "/generate_stream"] {
        let refused = server.post(path, body.clone()).send().await.unwrap();
        let wait: u64 = refused.headers()["retry-after"]
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        assert!((1..=60).contains(&wait));
        assert_eq!(refused.headers()["x-should-retry"], "true");
        let (status, body) = served::read(refused).await;
        assert_eq!((status, &body["error_type"]), (429, &json!("overloaded")));
    }
    drop(first);
    server.idle().await;
    server.shard.faults().step_delay(Duration::ZERO);
    let mut status = 429;
    for _ in 0..100 {
        status = server
            .ask(
                "/generate",
                json!({"inputs": "Hi", "parameters": {"max_new_tokens": 1}}),
            )
            .await
            .0;
        if status == 200 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(status, 200, "the permit comes back");
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_finishes_what_runs_and_refuses_the_rest() {
    let server = serve().await;
    server.shard.faults().step_delay(Duration::from_millis(20));
    let body =
        json!({"inputs": "Hi", "parameters": {"max_new_tokens": 30, "ignore_eos_token": true}});
    let mut open = server
        .post("/generate_stream", body.clone())
        .send()
        .await
        .unwrap();
    let first = open.chunk().await.unwrap().unwrap();
    server.stop.cancel();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (status, refused) = server.ask("/generate", body).await;
    assert_eq!(
        (status, &refused["error_type"]),
        (503, &json!("unavailable"))
    );
    assert_eq!(server.look("/readyz").await.0, 503);
    assert_eq!(server.look("/livez").await.0, 200);
    let rest = String::from_utf8(first.to_vec()).unwrap() + &open.text().await.unwrap();
    assert_eq!(served::data(&rest).len(), 30);
    tokio::time::timeout(Duration::from_secs(10), server.running)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_an_answer() {
    let server = serve().await;
    server.shard.faults().step_delay(Duration::from_millis(30));
    let body =
        json!({"inputs": "Hi", "parameters": {"max_new_tokens": 100, "ignore_eos_token": true}});
    let response = server
        .post("/generate", body)
        .header("x-request-timeout-ms", "200")
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["x-should-retry"], "false");
    let (status, answer) = served::read(response).await;
    assert_eq!((status, &answer["error_type"]), (504, &json!("deadline")));
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_is_documented() {
    let server = serve().await;
    let (status, document) = server.look("/api-doc/openapi.json").await;
    assert_eq!(status, 200);
    for path in [
        "/generate",
        "/generate_stream",
        "/",
        "/tokenize",
        "/chat_tokenize",
        "/info",
        "/health",
        "/metrics",
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/adapters",
        "/v1/adapters/{name}",
        "/download_lora_adapter",
        "/invocations",
    ] {
        assert!(document["paths"].get(path).is_some(), "{path}");
    }
    let page = server.get("/docs/").send().await.unwrap();
    assert!(page.text().await.unwrap().contains("swagger-ui"));
}
