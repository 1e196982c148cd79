//! Streams: their shape, their one terminal event, and what happens when either side leaves.
#![allow(clippy::unwrap_used)]

mod served;

use std::time::Duration;

use kvrun_fake_shard::{Fault, Mark};
use serde_json::{Value, json};
use served::{EOS, data, json_events, prompt_ids, serve};

fn body(prompt: &str, tokens: u32) -> Value {
    json!({"inputs": prompt, "parameters": {"max_new_tokens": tokens, "details": true}})
}

/// Whether an event of TGI's streams is the last one.
fn is_terminal(event: &Value) -> bool {
    !event["generated_text"].is_null() || !event["error"].is_null()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_has_tgi_s_shape() {
    let server = serve().await;
    let expected = server.greedy(&prompt_ids("shape"), "", 3);
    let mut events = json_events(&server.events("/generate_stream", body("shape", 3)).await);
    assert_eq!(events.len(), 3);
    for (index, event) in events.iter_mut().enumerate() {
        let token = json!({"id": expected[index], "text": event["token"]["text"], "special": expected[index] == EOS,
            "logprob": event["token"]["logprob"]});
        assert!(event["token"]["logprob"].is_number());
        let last = index == 2;
        let generated = if last {
            json!(server.text(&expected))
        } else {
            Value::Null
        };
        let details = std::mem::take(&mut event["details"]);
        assert_eq!(
            *event,
            json!({"index": index + 1, "token": token, "generated_text": generated, "details": null})
        );
        if last {
            assert_eq!(details["finish_reason"], "length");
            assert_eq!(
                (&details["generated_tokens"], &details["input_length"]),
                (&json!(3), &json!(6))
            );
            assert_eq!(
                (
                    &details["seed"],
                    &details["adapter"],
                    &details["cached_tokens"]
                ),
                (&Value::Null, &Value::Null, &json!(0))
            );
        } else {
            assert!(details.is_null());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn details_come_only_when_asked_for_and_alternatives_too() {
    let server = serve().await;
    let plain = json!({"inputs": "Hi", "parameters": {"max_new_tokens": 2}});
    let events = json_events(&server.events("/generate_stream", plain).await);
    assert!(
        events
            .iter()
            .all(|event| event["details"].is_null() && event.get("top_tokens").is_none())
    );
    let top = json!({"inputs": "Hi", "parameters": {"max_new_tokens": 2, "top_n_tokens": 2}});
    let events = json_events(&server.events("/generate_stream", top).await);
    assert!(
        events
            .iter()
            .all(|event| event["top_tokens"].as_array().unwrap().len() == 2)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn streamed_text_joined_is_the_whole_answer_whatever_characters_it_has() {
    let server = serve().await;
    for number in 0..40 {
        let prompt = format!("text {number}");
        let (_, whole) = server.ask("/generate", body(&prompt, 24)).await;
        let events = json_events(&server.events("/generate_stream", body(&prompt, 24)).await);
        let ordinary = events
            .iter()
            .filter(|event| event["token"]["special"] == false);
        let joined: String = ordinary
            .map(|event| event["token"]["text"].as_str().unwrap())
            .collect();
        assert_eq!(whole["generated_text"], joined);
        assert_eq!(events.last().unwrap()["generated_text"], joined);
        let ids: Vec<u32> = events
            .iter()
            .map(|event| event["token"]["id"].as_u64().unwrap() as u32)
            .collect();
        let expected = server.greedy(&prompt_ids(&prompt), "", 24);
        assert_eq!(ids, expected);
        assert_eq!(joined, server.text(&expected));
        assert_eq!(events.iter().filter(|event| is_terminal(event)).count(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_token_is_special_and_last() {
    let server = serve().await;
    // The fake's answers are long on average; some prompt among many ends early.
    let prompt = (0..20_000)
        .map(|number| format!("p{number}"))
        .find(|prompt| {
            let ids = server.greedy(&prompt_ids(prompt), "", 20);
            ids.last() == Some(&EOS) && ids.len() > 2
        })
        .expect("one of many answers ends by itself");
    let events = json_events(&server.events("/generate_stream", body(&prompt, 20)).await);
    let last = events.last().unwrap();
    assert_eq!(
        (&last["token"]["text"], &last["token"]["special"]),
        (&json!("</s>"), &json!(true))
    );
    assert_eq!(last["details"]["finish_reason"], "eos_token");
    assert!(!last["generated_text"].as_str().unwrap().contains("</s>"));
    let ignoring =
        json!({"inputs": prompt, "parameters": {"max_new_tokens": 20, "ignore_eos_token": true}});
    assert_eq!(server.events("/generate_stream", ignoring).await.len(), 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_frees_everything() {
    let server = serve().await;
    server.shard.faults().step_delay(Duration::from_millis(10));
    let endless =
        json!({"inputs": "Hi", "parameters": {"max_new_tokens": 200, "ignore_eos_token": true}});
    let mut streams = vec![];
    for _ in 0..4 {
        let mut stream = server
            .post("/generate_stream", endless.clone())
            .send()
            .await
            .unwrap();
        stream.chunk().await.unwrap().unwrap();
        streams.push(stream);
    }
    assert_eq!(server.engine.status().running, 4);
    drop(streams);
    server.idle().await;
    assert!(
        server.shard.watch().last().step < 190,
        "the answers did not run to their end"
    );
    let status = server.engine.status();
    assert_eq!(status.free_pages + status.cached_pages, status.pages);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_row_ends_its_stream_with_one_error_event() {
    let server = serve().await;
    let ids = server.greedy(&prompt_ids("poison"), "", 20);
    server
        .shard
        .faults()
        .mark(ids[4], Mark::RowError("nan_logits: row 0".to_owned()));
    let events = json_events(&server.events("/generate_stream", body("poison", 20)).await);
    assert_eq!(events.iter().filter(|event| is_terminal(event)).count(), 1);
    let last = events.last().unwrap();
    assert_eq!(last["error_type"], "generation");
    assert!(events.len() > 2);
    let response = server
        .post("/generate", body("poison", 20))
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["x-should-retry"], "false");
    assert_eq!(served::read(response).await.0, 424);
    let chat = json!({"prompt": "poison", "stream": true, "max_tokens": 20, "temperature": 0});
    let events = server.events("/v1/completions", chat).await;
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(
        (&last["error"]["type"], &last["error"]["code"]),
        (&json!("server_error"), &json!("generation"))
    );
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_dies_loses_no_event() {
    let mut server = serve().await;
    let expected = server.greedy(&prompt_ids("again"), "", 30);
    server.shard.faults().after_steps(8, Fault::Die);
    let response = server
        .post("/generate_stream", body("again", 30))
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let reading = tokio::spawn(response.text());
    while server.shard.alive() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    server.shard.restart().unwrap();
    let text = tokio::time::timeout(Duration::from_secs(20), reading)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let events = json_events(&data(&text));
    let ids: Vec<u32> = events
        .iter()
        .map(|event| event["token"]["id"].as_u64().unwrap() as u32)
        .collect();
    assert_eq!(ids, expected);
    let indices: Vec<u64> = events
        .iter()
        .map(|event| event["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indices, (1..=expected.len() as u64).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_before_the_first_byte_have_their_status() {
    let server = serve().await;
    let bad = json!({"inputs": "Hi", "parameters": {"temperature": -1.0}});
    let response = server.post("/generate_stream", bad).send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "application/json");
    assert_eq!(served::read(response).await.0, 422);
    let bad = json!({"messages": [{"role": "user", "content": "Hi"}], "stream": true, "temperature": -1.0});
    assert_eq!(server.ask("/v1/chat/completions", bad).await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_streams_at_once_each_get_their_own_answer() {
    let server = serve().await;
    let digest = server.load("warm").await;
    let asks = (0..24).map(|number| {
        let server = &server;
        let digest = &digest;
        async move {
            let prompt = format!("stream {number}");
            let adapted = number % 2 == 0;
            let mut body = body(&prompt, 16);
            if adapted {
                body["parameters"]["adapter_id"] = json!("warm");
            }
            let events = json_events(&server.events("/generate_stream", body).await);
            let ids: Vec<u32> = events
                .iter()
                .map(|event| event["token"]["id"].as_u64().unwrap() as u32)
                .collect();
            assert_eq!(
                ids,
                server.greedy(&prompt_ids(&prompt), if adapted { digest } else { "" }, 16)
            );
        }
    });
    futures::future::join_all(asks).await;
    server.idle().await;
    assert!(
        server.shard.watch().widest().rows > 1,
        "they ran in one batch"
    );
}
