//! Launcher and router as they are installed, over shards that speak the wire without a model: what a caller sees
//! while processes die.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const VOCABULARY: u32 = 300;

/// The fake shard, built as its sources are now: what lies there may be of another day.
fn fake_shard() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let folder = Path::new(env!("CARGO_BIN_EXE_text-generation-router"))
            .parent()
            .expect("a folder");
        let profile = if folder.ends_with("release") {
            "--release"
        } else {
            "--profile=dev"
        };
        let arguments = ["build", profile, "-p", "kvrun-fake-shard"];
        let built = Command::new(env!("CARGO"))
            .args(arguments)
            .status()
            .expect("cargo");
        assert!(built.success());
        folder.join("kvrun-fake-shard")
    })
}

/// A folder with a model for the fake, and with the programs as they lie beside each other when installed.
struct Site(tempfile::TempDir);

impl Site {
    fn new(step_micros: u64) -> Self {
        let site = Self(tempfile::tempdir().expect("a folder"));
        let home = site.0.path();
        for folder in ["model", "bin", "run"] {
            fs::create_dir(home.join(folder)).expect("a folder");
        }
        let config =
            json!({"vocab_size": VOCABULARY, "max_position_embeddings": 4096, "eos_token_id": 1});
        fs::write(home.join("model/config.json"), config.to_string()).expect("a config");
        let words: HashMap<String, u32> =
            (0..VOCABULARY).map(|id| (format!("t{id}"), id)).collect();
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": null, "decoder": null, "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
        });
        fs::write(home.join("model/tokenizer.json"), tokenizer.to_string()).expect("a tokenizer");
        fs::write(home.join("model/tokenizer_config.json"), "{}").expect("a config");
        let facts = json!({"adapters": [], "model": {
            "architecture": "FakeForCausalLM", "parameters": 1, "dtype": "float32", "rank_weight_bytes": 1,
            "kv_dtype": "bfloat16", "page_bytes": 4096, "page_tokens": 16, "max_positions": 4096,
        }});
        fs::write(home.join("facts"), facts.to_string()).expect("facts");
        let script = format!(
            "#!/bin/sh\ncase $1 in\ninspect) exec cat {facts} ;;\n*) echo $$ >> {ids}; exec {fake} \"$@\" --step-delay-us {step_micros} ;;\nesac\n",
            facts = home.join("facts").display(),
            ids = home.join("shards").display(),
            fake = fake_shard().display(),
        );
        fs::write(home.join("bin/text-generation-server"), script).expect("a program");
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(home.join("bin/text-generation-server"), executable).expect("a mode");
        let router = env!("CARGO_BIN_EXE_text-generation-router");
        std::os::unix::fs::symlink(router, home.join("bin/text-generation-router"))
            .expect("a link");
        site
    }

    /// Process ids of all shards, oldest first.
    fn shards(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.0.path().join("shards")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Every process whose arguments name this folder, but for the launcher.
    fn children(&self) -> Vec<i32> {
        let own = self.0.path().join("run").display().to_string();
        let ids = fs::read_dir("/proc").expect("processes").flatten();
        let ids = ids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        ids.filter(|id| {
            fs::read_to_string(format!("/proc/{id}/cmdline")).is_ok_and(|line| line.contains(&own))
        })
        .collect()
    }
}

/// A running tree, killed when this value goes.
struct Tree {
    launcher: Child,
    log: Arc<Mutex<String>>,
    address: String,
}

impl Tree {
    fn start(site: &Site, flags: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_text-generation-launcher"));
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("KVRUN_BIN_DIR", site.0.path().join("bin"));
        command.env("XDG_RUNTIME_DIR", site.0.path().join("run"));
        command
            .arg("--model-id")
            .arg(site.0.path().join("model"))
            .args(["--port", "0"])
            .args(flags);
        let mut launcher = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a launcher");
        let log = Arc::new(Mutex::new(String::new()));
        let (kept, pipe) = (Arc::clone(&log), launcher.stderr.take().expect("a pipe"));
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                *kept.lock().expect("a log") += &format!("{line}\n");
            }
        });
        let mut tree = Self {
            launcher,
            log,
            address: String::new(),
        };
        until(
            "readiness",
            || {
                tree.log
                    .lock()
                    .expect("a log")
                    .contains("Connected: ready on")
            },
            || tree.text(),
        );
        let text = tree.text();
        let (_, rest) = text.split_once("ready on http://").expect("an address");
        tree.address = rest
            .split_whitespace()
            .next()
            .expect("an address")
            .to_owned();
        tree
    }

    fn text(&self) -> String {
        self.log.lock().expect("a log").clone()
    }

    fn id(&self) -> i32 {
        self.launcher.id() as i32
    }

    /// Asks for 200 tokens as a stream. `at` is called with the number of events so far, as they come.
    fn stream(&self, seed: u64, mut at: impl FnMut(usize)) -> Vec<Value> {
        let parameters = json!({"max_new_tokens": 200, "do_sample": true, "seed": seed, "ignore_eos_token": true});
        let body = json!({"inputs": "t5 t6 t7", "parameters": parameters}).to_string();
        let mut stream = TcpStream::connect(&self.address).expect("a connection");
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .expect("a timeout");
        let head = "POST /generate_stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n";
        write!(stream, "{head}content-length: {}\r\n\r\n{body}", body.len()).expect("sent");
        let mut events = Vec::new();
        for line in BufReader::new(stream).lines() {
            let line = line.expect("a line");
            assert!(
                !events.is_empty() || !line.starts_with("HTTP/1.1 ") || line.contains("200"),
                "{line}"
            );
            if let Some(data) = line.strip_prefix("data:") {
                events.push(serde_json::from_str(data).expect(data));
                at(events.len());
            }
        }
        events
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _gone = self.launcher.kill();
        let _reaped = self.launcher.wait();
    }
}

fn until(what: &str, mut is_true: impl FnMut() -> bool, context: impl Fn() -> String) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is_true() {
        assert!(
            Instant::now() < end,
            "{what}: not within twenty seconds\n{}",
            context()
        );
        thread::sleep(Duration::from_millis(10));
    }
}

fn send(id: i32, signal: Signal) {
    kill(Pid::from_raw(id), signal).expect("a process to signal");
}

fn ids(events: &[Value]) -> Vec<u64> {
    events
        .iter()
        .filter_map(|event| event["token"]["id"].as_u64())
        .collect()
}

#[test]
fn a_stream_does_not_notice_that_its_shards_are_killed() {
    let site = Site::new(2000);
    let tree = Tree::start(&site, &["--num-shard", "2"]);
    let whole = tree.stream(7, |_| {});
    assert_eq!(ids(&whole).len(), 200, "{:?}", whole.last());
    let disturbed = tree.stream(7, |events| {
        if events == 50 {
            send(site.shards()[1], Signal::SIGKILL);
        }
    });
    assert_eq!(site.shards().len(), 4, "{}", tree.text());
    assert_eq!(ids(&disturbed), ids(&whole));
    assert_eq!(
        disturbed.last().map(|event| &event["generated_text"]),
        whole.last().map(|event| &event["generated_text"])
    );
}

#[test]
fn a_stream_does_not_notice_that_its_shards_hang() {
    let site = Site::new(2000);
    let tree = Tree::start(&site, &[]);
    let whole = tree.stream(3, |_| {});
    let disturbed = tree.stream(3, |events| {
        if events == 20 {
            send(site.shards()[0], Signal::SIGSTOP);
        }
    });
    assert_eq!(ids(&disturbed), ids(&whole), "{}", tree.text());
    assert_eq!(site.shards().len(), 2);
}

#[test]
fn a_new_router_adopts_the_shards_that_are_there() {
    let site = Site::new(0);
    let tree = Tree::start(&site, &[]);
    let before = ids(&tree.stream(1, |_| {}));
    let shards = site.shards();
    let router = site
        .children()
        .into_iter()
        .find(|id| !shards.contains(id))
        .expect("a router");
    send(router, Signal::SIGKILL);
    until(
        "a new router",
        || tree.text().contains("ready again"),
        || tree.text(),
    );
    assert_eq!(ids(&tree.stream(1, |_| {})), before);
    assert_eq!(site.shards(), shards);
}

#[test]
fn a_drain_lets_the_open_stream_finish_and_refuses_the_next() {
    let site = Site::new(2000);
    let mut tree = Tree::start(&site, &[]);
    let (launcher, address) = (tree.id(), tree.address.clone());
    let mut status = String::new();
    let events = tree.stream(2, |events| {
        if events == 20 {
            send(launcher, Signal::SIGTERM);
            thread::sleep(Duration::from_millis(300));
            let mut stream = TcpStream::connect(&address).expect("a connection");
            stream
                .write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                .expect("sent");
            stream.read_to_string(&mut status).expect("an answer");
        }
    });
    assert_eq!(ids(&events).len(), 200);
    assert!(status.starts_with("HTTP/1.1 503"), "{status}");
    assert_eq!(
        tree.launcher.wait().expect("an end").code(),
        Some(0),
        "{}",
        tree.text()
    );
    assert!(site.children().is_empty());
}

/// KVRUN_KILLS sets how often; the figure to show is 50.
#[test]
fn nothing_outlives_a_launcher_that_is_killed() {
    let rounds = std::env::var("KVRUN_KILLS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(3);
    for round in 0..rounds {
        let site = Site::new(1000);
        let tree = Tree::start(&site, &["--num-shard", "2"]);
        assert_eq!(site.children().len(), 3);
        let killed = Mutex::new(None);
        thread::scope(|scope| {
            let launcher = tree.id();
            scope.spawn(|| {
                // Cut by the kill, at another moment each round.
                let _cut = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    tree.stream(round, |_| {})
                }));
            });
            thread::sleep(Duration::from_millis(7 * round));
            send(launcher, Signal::SIGKILL);
            *killed.lock().expect("a time") = Some(Instant::now());
        });
        let killed = killed.into_inner().expect("a time").expect("a time");
        while !site.children().is_empty() {
            assert!(
                killed.elapsed() < Duration::from_secs(2),
                "round {round}: {:?} live on",
                site.children()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn the_server_program_becomes_the_python_beside_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("text-generation-server");
    fs::copy(env!("CARGO_BIN_EXE_text-generation-server"), &program).expect("a copy");
    fs::write(folder.path().join("python"), "#!/bin/sh\necho \"$$ $@\"\n").expect("a script");
    fs::set_permissions(
        folder.path().join("python"),
        fs::Permissions::from_mode(0o755),
    )
    .expect("a mode");
    let child = Command::new(&program)
        .args(["inspect", "a b"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("a process");
    let id = child.id();
    let output = child.wait_with_output().expect("an output");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        format!("{id} -m kvrun inspect a b\n")
    );

    fs::remove_file(folder.path().join("python")).expect("removed");
    let output = Command::new(&program)
        .env("PATH", "/nowhere")
        .output()
        .expect("an output");
    assert_eq!(output.status.code(), Some(70));
    assert!(String::from_utf8_lossy(&output.stderr).contains("virtual environment"));
}
