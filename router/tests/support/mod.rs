//! An engine over fake shards on unix sockets, and answers to compare with.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvrun_fake_shard::{FakeShard, Options, adapter, tokens};
use kvrun_proto::Sampling;
use kvrun_router::engine::{AdapterId, Answer, Control, Engine, EngineOptions, Overlap};
use kvrun_router::request::{AdapterSpec, Event, Failure, Finish, ValidRequest};
use tempfile::TempDir;

pub const VOCABULARY: u32 = 32_000;
pub const END: u32 = 2;

/// An engine and the shards under it.
pub struct Bench {
    pub engine: Engine,
    pub shards: Vec<FakeShard>,
    pub controls: Arc<Mutex<Vec<Control>>>,
    pub home: TempDir,
}

/// What a test may change before the start.
pub struct Setup {
    pub ranks: u32,
    pub shard: Options,
    pub engine: EngineOptions,
    /// Names of adapters to write and load before ready.
    pub adapters: Vec<&'static str>,
}

impl Setup {
    /// Has steps overlap, or not; the shards watch how many lie there.
    pub fn overlap(&mut self, overlap: Overlap) {
        self.engine.overlap = overlap;
        self.shard.in_flight = match overlap {
            Overlap::On => 2,
            _ => 1,
        };
    }
}

/// Starts shards and an engine and waits until it serves.
pub async fn start(change: impl FnOnce(&mut Setup)) -> Bench {
    let home = tempfile::tempdir().unwrap();
    let controls = Arc::new(Mutex::new(Vec::new()));
    let heard = controls.clone();
    let mut setup = Setup {
        ranks: 1,
        shard: Options::default(),
        engine: EngineOptions {
            sockets: Vec::new(),
            step_tokens: 256,
            step_rows: 64,
            max_total_tokens: 0,
            pool_tokens: 0,
            adapter_bytes: 0,
            queue_requests: 1024,
            queue_tokens: 0,
            share_prefixes: false,
            speculate: 0,
            overlap: Overlap::Auto,
            adapters: Vec::new(),
            control: Arc::new(move |control| heard.lock().unwrap().push(control)),
        },
        adapters: Vec::new(),
    };
    change(&mut setup);
    let mut shards = Vec::new();
    for rank in 0..setup.ranks {
        let socket = home.path().join(format!("shard-{rank}"));
        let options = Options {
            rank,
            world: setup.ranks,
            ..setup.shard.clone()
        };
        setup.engine.sockets.push(socket.clone());
        shards.push(FakeShard::spawn(socket, options).unwrap());
    }
    let mut bench = Bench {
        engine: Engine::start(setup.engine.clone()),
        shards,
        controls,
        home,
    };
    if !setup.adapters.is_empty() {
        for name in &setup.adapters {
            bench.write_adapter(name, 64);
            bench
                .engine
                .adapters()
                .load(bench.spec(name))
                .await
                .unwrap();
        }
    }
    within(bench.engine.ready()).await;
    bench
}

/// Writes an adapter's folder, the same for the same name and size.
pub fn write_adapter(folder: &Path, name: &str, bytes: usize) {
    std::fs::create_dir_all(folder).unwrap();
    let config = r#"{"r": 4, "target_modules": ["q_proj"]}"#;
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    let weights: Vec<u8> = name.bytes().cycle().take(bytes).collect();
    std::fs::write(folder.join("adapter_model.safetensors"), weights).unwrap();
}

/// Fails a test that hangs.
pub async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), work)
        .await
        .expect("the test hangs")
}

impl Bench {
    fn folder(&self, name: &str) -> PathBuf {
        self.home.path().join("adapters").join(name)
    }

    /// Writes an adapter folder whose weights have `bytes` bytes.
    pub fn write_adapter(&mut self, name: &str, bytes: usize) {
        write_adapter(&self.folder(name), name, bytes);
    }

    pub fn spec(&self, name: &str) -> AdapterSpec {
        AdapterSpec {
            name: name.to_owned(),
            path: self.folder(name),
            pinned: false,
        }
    }

    pub fn adapter(&self, name: &str) -> Option<AdapterId> {
        Some(self.engine.adapters().resolve(name).unwrap())
    }

    /// The answer that the fake gives to a request alone, under the named adapter.
    pub fn alone(&self, request: &ValidRequest, name: Option<&str>) -> Vec<u32> {
        let digest = name.map(|name| adapter::read(&self.folder(name)).unwrap().digest);
        tokens::answer(
            &request.prompt,
            digest.as_deref().unwrap_or(""),
            &request.sampling,
            request.max_new_tokens,
            &request.end_tokens,
            VOCABULARY,
        )
    }

    /// Kills every rank in mid-sentence and starts the group again, as a launcher does.
    pub fn restart_shards(&mut self) {
        self.shards.iter_mut().for_each(FakeShard::kill);
        for shard in &mut self.shards {
            shard.restart().unwrap();
        }
    }

    /// Broken rules of the protocol, over all ranks.
    pub fn violations(&self) -> Vec<String> {
        self.shards
            .iter()
            .flat_map(|shard| shard.watch().violations())
            .collect()
    }

    /// Waits until nothing is open and every page and sequence is given back, on both sides.
    pub async fn assert_all_returned(&self) {
        let returned = || {
            let status = self.engine.status();
            let idle = (status.queued, status.running) == (0, 0) && status.used_pages() == 0;
            let shards = self.shards.iter().all(|shard| {
                let held = shard.watch().last();
                (held.sequences, held.pages) == (0, 0)
            });
            idle && shards
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !returned() {
            let held: Vec<_> = self
                .shards
                .iter()
                .map(|shard| shard.watch().last())
                .collect();
            assert!(
                Instant::now() < deadline,
                "{:?} {held:?}",
                self.engine.status()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(self.violations(), Vec::<String>::new());
    }
}

/// A request for the base model with sampling on.
pub fn request(number: u64, prompt_tokens: u32, max_new_tokens: u32) -> ValidRequest {
    ValidRequest {
        prompt: (0..prompt_tokens)
            .map(|place| 10 + (number as u32 * 131 + place * 7) % 30_000)
            .collect(),
        sampling: Sampling {
            temperature: 0.7,
            top_p: 1.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            seed: number,
            ..Default::default()
        },
        max_new_tokens,
        end_tokens: Arc::from([END]),
        tenant: Arc::from("anonymous"),
        reuse_prefix: true,
        ..ValidRequest::default()
    }
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    Finished(Finish),
    Failed(Failure),
}

/// Reads an answer to its end and holds it to the order of events: started, tokens, exactly one terminal.
pub async fn collect(mut answer: Answer) -> (Vec<u32>, End) {
    let (mut ids, mut started) = (Vec::new(), false);
    loop {
        match within(answer.next())
            .await
            .expect("a terminal event before the end")
        {
            Event::Started { .. } => {
                assert!(!started, "started twice");
                started = true;
            }
            Event::Prompt(_) => assert!(ids.is_empty()),
            Event::Token(token) => {
                assert!(started, "a token before the start");
                ids.push(token.id);
            }
            Event::Finished(finish) => {
                assert_eq!(answer.next().await, None);
                return (ids, End::Finished(finish));
            }
            Event::Failed(failure) => {
                assert_eq!(answer.next().await, None);
                return (ids, End::Failed(failure));
            }
        }
    }
}

/// Submits and reads to the end.
pub async fn ask(engine: &Engine, request: ValidRequest) -> (Vec<u32>, End) {
    collect(engine.submit(request).await.unwrap()).await
}
