//! What is refused before anything is started, and what the processes are told.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::time::Duration;

use crate::tree::{Launcher, Site, send, until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

#[test]
fn a_port_in_use_is_named_with_its_owner_before_anything_starts() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let site = Site::new(json!({}));
    let mut launcher = site.launch(&["--port", &port]);
    assert_eq!(launcher.wait().code(), Some(13));
    assert!(site.ids("shard").is_empty() && site.ids("router").is_empty());
    let log = launcher.log();
    assert!(
        log.contains(&format!(
            "127.0.0.1:{port} is in use by process {}",
            std::process::id()
        )),
        "{log}"
    );
    assert!(site.processes().is_empty());
}

#[test]
fn a_plan_is_printed_and_nothing_started() {
    let site = Site::new(json!({}));
    let mut launcher = site.launch(&[
        "--plan",
        "--num-shard",
        "2",
        "--usage-stats",
        "on",
        "--lora-ids",
        "",
    ]);
    let (code, text) = launcher.end();
    assert_eq!(code, Some(0), "{}", launcher.log());
    for words in [
        "LlamaForCausalLM",
        "KV cache",
        "shard-1",
        "nothing is ever sent",
        "--http-fd",
        "512 tokens each",
    ] {
        assert!(text.contains(words), "{words} is missing:\n{text}");
    }
    assert!(site.processes().is_empty() && site.run_directories().is_empty());
}

#[test]
fn a_model_larger_than_memory_is_refused_in_numbers() {
    let mut model = json!({"model": {
        "architecture": "LlamaForCausalLM", "parameters": 1, "dtype": "float32", "kv_dtype": "float32", "page_bytes": 4096,
        "page_tokens": 16, "max_positions": 512,
    }});
    model["model"]["rank_weight_bytes"] = json!(1u64 << 50);
    let site = Site::new(model);
    let mut launcher = site.launch(&[]);
    assert_eq!(launcher.wait().code(), Some(12));
    assert!(launcher.log().contains("1048576 GiB"), "{}", launcher.log());
    assert!(site.processes().is_empty());
}

#[test]
fn faulty_files_end_the_start_with_their_code_and_their_message() {
    for (code, message) in [
        (10, "config.json: the field hidden_size is missing"),
        (11, "model.safetensors is short"),
    ] {
        let site = Site::new(json!({"inspect": {"code": code, "message": message}}));
        let mut launcher = site.launch(&[]);
        assert_eq!(launcher.wait().code(), Some(code));
        assert!(
            launcher.log().contains(message) && site.processes().is_empty(),
            "{}",
            launcher.log()
        );
    }
}

#[test]
fn wrong_flags_have_their_code() {
    let site = Site::new(json!({}));
    let cases: [&[&str]; 6] = [
        &["--no-such-flag"],
        &["--quantize", "exl2"],
        &["--ngrok"],
        &["--hostname", "0.0.0.0"],
        &["--num-shard", "x"],
        &["--num-threads", "1000"],
    ];
    for flags in cases {
        assert_eq!(site.launch(flags).wait().code(), Some(10), "{flags:?}");
    }
    let mut missing = site.launch(&["--lora-ids", "/no/such/adapter"]);
    assert_eq!(missing.wait().code(), Some(11), "{}", missing.log());
    let mut help = site.launch(&["--help"]);
    let (code, text) = help.end();
    assert!(code == Some(0) && text.contains("--lora-ids"), "{text}");
}

#[test]
fn every_rank_is_kept_to_the_processors_that_the_log_names() {
    let site = Site::new(json!({}));
    let mut launcher = site.launch(&["--num-shard", "2"]);
    launcher.ready();
    let kept = |id: i32| {
        let status = fs::read_to_string(format!("/proc/{id}/status")).expect("a status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        line.expect("a list").trim().to_owned()
    };
    let ranks: BTreeSet<_> = site.ids("shard").into_iter().map(kept).collect();
    let all = kept(launcher.id());
    assert_eq!(kept(site.ids("router")[0]), all);
    let log = launcher.log();
    let told = log.split_once("on processors ").map(|(_, rest)| rest);
    match told.and_then(|rest| rest.lines().next()) {
        Some(lists) => {
            assert_eq!(ranks.len(), 2, "{ranks:?}");
            assert_eq!(ranks, lists.split(" · ").map(str::to_owned).collect());
        }
        // A machine of one core, which all share.
        None => assert_eq!(ranks, BTreeSet::from([all])),
    }
}

#[test]
fn a_download_can_be_interrupted() {
    let site = Site::new(json!({"download": "/", "download_seconds": 60}));
    let mut command = site.command(&[]);
    command.args(["--lora-ids", "org/adapter"]);
    let mut launcher = Launcher::start(command);
    std::thread::sleep(Duration::from_millis(500));
    send(launcher.id(), Signal::SIGTERM);
    assert_eq!(launcher.wait().code(), Some(0), "{}", launcher.log());
    assert!(launcher.log().contains("before anything was served") && site.processes().is_empty());
}

#[test]
fn repositories_are_downloaded_and_named_as_they_were_asked_for() {
    let site = Site::new(json!({"download": "/tmp"}));
    let mut launcher = site.launch(&["--lora-ids", "math=org/math@v2;org/chat"]);
    launcher.ready();
    let router = argv(&site, "router");
    let at = router
        .iter()
        .position(|word| word == "--lora-adapters")
        .expect("adapters");
    assert_eq!(router[at + 1], "math=/tmp;org/chat=/tmp");
    assert_eq!(launcher.count("download: fetching"), 2);
}

#[test]
fn secrets_are_no_arguments_and_reach_no_shard() {
    let site = Site::new(json!({}));
    let mut command = site.command(&["--json-output"]);
    command
        .env("API_KEY", "hunter2")
        .env("HF_TOKEN", "hunter3")
        .env("MAX_TOTAL_TOKENS", "100");
    let mut launcher = Launcher::start(command);
    until("readiness", || launcher.count("Connected: ready on") == 1);
    for process in site.processes() {
        assert!(!process["argv"].to_string().contains("hunter"), "{process}");
        let keys = ["API_KEY", "HF_TOKEN", "MAX_TOTAL_TOKENS"]
            .map(|name| process["environment"].get(name).is_some());
        let expected = if process["kind"] == "router" {
            [true, true, false]
        } else {
            [false, false, false]
        };
        assert_eq!(keys, expected, "{}", process["kind"]);
    }
    send(launcher.id(), Signal::SIGTERM);
    assert_eq!(launcher.wait().code(), Some(0));
    let log = launcher.log();
    assert!(!log.contains("hunter"));
    for line in log.lines() {
        let event: Value = serde_json::from_str(line).expect(line);
        assert!(
            event["process"].is_string() && event["level"].is_string(),
            "{line}"
        );
    }
}

fn argv(site: &Site, kind: &str) -> Vec<String> {
    let processes = site.processes();
    let process = processes
        .iter()
        .find(|process| process["kind"] == kind)
        .expect("a process");
    let words = process["argv"].as_array().expect("arguments");
    words
        .iter()
        .map(|word| word.as_str().expect("a word").to_owned())
        .collect()
}
