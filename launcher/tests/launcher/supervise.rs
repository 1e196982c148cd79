//! The life of a tree: restarts, drains, and ends that leave nothing behind.

use std::fs;
use std::time::{Duration, Instant};

use crate::tree::{Site, answer, is_alive, send, until};
use nix::sys::signal::Signal;
use serde_json::json;

#[test]
fn a_tree_starts_serves_and_drains() {
    let site = Site::new(json!({}));
    let mut launcher = site.launch(&["--num-shard", "2"]);
    let address = launcher.ready();
    assert_eq!(answer(&address), site.ids("router")[0].to_string());
    assert_eq!(
        (
            site.ids("router").len(),
            site.ids("shard").len(),
            site.alive().len()
        ),
        (1, 2, 3)
    );
    let run = site.run_directories();
    assert_eq!(run.len(), 1);
    send(launcher.id(), Signal::SIGTERM);
    assert_eq!(launcher.wait().code(), Some(0), "{}", launcher.log());
    assert!(site.alive().is_empty() && site.run_directories().is_empty());
}

#[test]
fn a_dead_rank_takes_its_group_with_it_and_all_start_again_beside_the_same_router() {
    let site = Site::new(json!({}));
    let mut launcher = site.launch(&["--num-shard", "2"]);
    launcher.ready();
    let first = site.ids("shard");
    send(first[1], Signal::SIGKILL);
    until("a new group", || site.ids("shard").len() == 4);
    assert!(!is_alive(first[0]));
    assert_eq!(site.ids("router").len(), 1);
    let rendezvous: Vec<String> = site
        .processes()
        .iter()
        .filter(|process| process["kind"] == "shard")
        .map(meeting)
        .collect();
    assert_eq!(rendezvous[0], rendezvous[1]);
    assert_ne!(rendezvous[0], rendezvous[2]);
    assert!(launcher.log().contains("SIGKILL"), "{}", launcher.log());
}

fn meeting(process: &serde_json::Value) -> String {
    let argv: Vec<_> = process["argv"]
        .as_array()
        .expect("arguments")
        .iter()
        .filter_map(|word| word.as_str())
        .collect();
    let at = argv
        .iter()
        .position(|word| *word == "--rendezvous")
        .expect("a rendezvous");
    argv[at + 1].to_owned()
}

#[test]
fn a_dead_router_is_replaced_and_no_connection_is_refused_meanwhile() {
    let site = Site::new(json!({}));
    let mut launcher = site.launch(&[]);
    let address = launcher.ready();
    let (router, shard) = (site.ids("router")[0], site.ids("shard")[0]);
    send(router, Signal::SIGKILL);
    until("its end", || !is_alive(router));
    let answered = answer(&address);
    assert_eq!(answered, site.ids("router")[1].to_string());
    assert_eq!(site.ids("shard"), [shard]);
}

#[test]
fn shards_that_hang_may_write_their_stacks_and_are_replaced() {
    let place = tempfile::tempdir().expect("a folder");
    let stacks = place.path().join("stacks");
    let site = Site::new(json!({"hung": true, "abort": stacks}));
    let mut launcher = site.launch(&[]);
    launcher.ready();
    until("a second shard", || site.ids("shard").len() == 2);
    assert_eq!(fs::read_to_string(&stacks).expect("stacks"), "stacks");
    assert!(!is_alive(site.ids("shard")[0]));
}

#[test]
fn shards_that_keep_dying_spend_the_budget() {
    let site = Site::new(json!({"shard_exit": 1}));
    let mut launcher = site.launch(&["--restart-budget", "2"]);
    assert_eq!(launcher.wait().code(), Some(75), "{}", launcher.log());
    assert_eq!(site.ids("shard").len(), 2);
    assert!(
        launcher.count("a reason to end") >= 2 && site.alive().is_empty(),
        "{}",
        launcher.log()
    );
}

#[test]
fn a_fault_that_no_restart_mends_ends_the_start_with_its_code() {
    for code in [10, 11, 12, 14] {
        let site = Site::new(json!({"shard_exit": code}));
        let mut launcher = site.launch(&[]);
        assert_eq!(launcher.wait().code(), Some(code), "{}", launcher.log());
        assert_eq!(site.ids("shard").len(), 1);
        assert!(launcher.log().contains("a reason to end") && site.alive().is_empty());
    }
}

#[test]
fn a_second_signal_ends_at_once() {
    let site = Site::new(json!({"drain_seconds": 60, "stubborn": true}));
    let mut launcher = site.launch(&[]);
    launcher.ready();
    send(launcher.id(), Signal::SIGINT);
    until("a drain", || launcher.count("no new requests") == 1);
    assert_eq!(site.alive().len(), 2);
    let second = Instant::now();
    send(launcher.id(), Signal::SIGTERM);
    assert_eq!(launcher.wait().code(), Some(128 + 15), "{}", launcher.log());
    assert!(second.elapsed() < Duration::from_secs(30) && site.alive().is_empty());
}

#[test]
fn shards_are_restarted_during_a_drain() {
    let site = Site::new(json!({"drain_seconds": 2}));
    let mut launcher = site.launch(&[]);
    launcher.ready();
    send(launcher.id(), Signal::SIGTERM);
    until("a drain", || launcher.count("no new requests") == 1);
    send(site.ids("shard")[0], Signal::SIGKILL);
    until("a second shard", || site.ids("shard").len() == 2);
    assert_eq!(launcher.wait().code(), Some(0), "{}", launcher.log());
    assert!(site.alive().is_empty());
}

#[test]
fn a_drain_that_outlasts_its_time_is_cut() {
    let site = Site::new(json!({"drain_seconds": 60}));
    let mut launcher = site.launch(&["--graceful-termination-timeout", "0"]);
    launcher.ready();
    send(launcher.id(), Signal::SIGTERM);
    assert_eq!(launcher.wait().code(), Some(70), "{}", launcher.log());
    assert!(site.alive().is_empty());
}

/// KVRUN_KILLS sets how often; the figure to show is 50.
#[test]
fn nothing_outlives_a_launcher_that_is_killed() {
    let rounds: usize = std::env::var("KVRUN_KILLS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(5);
    for round in 0..rounds {
        let site = Site::new(json!({"stubborn": true}));
        let mut launcher = site.launch(&["--num-shard", "2"]);
        // From before the first child to well after the last: every moment must hold.
        match round % 3 {
            0 => std::thread::sleep(Duration::from_millis(20 * round as u64)),
            1 => until("a shard", || !site.ids("shard").is_empty()),
            _ => drop(launcher.ready()),
        }
        send(launcher.id(), Signal::SIGKILL);
        launcher.wait();
        std::thread::sleep(Duration::from_millis(200));
        let end = Instant::now() + Duration::from_millis(1800);
        while !site.alive().is_empty() {
            assert!(
                Instant::now() < end,
                "round {round}: {:?} live on",
                site.alive()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn two_instances_never_meet() {
    let (one, two) = (Site::new(json!({})), Site::new(json!({})));
    // The same folder for run directories, as on one host.
    let mut command = two.command(&[]);
    command.env("XDG_RUNTIME_DIR", one.path("run"));
    let (mut first, mut second) = (one.launch(&[]), crate::tree::Launcher::start(command));
    let addresses = (first.ready(), second.ready());
    assert_ne!(addresses.0, addresses.1);
    assert_eq!(one.run_directories().len(), 2);
    send(first.id(), Signal::SIGTERM);
    assert_eq!(first.wait().code(), Some(0));
    assert_eq!(answer(&addresses.1), two.ids("router")[0].to_string());
    assert_eq!((one.run_directories().len(), two.alive().len()), (1, 2));
}
