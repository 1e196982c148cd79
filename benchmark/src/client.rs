//! One streamed request, in either dialect.

use std::time::Instant;

use futures::StreamExt;
use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Map, Value, json};

use crate::args::{Api, Args};
use crate::stats::Sample;

/// The server under test.
#[derive(Clone)]
pub struct Server {
    client: Client,
    url: String,
    api: Api,
    api_key: String,
    model: String,
    parameters: Map<String, Value>,
    decode_length: u32,
}

/// A request that failed; the text says how.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Failed(pub String);

impl From<reqwest::Error> for Failed {
    fn from(error: reqwest::Error) -> Self {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text += &format!(": {cause}");
            source = cause.source();
        }
        Self(text)
    }
}

impl Server {
    /// The server that the flags name.
    pub fn new(args: &Args) -> Self {
        let mut parameters = Map::new();
        let numbers = [
            ("temperature", args.temperature),
            ("top_p", args.top_p),
            ("typical_p", args.typical_p),
            ("repetition_penalty", args.repetition_penalty),
            ("frequency_penalty", args.frequency_penalty),
        ];
        parameters.extend(
            numbers
                .into_iter()
                .filter_map(|(name, value)| Some((name.to_owned(), json!(value?)))),
        );
        parameters.extend(args.top_k.map(|top_k| ("top_k".to_owned(), json!(top_k))));
        match args.api {
            Api::Tgi => drop(parameters.insert("do_sample".into(), args.do_sample.into())),
            Api::Openai if args.temperature.is_none() && !args.do_sample => {
                drop(parameters.insert("temperature".into(), 0.into()));
            }
            Api::Openai => {}
        }
        Self {
            client: Client::new(),
            url: args.url.trim_end_matches('/').to_owned(),
            api: args.api,
            api_key: args.api_key.clone(),
            model: args.model.clone(),
            parameters,
            decode_length: args.decode_length,
        }
    }

    /// How many tokens the server counts in a text; nothing where it cannot say.
    pub async fn count(&self, text: &str) -> Option<u64> {
        let answer = self
            .post("/tokenize", json!({"inputs": text}))
            .send()
            .await
            .ok()?;
        let tokens: Value = answer.error_for_status().ok()?.json().await.ok()?;
        Some(tokens.as_array()?.len() as u64)
    }

    /// Whether something listens there; the error says what is in the way.
    pub async fn reach(&self) -> Result<(), Failed> {
        self.client
            .get(format!("{}/health", self.url))
            .send()
            .await?;
        Ok(())
    }

    /// Asks once and reads the answer to its end. `on_tokens` is called for every event that carries tokens.
    pub async fn ask(
        &self,
        prompt: &str,
        adapter: Option<&str>,
        start: Instant,
        mut on_tokens: impl FnMut(),
    ) -> Result<Sample, Failed> {
        let sent = start.elapsed();
        let answer = self.request(prompt, adapter).send().await?;
        if !answer.status().is_success() {
            return Err(refusal(answer).await);
        }
        let mut sample = Sample {
            sent,
            events: Vec::new(),
            ended: sent,
            prompt_tokens: 0,
            tokens: 0,
        };
        let (mut bytes, mut events) = (answer.bytes_stream(), Events::default());
        while let Some(chunk) = bytes.next().await {
            events.feed(&chunk?);
            while let Some(event) = events.next() {
                let seen = read_event(&event)?;
                if seen.tokens {
                    sample.events.push(start.elapsed());
                    on_tokens();
                }
                if let Some((prompt_tokens, tokens)) = seen.usage {
                    (sample.prompt_tokens, sample.tokens) = (prompt_tokens, tokens);
                }
            }
        }
        sample.ended = start.elapsed();
        if sample.tokens == 0 {
            sample.tokens = sample.events.len() as u64;
        }
        if sample.events.is_empty() {
            return Err(Failed("the stream ended without a token".to_owned()));
        }
        Ok(sample)
    }

    fn request(&self, prompt: &str, adapter: Option<&str>) -> RequestBuilder {
        let mut parameters = self.parameters.clone();
        match self.api {
            Api::Tgi => {
                parameters.insert("max_new_tokens".into(), self.decode_length.into());
                parameters.insert("details".into(), true.into());
                parameters.extend(adapter.map(|name| ("adapter_id".to_owned(), name.into())));
                self.post(
                    "/generate_stream",
                    json!({"inputs": prompt, "parameters": parameters}),
                )
            }
            Api::Openai => {
                parameters.insert("model".into(), adapter.unwrap_or(&self.model).into());
                parameters.insert("prompt".into(), prompt.into());
                parameters.insert("max_tokens".into(), self.decode_length.into());
                parameters.insert("stream".into(), true.into());
                parameters.insert("stream_options".into(), json!({"include_usage": true}));
                self.post("/v1/completions", parameters.into())
            }
        }
    }

    fn post(&self, route: &str, body: Value) -> RequestBuilder {
        let request = self.client.post(format!("{}{route}", self.url)).json(&body);
        if self.api_key.is_empty() {
            request
        } else {
            request.bearer_auth(&self.api_key)
        }
    }
}

async fn refusal(answer: Response) -> Failed {
    let status = answer.status();
    let text = answer.text().await.unwrap_or_default();
    let body: Value = serde_json::from_str(&text).unwrap_or_default();
    let message = body["error"]
        .as_str()
        .or_else(|| body["error"]["message"].as_str());
    Failed(format!("{status}: {}", message.unwrap_or(text.trim())))
}

/// The data of server-sent events, cut from a stream of bytes.
#[derive(Default)]
struct Events {
    buffer: Vec<u8>,
}

impl Events {
    fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The data of the next whole line that has any.
    fn next(&mut self) -> Option<String> {
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            if let Some(data) = line.trim_end().strip_prefix("data:") {
                return Some(data.trim_start().to_owned());
            }
        }
        None
    }
}

#[derive(Debug, Default, PartialEq)]
struct Seen {
    tokens: bool,
    /// Tokens of prompt and answer.
    usage: Option<(u64, u64)>,
}

fn read_event(data: &str) -> Result<Seen, Failed> {
    if data == "[DONE]" {
        return Ok(Seen::default());
    }
    let event: Value =
        serde_json::from_str(data).map_err(|_| Failed(format!("an event is no JSON: {data}")))?;
    if let Some(error) = event.get("error") {
        let text = error.as_str().or_else(|| error["message"].as_str());
        return Err(Failed(
            text.map_or_else(|| error.to_string(), str::to_owned),
        ));
    }
    let (details, usage) = (&event["details"], &event["usage"]);
    let counted = |object: &Value, prompt: &str, answer: &str| {
        Some((
            object[prompt].as_u64().unwrap_or(0),
            object[answer].as_u64()?,
        ))
    };
    let chosen = event["choices"].as_array().is_some_and(|choices| {
        choices
            .iter()
            .any(|choice| choice["text"].as_str().is_some_and(|text| !text.is_empty()))
    });
    Ok(Seen {
        tokens: event["token"].is_object() || chosen,
        usage: counted(details, "input_length", "generated_tokens")
            .or_else(|| counted(usage, "prompt_tokens", "completion_tokens")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_cut_at_their_lines_however_the_bytes_come() {
        let mut events = Events::default();
        let mut found = Vec::new();
        for byte in b"data:{\"a\":1}\n\n: still there\n\ndata: [DONE]\r\n\r\ndata:cut" {
            events.feed(&[*byte]);
            found.extend(std::iter::from_fn(|| events.next()));
        }
        assert_eq!(found, ["{\"a\":1}", "[DONE]"]);
    }

    #[test]
    fn both_dialects_tell_tokens_and_counts() {
        let seen = |data: &str| read_event(data).expect(data);
        let token =
            seen(r#"{"index":1,"token":{"id":5,"text":"a"},"generated_text":null,"details":null}"#);
        assert_eq!(
            token,
            Seen {
                tokens: true,
                usage: None
            }
        );
        let last = seen(r#"{"token":{"id":5},"details":{"generated_tokens":8,"input_length":3}}"#);
        assert_eq!(
            last,
            Seen {
                tokens: true,
                usage: Some((3, 8))
            }
        );
        assert_eq!(
            seen(r#"{"choices":[{"text":"a"}]}"#),
            Seen {
                tokens: true,
                usage: None
            }
        );
        assert_eq!(
            seen(r#"{"choices":[{"text":"","finish_reason":"length"}]}"#),
            Seen::default()
        );
        let usage = seen(r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":8}}"#);
        assert_eq!(
            usage,
            Seen {
                tokens: false,
                usage: Some((3, 8))
            }
        );
        assert_eq!(seen("[DONE]"), Seen::default());
    }

    #[test]
    fn an_error_in_a_stream_is_a_failure() {
        for data in [
            r#"{"error":"bad","error_type":"generation"}"#,
            r#"{"error":{"message":"bad"}}"#,
        ] {
            assert_eq!(read_event(data).expect_err(data).0, "bad");
        }
        assert!(read_event("half a").is_err());
    }
}
