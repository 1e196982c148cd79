//! OpenAI's routes over a real shard wire.
#![allow(clippy::unwrap_used)]

mod served;

use serde_json::{Value, json};
use served::{VOCABULARY, json_events, prompt_ids, serve};

fn chat_prompt(content: &str) -> Vec<u32> {
    let text = format!("<user>{content}<assistant>");
    std::iter::once(served::BOS)
        .chain(text.bytes().map(u32::from))
        .collect()
}

fn chat(content: &str, more: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8});
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_answer_has_openai_s_shape() {
    let server = serve().await;
    let expected = server.greedy(&chat_prompt("Hi"), "", 8);
    let (status, answer) = server
        .ask("/v1/chat/completions", chat("Hi", json!({"model": "demo"})))
        .await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(
        (&answer["object"], &answer["model"]),
        (&json!("chat.completion"), &json!("demo"))
    );
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    let choice = &answer["choices"][0];
    assert_eq!(
        choice["message"],
        json!({"role": "assistant", "content": server.text(&expected)})
    );
    assert_eq!(
        (
            &choice["index"],
            &choice["finish_reason"],
            &choice["logprobs"]
        ),
        (&json!(0), &json!("length"), &Value::Null)
    );
    let prompt = chat_prompt("Hi").len();
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": prompt, "completion_tokens": 8, "total_tokens": prompt + 8,
        "prompt_tokens_details": {"cached_tokens": 0}})
    );
    assert_eq!(answer["details"]["adapter"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_chat_says_the_same_and_ends_with_done() {
    let server = serve().await;
    let (_, whole) = server
        .ask("/v1/chat/completions", chat("Hi", json!({})))
        .await;
    let more = json!({"stream": true, "stream_options": {"include_usage": true}});
    let mut events = server
        .events("/v1/chat/completions", chat("Hi", more))
        .await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let events = json_events(&events);
    assert_eq!(
        events[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    let joined: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(whole["choices"][0]["message"]["content"], joined);
    let ends: Vec<&Value> = events
        .iter()
        .map(|event| &event["choices"][0]["finish_reason"])
        .filter(|end| !end.is_null())
        .collect();
    assert_eq!(ends, [&json!("length")]);
    let usage = events.last().unwrap();
    assert_eq!(
        (&usage["choices"], &usage["usage"]["completion_tokens"]),
        (&json!([]), &json!(8))
    );
    assert!(
        events
            .iter()
            .all(|event| event["id"] == events[0]["id"]
                && event["object"] == "chat.completion.chunk")
    );
    let without = server
        .events("/v1/chat/completions", chat("Hi", json!({"stream": true})))
        .await;
    assert!(without.iter().all(|event| !event.contains("\"usage\"")));
}

#[tokio::test(flavor = "multi_thread")]
async fn several_answers_differ_and_a_seed_repeats_them() {
    let server = serve().await;
    let more = json!({"n": 3, "temperature": 1, "seed": -5});
    let (_, once) = server
        .ask("/v1/chat/completions", chat("Hi", more.clone()))
        .await;
    let (_, again) = server
        .ask("/v1/chat/completions", chat("Hi", more.clone()))
        .await;
    let texts = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap();
        choices
            .iter()
            .map(|choice| choice["message"]["content"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(texts(&once), texts(&again));
    assert_eq!(texts(&once).len(), 3);
    assert_ne!(texts(&once)[0], texts(&once)[1]);
    assert_eq!(once["usage"]["prompt_tokens"], chat_prompt("Hi").len());
    let mut streamed = chat("Hi", more);
    streamed["stream"] = json!(true);
    let events = server.events("/v1/chat/completions", streamed).await;
    let mut joined = vec![String::new(); 3];
    for event in json_events(&events[..events.len() - 1]) {
        let choice = &event["choices"][0];
        joined[choice["index"].as_u64().unwrap() as usize] +=
            choice["delta"]["content"].as_str().unwrap_or_default();
    }
    assert_eq!(joined, texts(&once));
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_log_probabilities_name_every_token() {
    let server = serve().await;
    let (_, answer) = server
        .ask(
            "/v1/chat/completions",
            chat("Hi", json!({"logprobs": true, "top_logprobs": 2})),
        )
        .await;
    let content = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(content.len(), 8);
    for token in content {
        assert!(token["logprob"].is_f64());
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
        let whole = !token["token"].as_str().unwrap().contains('\u{fffd}');
        assert_eq!(token["bytes"].is_array(), whole);
    }
    let events = server
        .events(
            "/v1/chat/completions",
            chat("Hi", json!({"logprobs": true, "stream": true})),
        )
        .await;
    let counted: usize = json_events(&events[..events.len() - 1])
        .iter()
        .filter_map(|event| {
            event["choices"][0]["logprobs"]["content"]
                .as_array()
                .map(Vec::len)
        })
        .sum();
    assert_eq!(counted, 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_come_as_text_as_ids_and_in_lists() {
    let server = serve().await;
    let ask = async |prompt: Value| {
        let body = json!({"prompt": prompt, "max_tokens": 6, "temperature": 0});
        let (status, answer) = server.ask("/v1/completions", body).await;
        assert_eq!(status, 200, "{answer}");
        let choices = answer["choices"].as_array().unwrap().clone();
        choices
            .into_iter()
            .map(|choice| choice["text"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let (hi, ho) = (ask(json!("Hi")).await, ask(json!("Ho")).await);
    assert_eq!(hi[0], server.text(&server.greedy(&prompt_ids("Hi"), "", 6)));
    assert_eq!(ask(json!(prompt_ids("Hi"))).await, hi);
    assert_eq!(
        ask(json!(["Hi", "Ho"])).await,
        [hi.clone(), ho.clone()].concat()
    );
    assert_eq!(
        ask(json!([prompt_ids("Hi"), prompt_ids("Ho")])).await,
        [hi, ho].concat()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_default_to_sixteen_tokens_and_count_usage() {
    let server = serve().await;
    let body = json!({"prompt": ["Hi", "Ho"], "ignore_eos": true});
    let (_, answer) = server.ask("/v1/completions", body).await;
    assert_eq!(answer["usage"]["completion_tokens"], 32, "{answer}");
    assert_eq!(answer["usage"]["prompt_tokens"], 6);
    assert_eq!(answer["object"], "text_completion");
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
}

#[tokio::test(flavor = "multi_thread")]
async fn echo_puts_the_prompt_and_its_log_probabilities_in_front() {
    let server = serve().await;
    let plain = json!({"prompt": "Hey", "max_tokens": 4, "temperature": 0});
    let (_, answer) = server.ask("/v1/completions", plain).await;
    let continuation = answer["choices"][0]["text"].as_str().unwrap().to_owned();
    let body =
        json!({"prompt": "Hey", "max_tokens": 4, "temperature": 0, "echo": true, "logprobs": 1});
    let (status, answer) = server.ask("/v1/completions", body).await;
    assert_eq!(status, 200, "{answer}");
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], format!("Hey{continuation}"));
    let lists = &choice["logprobs"];
    assert_eq!(
        lists["tokens"].as_array().unwrap()[..4],
        ["<s>", "H", "e", "y"]
    );
    // The control token takes no room.
    assert_eq!(
        lists["text_offset"].as_array().unwrap()[..5],
        [0, 0, 1, 2, 3]
    );
    assert_eq!(lists["token_logprobs"][0], Value::Null);
    assert!(lists["token_logprobs"][1].is_f64());
    for list in ["token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(lists[list].as_array().unwrap().len(), 8, "{list}");
    }
    let stream =
        json!({"prompt": "Hey", "max_tokens": 4, "temperature": 0, "echo": true, "stream": true});
    let mut events = server.events("/v1/completions", stream).await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let joined: String = json_events(&events)
        .iter()
        .map(|event| event["choices"][0]["text"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(joined, format!("Hey{continuation}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn best_of_tells_the_better_ones() {
    let server = serve().await;
    let one = json!({"prompt": "Hi", "n": 1, "best_of": 4, "seed": 3, "logprobs": 0, "max_tokens": 6, "ignore_eos": true});
    let (status, best) = server.ask("/v1/completions", one).await;
    assert_eq!(status, 200, "{best}");
    let all = json!({"prompt": "Hi", "n": 4, "seed": 3, "logprobs": 0, "max_tokens": 6, "ignore_eos": true});
    let (_, all) = server.ask("/v1/completions", all).await;
    let score = |choice: &Value| -> f64 {
        choice["logprobs"]["token_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|logprob| logprob.as_f64().unwrap())
            .sum()
    };
    let most = all["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(score)
        .fold(f64::MIN, f64::max);
    assert_eq!(best["choices"].as_array().unwrap().len(), 1);
    assert!((score(&best["choices"][0]) - most).abs() < 1e-5);
    assert_eq!(best["usage"]["completion_tokens"], 24);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_base_model_has_several_names() {
    let server = serve().await;
    for model in ["demo", "tgi", "", "default", "dummy"] {
        assert_eq!(
            server
                .ask("/v1/chat/completions", chat("Hi", json!({"model": model})))
                .await
                .0,
            200,
            "{model}"
        );
    }
    let (status, error) = server
        .ask(
            "/v1/chat/completions",
            chat("Hi", json!({"model": "gpt-4"})),
        )
        .await;
    assert_eq!(status, 404);
    assert_eq!(error["error"]["param"], "model");
    assert_eq!(error["error"]["code"], "not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn sampling_fields_reach_the_shard() {
    let server = serve().await;
    // The fake honours suppressed ids, so an answer that would end at once goes on.
    let prompt = (0..50_000)
        .map(|number| format!("q{number}"))
        .find(|prompt| server.greedy(&prompt_ids(prompt), "", 1) == [served::EOS])
        .expect("one of many answers ends at once");
    let body = json!({"prompt": prompt, "temperature": 0, "max_tokens": 10});
    assert_eq!(
        server.ask("/v1/completions", body.clone()).await.1["usage"]["completion_tokens"],
        1
    );
    let mut longer = body;
    longer["min_tokens"] = json!(5);
    let (_, answer) = server.ask("/v1/completions", longer).await;
    assert!(
        answer["usage"]["completion_tokens"].as_u64().unwrap() >= 5,
        "{answer}"
    );
    let extensions = json!({"prompt": "Hi", "top_k": -1, "top_p": 1, "min_p": 0.1, "typical_p": 1, "repetition_penalty": 1.1,
        "frequency_penalty": -2, "presence_penalty": 2, "logit_bias": {"5": -100, (VOCABULARY - 1).to_string(): 100},
        "user": "someone", "stop": "zzz"});
    assert_eq!(server.ask("/v1/completions", extensions).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_may_come_in_parts_and_as_answers_were_given() {
    let server = serve().await;
    let parts = json!({"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}], "name": "Ann"},
        {"role": "assistant", "content": "Yes?", "refusal": null, "tool_calls": null},
        {"role": "user", "content": "Hi"}]});
    let (_, chat) = server.ask("/chat_tokenize", parts).await;
    assert_eq!(
        chat["templated_text"],
        "<s><system>Be brief.<user>Hi<assistant>Yes?<user>Hi<assistant>"
    );
}
