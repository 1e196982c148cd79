//! A launcher under test, over programs that stand in for router and shards (see `programs/`).

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// A folder with a model that is none, and what the stand-ins are to do.
pub struct Site(tempfile::TempDir);

impl Site {
    pub fn new(orders: Value) -> Self {
        let site = Self(tempfile::tempdir().expect("a folder"));
        let mut all = json!({"model": {
            "architecture": "LlamaForCausalLM", "parameters": 1000, "dtype": "float32", "rank_weight_bytes": 4000,
            "kv_dtype": "float32", "page_bytes": 4096, "page_tokens": 16, "max_positions": 512,
        }});
        all.as_object_mut()
            .expect("an object")
            .extend(orders.as_object().expect("an object").clone());
        fs::write(site.0.path().join("orders"), all.to_string()).expect("orders");
        fs::create_dir(site.0.path().join("model")).expect("a model");
        fs::create_dir(site.0.path().join("run")).expect("a place for run directories");
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A command line that serves the model on a free port.
    pub fn command(&self, flags: &[&str]) -> Command {
        let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs");
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvrun-launcher"));
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command
            .env("KVRUN_BIN_DIR", programs)
            .env("KVRUN_TEST_FOLDER", self.0.path());
        command.env("XDG_RUNTIME_DIR", self.path("run"));
        command
            .arg("--model-id")
            .arg(self.path("model"))
            .args(["--port", "0"])
            .args(flags);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn launch(&self, flags: &[&str]) -> Launcher {
        Launcher::start(self.command(flags))
    }

    /// Every router and shard that was ever started here, oldest first.
    pub fn processes(&self) -> Vec<Value> {
        let log = fs::read_to_string(self.path("processes")).unwrap_or_default();
        log.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    pub fn ids(&self, kind: &str) -> Vec<i32> {
        let processes = self.processes();
        let of_kind = processes.iter().filter(|process| process["kind"] == kind);
        of_kind
            .map(|process| process["pid"].as_i64().expect("an id") as i32)
            .collect()
    }

    pub fn alive(&self) -> BTreeSet<i32> {
        self.ids("router")
            .into_iter()
            .chain(self.ids("shard"))
            .filter(|id| is_alive(*id))
            .collect()
    }

    pub fn run_directories(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path("run")).expect("a list").flatten();
        entries.map(|entry| entry.path()).collect()
    }
}

/// A process that has ended but was not reaped counts as gone.
pub fn is_alive(id: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

pub fn send(id: i32, signal: Signal) {
    kill(Pid::from_raw(id), signal).expect("a process to signal");
}

/// Waits for something to become true, for ten seconds.
pub fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is_true() {
        assert!(Instant::now() < end, "{what}: not within ten seconds");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A running launcher. It is killed when this value goes.
pub struct Launcher {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Launcher {
    pub fn start(mut command: Command) -> Self {
        let mut child = command.spawn().expect("a launcher");
        let log = Arc::new(Mutex::new(String::new()));
        let (kept, pipe) = (Arc::clone(&log), child.stderr.take().expect("a pipe"));
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                *kept.lock().expect("a log") += &format!("{line}\n");
            }
        });
        Self { child, log }
    }

    pub fn id(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn log(&self) -> String {
        self.log.lock().expect("a log").clone()
    }

    pub fn count(&self, words: &str) -> usize {
        self.log().matches(words).count()
    }

    /// Waits for the line that says it is ready, and returns the address.
    pub fn ready(&mut self) -> String {
        let end = Instant::now() + Duration::from_secs(20);
        while self.count("Connected: ready on") == 0 {
            let ended = self.child.try_wait().expect("a status");
            assert!(
                ended.is_none() && Instant::now() < end,
                "not ready ({ended:?}):\n{}",
                self.log()
            );
            thread::sleep(Duration::from_millis(10));
        }
        let log = self.log();
        let (_, rest) = log.split_once("ready on http://").expect("an address");
        rest.split_whitespace()
            .next()
            .expect("an address")
            .to_owned()
    }

    pub fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = self.child.try_wait().expect("a status") {
                thread::sleep(Duration::from_millis(50));
                return status;
            }
            assert!(Instant::now() < end, "still running:\n{}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The exit code, and what was written to standard output.
    pub fn end(&mut self) -> (Option<i32>, String) {
        let mut pipe = self.child.stdout.take().expect("a pipe");
        let reader = thread::spawn(move || {
            let mut text = String::new();
            let _bytes = pipe.read_to_string(&mut text);
            text
        });
        (self.wait().code(), reader.join().expect("an output"))
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Who answers at an address.
pub fn answer(address: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a timeout");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    text
}
