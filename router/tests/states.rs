//! Models that keep something else than pages: a source read by an encoder, a recurrent state.
#![allow(clippy::unwrap_used)]

mod served;

use std::time::Duration;

use futures::future::join_all;
use kvrun_fake_shard::{FakeShard, State, tokens};
use kvrun_proto::Sampling;
use serde_json::{Value, json};
use served::{EOS, Served, VOCABULARY, json_events, prompt_ids, serve_with};

/// The id that answers of the encoder-decoder model follow.
const START: u32 = 7;

async fn encoder() -> Served {
    serve_with(|setup| setup.shard.state = State::Encoder(START)).await
}

async fn recurrent() -> Served {
    serve_with(|setup| {
        setup.shard.state = State::Slots;
        // Fewer than one of the prompts below has.
        setup.shard.pages = 3;
    })
    .await
}

/// The greedy answer to a source.
fn answer(text: &str, count: u32) -> Vec<u32> {
    let source: Vec<u64> = prompt_ids(text).into_iter().map(u64::from).collect();
    let chain = tokens::extend(tokens::root_beside(tokens::root(""), &source), START);
    tokens::answer_after(chain, &Sampling::default(), count, &[EOS], VOCABULARY)
}

fn body(text: &str, more: Value) -> Value {
    let mut parameters = json!({"max_new_tokens": 8, "details": true});
    parameters
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    json!({"inputs": text, "parameters": parameters})
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encoder_reads_the_prompt_and_the_answer_follows_its_own_start() {
    let server = encoder().await;
    let text = "translate: the house is small";
    let source = prompt_ids(text).len();
    let expected = server.text(&answer(text, 8));
    let response = server
        .post("/generate", body(text, json!({})))
        .send()
        .await
        .unwrap();
    assert_eq!(
        response.headers()["x-prompt-tokens"],
        source.to_string().as_str()
    );
    let (status, whole) = served::read(response).await;
    assert_eq!((status, &whole["generated_text"]), (200, &json!(expected)));
    let full = body(text, json!({"return_full_text": true}));
    let (_, full) = server.ask("/generate", full).await;
    assert_eq!(full["generated_text"], format!("{text}{expected}"));
    let events = json_events(
        &server
            .events("/generate_stream", body(text, json!({})))
            .await,
    );
    let last = &events.last().unwrap();
    assert_eq!(last["generated_text"], expected);
    assert_eq!(last["details"]["input_length"], source);
    let completion = json!({"prompt": text, "max_tokens": 8, "temperature": 0, "echo": true});
    let (_, completion) = server.ask("/v1/completions", completion).await;
    assert_eq!(
        completion["choices"][0]["text"],
        format!("{text}{expected}")
    );
    assert_eq!(completion["usage"]["prompt_tokens"], source);
    // The same source again shares nothing: what its decoder's pages hold was read from its own memory.
    assert_eq!(events.last().unwrap()["details"]["cached_tokens"], 0);
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_for_source_and_answer_each() {
    let server = serve_with(|setup| {
        setup.shard.state = State::Encoder(START);
        setup.settings.max_input_tokens = None;
        setup.engine.step_tokens = 64;
        setup.engine.max_total_tokens = 40;
    })
    .await;
    let (_, info) = server.look("/info").await;
    assert_eq!(
        (&info["max_input_tokens"], &info["max_total_tokens"]),
        (&json!(63), &json!(40))
    );
    let longest = "x".repeat(62);
    let (status, whole) = server
        .ask("/generate", body(&longest, json!({"max_new_tokens": 39})))
        .await;
    assert_eq!(status, 200, "{whole}");
    let (status, refused) = server
        .ask("/generate", body(&"x".repeat(63), json!({})))
        .await;
    let message = refused["error"].as_str().unwrap();
    assert_eq!(status, 422);
    assert!(message.contains("64 tokens and at most 63"), "{message}");
    let cut = body(&"x".repeat(90), json!({"truncate": 20}));
    let response = server.post("/generate", cut).send().await.unwrap();
    assert_eq!(response.headers()["x-prompt-tokens"], "20");
    let (status, refused) = server
        .ask("/generate", body("x", json!({"max_new_tokens": 40})))
        .await;
    let message = refused["error"].as_str().unwrap();
    assert_eq!(status, 422);
    assert!(message.contains("an answer has at most 39"), "{message}");
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encoder_predicts_none_of_its_prompt() {
    let server = encoder().await;
    let (status, refused) = server
        .ask(
            "/generate",
            body("x", json!({"decoder_input_details": true})),
        )
        .await;
    assert_eq!(status, 422);
    assert!(
        refused["error"]
            .as_str()
            .unwrap()
            .contains("`decoder_input_details`")
    );
    let echo = json!({"prompt": "x", "echo": true, "logprobs": 1});
    let (status, refused) = server.ask("/v1/completions", echo).await;
    assert_eq!((status, &refused["error"]["param"]), (400, &json!("echo")));
    let (_, info) = server.look("/info").await;
    assert_eq!(info["state_kinds"], json!(["pages", "memory"]));
    let off: Vec<&String> = info["off"].as_object().unwrap().keys().collect();
    assert_eq!(off, ["prefix_cache", "prompt_logprobs"]);
}

/// Kills the shard while answers are under way; none of them changes.
async fn survive(mut server: Served, texts: &[String], expected: impl Fn(&str) -> String) {
    server.shard.faults().step_delay(Duration::from_millis(2));
    for _ in 0..3 {
        let asked = join_all(texts.iter().map(|text| {
            server
                .post("/generate", body(text, json!({"max_new_tokens": 60})))
                .send()
        }));
        let asked = tokio::spawn(asked);
        tokio::time::sleep(Duration::from_millis(40)).await;
        FakeShard::restart(&mut server.shard).unwrap();
        for (text, response) in texts.iter().zip(asked.await.unwrap()) {
            let (status, answer) = served::read(response.unwrap()).await;
            assert_eq!(
                (status, &answer["generated_text"]),
                (200, &json!(expected(text)))
            );
        }
    }
    server.idle().await;
    assert_eq!(server.engine.status().running, 0);
}

fn texts() -> Vec<String> {
    (0..6u8)
        .map(|number| String::from(char::from(b'a' + number)).repeat(30 + 9 * usize::from(number)))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_are_read_again_after_the_death_of_a_shard() {
    let server = encoder().await;
    let tokenizer = kvrun_text::Tokenizer::load(server.home.path()).unwrap();
    survive(server, &texts(), |text| {
        tokenizer.decode(&answer(text, 60), true)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn recurrent_states_are_computed_again_after_the_death_of_a_shard() {
    let server = recurrent().await;
    let tokenizer = kvrun_text::Tokenizer::load(server.home.path()).unwrap();
    let greedy = |text: &str| {
        tokens::answer(
            &prompt_ids(text),
            "",
            &Sampling::default(),
            60,
            &[EOS],
            VOCABULARY,
        )
    };
    survive(server, &texts(), |text| {
        tokenizer.decode(&greedy(text), true)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recurrent_state_is_shared_with_nobody_and_short_of_no_pages() {
    let server = recurrent().await;
    let text = "x".repeat(200);
    let asked =
        (0..20).map(|_| server.ask("/generate", body(&text, json!({"max_new_tokens": 40}))));
    for (status, answer) in join_all(asked).await {
        assert_eq!(
            (status, &answer["details"]["cached_tokens"]),
            (200, &json!(0))
        );
    }
    let (_, info) = server.look("/info").await;
    assert_eq!(
        (&info["state_kinds"], &info["max_total_tokens"]),
        (&json!(["slots"]), &json!(512))
    );
    assert!(
        info["off"]["prefix_cache"]
            .as_str()
            .unwrap()
            .contains("recurrent")
    );
    assert!(info["off"]["speculation"].is_string());
    server.idle().await;
}
