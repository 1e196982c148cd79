//! Bodies that are no requests: broken, too deep, with fields that are unknown, of another type, null or not supported.
#![allow(clippy::unwrap_used)]

mod refused;
mod served;

use refused::{chat, refused, refused_openai, send_raw};
use serde_json::json;
use served::serve;

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_not_utf_8_not_json_or_too_deep() {
    let server = serve().await;
    let (status, answer) = send_raw(&server, b"{\"inputs\": \"\xff\xfe\"}".to_vec()).await;
    assert_eq!(status, 422);
    assert!(answer["error"].as_str().unwrap().contains("UTF-8"));
    assert_eq!(
        send_raw(&server, b"{\"inputs\": \"\\ud800\"}".to_vec())
            .await
            .0,
        422
    );
    assert_eq!(send_raw(&server, b"{\"inputs\": ".to_vec()).await.0, 422);
    assert_eq!(send_raw(&server, vec![]).await.0, 422);
    let deep = format!(
        "{{\"inputs\": {}1{}}}",
        "[".repeat(40_000),
        "]".repeat(40_000)
    );
    let (status, answer) = send_raw(&server, deep.into_bytes()).await;
    assert_eq!(status, 422);
    assert!(answer["error"].as_str().unwrap().contains("65 levels"));
    // A NUL is a character like any other.
    assert_eq!(
        send_raw(
            &server,
            br#"{"inputs": "\u0000", "parameters": {"max_new_tokens": 1}}"#.to_vec()
        )
        .await
        .0,
        200
    );
    let text = server
        .client
        .post(format!("{}/generate", server.url))
        .header("content-type", "text/plain");
    assert_eq!(
        text.body("{\"inputs\": \"Hi\"}")
            .send()
            .await
            .unwrap()
            .status(),
        415
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_fields_are_named() {
    let server = serve().await;
    refused(
        &server,
        json!({"guidance": 3}),
        &["unknown field `guidance`"],
    )
    .await;
    let (status, answer) = server
        .ask("/generate", json!({"inputs": "Hi", "prompt": "Hi"}))
        .await;
    assert_eq!(status, 422);
    assert!(answer["error"].as_str().unwrap().contains("`prompt`"));
    refused_openai(
        &server,
        "/v1/completions",
        json!({"prompt": "Hi", "guided_json": {}}),
        "guided_json",
    )
    .await;
    refused_openai(
        &server,
        "/v1/chat/completions",
        chat(json!({"chat_template": "x"})),
        "chat_template",
    )
    .await;
    refused_openai(
        &server,
        "/v1/adapters",
        json!({"path": "warm", "force": true}),
        "force",
    )
    .await;
    assert_eq!(
        server
            .ask("/tokenize", json!({"inputs": "a", "x": 1}))
            .await
            .0,
        422
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_of_another_type_is_named_with_its_place() {
    let server = serve().await;
    let wrong = json!({"max_new_tokens": "5"});
    refused(&server, wrong, &["`parameters.max_new_tokens`", "\"5\""]).await;
    refused(&server, json!({"stop": "x"}), &["`parameters.stop`"]).await;
    for (body, param) in [
        (chat(json!({"max_tokens": "5"})), "max_tokens"),
        (chat(json!({"stop": 5})), "stop"),
        (
            chat(json!({"messages": [{"role": "user", "content": 5}]})),
            "messages[0].content",
        ),
        (chat(json!({"messages": [{"content": "Hi"}]})), "role"),
    ] {
        let path = "/v1/chat/completions";
        refused_openai(&server, path, body.clone(), param).await;
        let (_, answer) = server.ask(path, body).await;
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(
            message.contains(param) && !message.contains("enum"),
            "{message}"
        );
    }
    let (status, answer) = send_raw(&server, br#"{"inputs": "Hi"} and more"#.to_vec()).await;
    assert_eq!(status, 422, "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_field_that_is_null_asks_for_nothing_known_or_not() {
    let server = serve().await;
    let parameters = json!({"guidance": null, "max_new_tokens": 1});
    let body = json!({"inputs": "Hi", "parameters": parameters, "prompt": null});
    for path in ["/generate", "/", "/invocations"] {
        let (status, answer) = server.ask(path, body.clone()).await;
        assert_eq!(status, 200, "{path} {answer}");
    }
    // As OpenAI's client dumps an answer's message when it goes into the next request.
    let said = json!({"role": "assistant", "content": "Yes?", "refusal": null, "annotations": null, "audio": null,
        "function_call": null, "tool_calls": null});
    let messages =
        json!([{"role": "user", "content": "Hi"}, said, {"role": "user", "content": "Go on"}]);
    let body = chat(json!({"messages": messages, "functions": null, "max_tokens": 1}));
    let (status, answer) = server.ask("/v1/chat/completions", body).await;
    assert_eq!(status, 200, "{answer}");
    refused(
        &server,
        json!({"guidance": null, "other": 3}),
        &["unknown field `other`"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_in_a_content_part_is_passed_over() {
    let server = serve().await;
    let said = |part: serde_json::Value| {
        let messages = json!([{"role": "user", "content": [part]}]);
        chat(json!({"messages": messages, "max_tokens": 1}))
    };
    let path = "/v1/chat/completions";
    for part in [
        json!({"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}),
        json!({"type": "image_url", "image_url": {"url": "data:,", "format": "png"}}),
    ] {
        refused_openai(&server, path, said(part.clone()), "messages").await;
        let (_, answer) = server.ask(path, said(part)).await;
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains("unknown field"), "{message}");
    }
    let harmless = json!({"type": "text", "text": "Hi", "cache_control": null});
    assert_eq!(server.ask(path, said(harmless)).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_supported_is_named() {
    let server = serve().await;
    for (field, value) in [
        ("watermark", json!(true)),
        ("grammar", json!({"type": "regex", "value": "a*"})),
        ("merged_adapters", json!({"ids": ["a", "b"]})),
        (
            "response_format",
            json!({"type": "json_object", "schema": {}}),
        ),
        ("api_token", json!("hf_x")),
        ("adapter_source", json!("s3")),
    ] {
        refused(&server, json!({field: value}), &[field]).await;
    }
    let tool = json!([{"type": "function", "function": {"name": "f"}}]);
    let image = json!([{"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}]);
    for (field, value) in [
        ("tools", tool),
        ("tool_choice", json!("required")),
        ("response_format", json!({"type": "json_object"})),
        ("api_token", json!("hf_x")),
        ("adapter_source", json!("pbase")),
        ("messages", json!([{"role": "user", "content": image}])),
    ] {
        refused_openai(
            &server,
            "/v1/chat/completions",
            chat(json!({field: value})),
            field,
        )
        .await;
    }
    refused_openai(
        &server,
        "/v1/completions",
        json!({"prompt": "Hi", "suffix": "x"}),
        "suffix",
    )
    .await;
    let harmless = json!({"watermark": false, "grammar": null, "max_new_tokens": 1});
    assert_eq!(
        server
            .ask("/generate", json!({"inputs": "Hi", "parameters": harmless}))
            .await
            .0,
        200
    );
    let harmless = chat(
        json!({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "max_tokens": 1}),
    );
    assert_eq!(server.ask("/v1/chat/completions", harmless).await.0, 200);
}
