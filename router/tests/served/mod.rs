//! A whole router over one fake shard, listening on a free port.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use kvrun_fake_shard::{FakeShard, Options, tokens};
use kvrun_proto::Sampling;
use kvrun_router::Listeners;
use kvrun_router::api::{App, Settings, auth::Keys};
use kvrun_router::engine::{Engine, EngineOptions, Overlap};
use kvrun_router::images::ImageSettings;
use kvrun_text::{ChatTemplates, Tokenizer, TokenizerPool};
use reqwest::{RequestBuilder, Response};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Ids below this are bytes.
pub const BYTES: u32 = 256;
pub const BOS: u32 = 256;
pub const EOS: u32 = 257;
pub const VOCABULARY: u32 = 2048;

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}\
{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

/// A router that serves, with the shard behind it.
pub struct Served {
    pub url: String,
    pub shard: FakeShard,
    pub engine: Engine,
    pub tokenizer: Tokenizer,
    pub home: TempDir,
    pub client: reqwest::Client,
    pub stop: CancellationToken,
    pub running: tokio::task::JoinHandle<()>,
}

/// What a test may change before the start.
pub struct Setup {
    pub settings: Settings,
    pub engine: EngineOptions,
    pub shard: Options,
    pub grace: Duration,
}

/// Serves with defaults.
pub async fn serve() -> Served {
    serve_with(|_| {}).await
}

/// Serves with changes; the folder `adapters` of the home holds `warm`, `cold` and the broken `bad`.
pub async fn serve_with(change: impl FnOnce(&mut Setup)) -> Served {
    let home = tempfile::tempdir().unwrap();
    write_model(home.path());
    for (name, rank) in [("warm", 8), ("cold", 16)] {
        write_adapter(&home.path().join("adapters").join(name), rank);
    }
    std::fs::create_dir_all(home.path().join("adapters/bad")).unwrap();
    std::fs::write(home.path().join("adapters/bad/adapter_config.json"), "{}").unwrap();
    let socket = home.path().join("shard-0");
    let mut setup = Setup {
        settings: settings(home.path()),
        engine: EngineOptions {
            sockets: vec![socket.clone()],
            step_tokens: 256,
            step_rows: 32,
            max_total_tokens: 512,
            pool_tokens: 0,
            adapter_bytes: 0,
            queue_requests: 64,
            queue_tokens: 0,
            share_prefixes: false,
            speculate: 0,
            overlap: Overlap::Auto,
            adapters: vec![],
            control: std::sync::Arc::new(|_| {}),
        },
        shard: Options {
            vocabulary: VOCABULARY,
            end_tokens: vec![EOS],
            ..Options::default()
        },
        grace: Duration::from_secs(5),
    };
    change(&mut setup);
    let shard = FakeShard::spawn(socket, setup.shard).unwrap();
    // The engine looks its meters up when it starts.
    kvrun_router::metrics::install();
    let engine = Engine::start(setup.engine);
    let tokenizer = Tokenizer::load(home.path()).unwrap();
    let patience = Duration::from_secs(10);
    let pool =
        TokenizerPool::start(Tokenizer::load(home.path()).unwrap(), 2, 64, patience).unwrap();
    let templates = ChatTemplates::load(home.path()).unwrap();
    let app = App::new(engine.clone(), pool, templates, setup.settings);
    let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", http.local_addr().unwrap());
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let listeners = Listeners {
        http,
        metrics: None,
    };
    let running = tokio::spawn(kvrun_router::run(listeners, app, setup.grace, async move {
        stopped.cancelled().await;
    }));
    tokio::time::timeout(Duration::from_secs(10), engine.ready())
        .await
        .expect("the engine gets ready");
    Served {
        url,
        shard,
        engine,
        tokenizer,
        home,
        client: reqwest::Client::new(),
        stop,
        running,
    }
}

fn settings(home: &Path) -> Settings {
    Settings {
        model_id: "demo".to_owned(),
        model_revision: None,
        max_input_tokens: Some(256),
        max_concurrent_requests: 64,
        max_best_of: 2,
        max_stop_sequences: 4,
        max_top_n_tokens: 5,
        max_client_batch_size: 4,
        payload_limit: 100_000,
        validation_workers: 2,
        images: ImageSettings::default(),
        request_timeout: Duration::from_secs(60),
        keys: Keys::default(),
        admin_keys: Keys::default(),
        cors_origins: vec![],
        lora_dir: Some(home.join("adapters")),
        allow_dynamic_lora: false,
        default_adapter_source: None,
        download_program: PathBuf::from("/nonexistent"),
    }
}

/// A byte tokenizer for prompts; most ids that the fake samples are words, some are bytes of half characters.
pub fn write_model(home: &Path) {
    let printable = |byte: u32| {
        (33..=126).contains(&byte) || (161..=172).contains(&byte) || (174..=255).contains(&byte)
    };
    let mut others = 0;
    let letters: Vec<String> = (0..256u32)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                others += 1;
                255 + others
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect();
    let spell = |text: &str| {
        text.bytes()
            .map(|byte| letters[byte as usize].as_str())
            .collect::<String>()
    };
    let mut ids = serde_json::Map::new();
    for (id, letter) in letters.iter().enumerate() {
        ids.insert(letter.clone(), json!(id));
    }
    ids.insert("<s>".to_owned(), json!(BOS));
    ids.insert("</s>".to_owned(), json!(EOS));
    for id in EOS + 1..VOCABULARY {
        let word = match id % 5 {
            0 => format!(" é{id}"),
            1 => format!("日{id}"),
            _ => format!(" w{id}"),
        };
        ids.insert(spell(&word), json!(id));
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [special(BOS, "<s>"), special(EOS, "</s>")], "normalizer": null,
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "vocab": ids, "merges": []}
    });
    std::fs::write(home.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"});
    std::fs::write(home.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// A folder that the fake takes for an adapter.
pub fn write_adapter(folder: &Path, rank: u32) {
    std::fs::create_dir_all(folder).unwrap();
    let config = json!({"r": rank, "target_modules": ["q_proj"], "name": folder.file_name().unwrap().to_str()});
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("adapter_model.safetensors"), vec![7; 64]).unwrap();
}

/// The ids of a prompt as `/generate` tokenizes it.
pub fn prompt_ids(text: &str) -> Vec<u32> {
    std::iter::once(BOS)
        .chain(text.bytes().map(u32::from))
        .collect()
}

impl Served {
    pub fn get(&self, path: &str) -> RequestBuilder {
        self.client.get(format!("{}{path}", self.url))
    }

    pub fn delete(&self, path: &str) -> RequestBuilder {
        self.client.delete(format!("{}{path}", self.url))
    }

    pub fn post(&self, path: &str, body: Value) -> RequestBuilder {
        self.client.post(format!("{}{path}", self.url)).json(&body)
    }

    /// Status and JSON body.
    pub async fn ask(&self, path: &str, body: Value) -> (u16, Value) {
        read(self.post(path, body).send().await.unwrap()).await
    }

    /// Status and JSON body of a GET.
    pub async fn look(&self, path: &str) -> (u16, Value) {
        read(self.get(path).send().await.unwrap()).await
    }

    /// The data of every event of a stream, read to its end.
    pub async fn events(&self, path: &str, body: Value) -> Vec<String> {
        let response = self.post(path, body).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        assert_eq!(response.headers()["x-accel-buffering"], "no");
        data(&response.text().await.unwrap())
    }

    /// The greedy ids that the fake answers with.
    pub fn greedy(&self, prompt: &[u32], digest: &str, count: u32) -> Vec<u32> {
        tokens::answer(
            prompt,
            digest,
            &Sampling::default(),
            count,
            &[EOS],
            VOCABULARY,
        )
    }

    /// The text of ids.
    pub fn text(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, true)
    }

    /// Loads an adapter of the home and gives its digest.
    pub async fn load(&self, name: &str) -> String {
        let (status, adapter) = self
            .ask("/v1/adapters", json!({"name": name, "path": name}))
            .await;
        assert_eq!(status, 200, "{adapter}");
        adapter["digest"].as_str().unwrap().to_owned()
    }

    /// Waits until the shard holds no sequence, and checks that the router broke no rule.
    pub async fn idle(&self) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        while self.engine.status().running + self.engine.status().queued > 0 {
            assert!(
                tokio::time::Instant::now() < deadline,
                "requests are left: {:?}",
                self.engine.status()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(self.shard.watch().violations(), Vec::<String>::new());
    }
}

/// Status and JSON body; null when the body is none.
pub async fn read(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::Null))
}

/// The data of every event.
pub fn data(stream: &str) -> Vec<String> {
    let events = stream
        .split("\n\n")
        .filter(|event| !event.is_empty() && !event.starts_with(':'));
    events
        .map(|event| {
            event
                .strip_prefix("data: ")
                .expect("only data fields")
                .to_owned()
        })
        .collect()
}

/// A list of events as JSON.
pub fn json_events(events: &[String]) -> Vec<Value> {
    events
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect()
}
