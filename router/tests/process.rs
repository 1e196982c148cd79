//! The program itself: exit codes, inherited files, signals. The test binary starts itself as the router.
#![allow(clippy::unwrap_used)]

mod served;

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvrun_fake_shard::{FakeShard, Options};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const ARGS: &str = "KVRUN_TEST_ROUTER_ARGS";

/// Not a test of its own: it becomes the router when a test below starts this binary so.
#[test]
fn router() {
    if let Ok(args) = std::env::var(ARGS) {
        let args = ["router"]
            .into_iter()
            .chain(args.split('\n'))
            .map(Into::into);
        std::process::exit(kvrun_router::run_with(args).into());
    }
}

fn start(home: &Path, more: &[&str], environment: &[(&str, &str)]) -> Child {
    let mut args = vec![
        "--tokenizer-name".to_owned(),
        home.display().to_string(),
        "--shard-uds-path".to_owned(),
        home.join("shard").display().to_string(),
    ];
    args.extend(more.iter().map(|arg| (*arg).to_owned()));
    Command::new(std::env::current_exe().unwrap())
        .args(["router", "--exact", "--nocapture"])
        .env(ARGS, args.join("\n"))
        .envs(environment.iter().copied())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The exit code, and what was written to the log.
fn outcome(mut child: Child) -> (i32, String) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let code = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code().unwrap();
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("the router does not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut log = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut log)
        .unwrap();
    (code, log)
}

/// Lets children inherit an open file.
fn bequeath(file: &impl AsRawFd, borrowed: impl std::os::fd::AsFd) -> String {
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    file.as_raw_fd().to_string()
}

fn model() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    served::write_model(home.path());
    home
}

#[test]
fn each_reason_not_to_start_has_its_exit_code() {
    let home = model();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (code, log) = outcome(start(home.path(), &["--port", &port], &[]));
    assert_eq!(code, 13, "{log}");
    assert!(
        log.contains(&port) && log.contains("pick another --port"),
        "{log}"
    );
    let (code, log) = outcome(start(
        home.path(),
        &["--hostname", "0.0.0.0", "--port", "0"],
        &[],
    ));
    assert_eq!(code, 10, "{log}");
    assert!(log.contains("--allow-unauthenticated"), "{log}");
    let (code, log) = outcome(start(
        home.path(),
        &["--port", "0", "--lora-adapters", "x"],
        &[],
    ));
    assert_eq!(code, 10, "{log}");
    let (code, log) = outcome(start(home.path(), &["--no-such-flag"], &[]));
    assert_eq!(code, 10, "{log}");
    let (code, log) = outcome(start(home.path(), &["--control-fd", "99"], &[]));
    assert_eq!(code, 10, "{log}");
    let (code, log) = outcome(start(
        home.path(),
        &["--port", "0", "--tokenizer-name", "/nonexistent"],
        &[],
    ));
    assert_eq!(code, 10, "given twice: {log}");
    std::fs::write(home.path().join("tokenizer.json"), "{").unwrap();
    let (code, log) = outcome(start(home.path(), &["--port", "0"], &[]));
    assert_eq!(code, 11, "{log}");
    assert!(log.contains("tokenizer.json"), "{log}");
}

#[test]
fn an_inherited_listener_serves_tells_the_launcher_and_drains() {
    let home = model();
    let shard = FakeShard::spawn(
        home.path().join("shard-0"),
        Options {
            vocabulary: served::VOCABULARY,
            end_tokens: vec![served::EOS],
            ..Options::default()
        },
    )
    .unwrap();
    shard.faults().step_delay(Duration::from_millis(20));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (http, control) = (bequeath(&listener, &listener), bequeath(&theirs, &theirs));
    let flags = [
        "--http-fd",
        &http,
        "--control-fd",
        &control,
        "--json-output",
        "--waiting-served-ratio",
        "1.2",
    ];
    let mut child = start(home.path(), &flags, &[("API_KEY", "hunter-one,hunter-two")]);
    drop((listener, theirs));
    ours.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut line = String::new();
    BufReader::new(&ours).read_line(&mut line).unwrap();
    assert_eq!(
        serde_json::from_str::<Value>(&line).unwrap(),
        json!({"event": "ready"})
    );

    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = reqwest::Client::new();
        let body = json!({"inputs": "my secret text", "parameters": {"max_new_tokens": 25, "ignore_eos_token": true}});
        let ask = |key: &'static str| client.post(format!("{url}/generate_stream")).json(&body).bearer_auth(key).send();
        assert_eq!(ask("hunter-three").await.unwrap().status(), 401);
        let mut open = ask("hunter-two").await.unwrap();
        let first = open.chunk().await.unwrap().unwrap();
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
        let rest = String::from_utf8(first.to_vec()).unwrap() + &open.text().await.unwrap();
        assert_eq!(served::data(&rest).len(), 25, "the open answer was finished");
    });
    let stderr = child.stderr.take().unwrap();
    let log: Vec<String> = BufReader::new(stderr).lines().map(Result::unwrap).collect();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{log:?}");
    assert!(
        log.iter()
            .all(|line| serde_json::from_str::<Value>(line).is_ok()),
        "{log:?}"
    );
    let log = log.join("\n");
    assert!(
        log.contains("--waiting-served-ratio") && log.contains("\"answered\""),
        "{log}"
    );
    assert!(
        !log.contains("secret") && !log.contains("hunter"),
        "no text and no key in the log: {log}"
    );
}

#[test]
fn the_launcher_s_end_is_the_router_s() {
    let home = model();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let number = bequeath(&theirs, &theirs);
    let child = start(
        home.path(),
        &["--port", "0"],
        &[("KVRUN_DEATH_FD", &number)],
    );
    drop(theirs);
    std::thread::sleep(Duration::from_millis(300));
    drop(ours);
    assert_eq!(outcome(child).0, 70);
}
