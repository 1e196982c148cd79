//! An engine without work sleeps, and what it slept through is no silence of the shards.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::time::Duration;

use kvrun_fake_shard::Fault;
use support::{ask, request, start};
use tokio::time::sleep;

/// How often the engine's thread has gone to sleep so far.
fn sleeps() -> u64 {
    let threads = fs::read_dir("/proc/self/task").unwrap().flatten();
    let engine = threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok())
        .find(|status| status.starts_with("Name:\tengine\n"))
        .unwrap();
    let line = engine
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.unwrap().trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_wakes_an_engine_without_work() {
    let bench = start(|setup| setup.adapters = vec!["a"]).await;
    ask(&bench.engine, request(1, 20, 20)).await;
    bench.assert_all_returned().await;
    sleep(Duration::from_millis(300)).await;
    let before = sleeps();
    sleep(Duration::from_secs(2)).await;
    assert_eq!(sleeps() - before, 0);

    bench.shards[0].faults().after_steps(1, Fault::Hang);
    let _answer = bench.engine.submit(request(2, 20, 20)).await.unwrap();
    sleep(Duration::from_millis(600)).await;
    let stalled = bench.engine.status().stalled;
    let since_then = Duration::from_millis(500)..Duration::from_millis(1500);
    assert!(since_then.contains(&stalled), "{stalled:?}");
    assert!(sleeps() - before > 2, "nobody watches the step in flight");
}
