//! Refusals, asked for and checked.
#![allow(dead_code, clippy::unwrap_used)]

use serde_json::{Value, json};

use crate::served::{self, Served};

/// `/generate` and `/generate_stream` refuse the parameters with a message that holds the words.
pub async fn refused(server: &Served, parameters: Value, words: &[&str]) {
    for path in ["/generate", "/generate_stream"] {
        let (status, answer) = server
            .ask(path, json!({"inputs": "Hello", "parameters": parameters}))
            .await;
        assert_eq!(
            (status, &answer["error_type"]),
            (422, &json!("validation")),
            "{parameters} {answer}"
        );
        let message = answer["error"].as_str().unwrap();
        assert!(
            words.iter().all(|word| message.contains(word)),
            "{message} names {words:?}"
        );
    }
}

/// One of OpenAI's routes refuses the body and names the field.
pub async fn refused_openai(server: &Served, path: &str, body: Value, param: &str) {
    let (status, answer) = server.ask(path, body.clone()).await;
    assert_eq!(status, 400, "{body} {answer}");
    assert_eq!(answer["error"]["type"], "invalid_request_error");
    assert_eq!(answer["error"]["param"], param, "{body} {answer}");
}

/// A chat body with more fields.
pub fn chat(more: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

/// `/generate` with a body of these bytes.
pub async fn send_raw(server: &Served, body: Vec<u8>) -> (u16, Value) {
    let request = server
        .client
        .post(format!("{}/generate", server.url))
        .header("content-type", "application/json");
    served::read(request.body(body).send().await.unwrap()).await
}
