//! Many requests in one running batch, over the real wire.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use kvrun_router::request::{Event, Failure, Refusal};
use support::{End, Setup, ask, collect, request, start, within};

#[tokio::test]
async fn every_answer_in_a_batch_equals_the_answer_alone() {
    let bench = start(|_| {}).await;
    let requests: Vec<_> = (0..64).map(|n| request(n, 1 + n as u32 * 3, 40)).collect();
    let answers = join_all(requests.iter().map(|r| ask(&bench.engine, r.clone()))).await;
    for (request, (ids, end)) in requests.iter().zip(answers) {
        assert_eq!(ids, bench.alone(request, None));
        assert!(matches!(end, End::Finished(_)));
    }
    let widest = bench.shards[0].watch().widest();
    assert!(widest.rows > 16, "the batch was {} rows wide", widest.rows);
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn base_and_adapters_share_a_batch() {
    let names = ["a", "b", "c"];
    let bench = start(|setup| setup.adapters = names.to_vec()).await;
    bench.shards[0]
        .faults()
        .step_delay(Duration::from_millis(2));
    let jobs: Vec<_> = (0..24)
        .map(|n| {
            let name = names.get(n as usize % 4).copied();
            let mut request = request(7, 33, 24);
            request.adapter = name.and_then(|name| bench.adapter(name));
            request.sampling.seed = n / 8;
            (request, name)
        })
        .collect();
    let answers = join_all(jobs.iter().map(|(r, _)| ask(&bench.engine, r.clone()))).await;
    for ((request, name), (ids, _)) in jobs.iter().zip(answers) {
        assert_eq!(ids, bench.alone(request, *name), "under {name:?}");
    }
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn a_prompt_larger_than_a_step_is_computed_in_chunks_beside_running_answers() {
    let bench = start(|setup| setup.engine.step_tokens = 64).await;
    let (long, short) = (request(1, 1000, 8), request(2, 5, 100));
    let (a, b) = tokio::join!(
        ask(&bench.engine, long.clone()),
        ask(&bench.engine, short.clone())
    );
    assert_eq!(a.0, bench.alone(&long, None));
    assert_eq!(b.0, bench.alone(&short, None));
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn a_second_turn_reuses_the_pages_of_the_first_answer() {
    let bench = start(|_| {}).await;
    let first = request(3, 100, 50);
    let (ids, _) = ask(&bench.engine, first.clone()).await;
    let mut second = request(3, 0, 10);
    second.prompt = first.prompt.iter().chain(&ids).copied().collect();
    let mut answer = bench.engine.submit(second.clone()).await.unwrap();
    let Some(Event::Started { cached_tokens, .. }) = within(answer.next()).await else {
        panic!("no start");
    };
    // All full pages of prompt and answer but for the last token of each.
    assert_eq!(cached_tokens, (100 + ids.len() as u32 - 1) / 16 * 16);
    drop(answer);
    let mut stranger = second.clone();
    stranger.tenant = Arc::from("somebody else");
    let mut answer = bench.engine.submit(stranger).await.unwrap();
    let started = within(answer.next()).await;
    assert!(
        matches!(
            started,
            Some(Event::Started {
                cached_tokens: 0,
                ..
            })
        ),
        "{started:?}"
    );
    drop(answer);
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn a_small_pool_preempts_and_every_answer_is_still_right() {
    let small = |setup: &mut Setup| {
        setup.engine.pool_tokens = 640;
        setup.engine.queue_tokens = u64::MAX;
    };
    let bench = start(small).await;
    let requests: Vec<_> = (0..12).map(|n| request(n, 40, 200)).collect();
    let answers = join_all(requests.iter().map(|r| ask(&bench.engine, r.clone()))).await;
    for (request, (ids, _)) in requests.iter().zip(answers) {
        assert_eq!(ids, bench.alone(request, None));
    }
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn what_cannot_fit_is_refused_at_admission() {
    let bench = start(|setup| setup.engine.pool_tokens = 160).await;
    let refusal = bench.engine.submit(request(1, 100, 61)).await.err();
    assert_eq!(
        refusal,
        Some(Refusal::TooLong {
            asked: 161,
            limit: 160
        })
    );
    ask(&bench.engine, request(1, 100, 60)).await;
}

#[tokio::test]
async fn a_full_queue_refuses_with_a_time_to_come_back() {
    let few = |setup: &mut Setup| {
        setup.engine.step_rows = 1;
        setup.engine.queue_requests = 2;
    };
    let bench = start(few).await;
    bench.shards[0]
        .faults()
        .step_delay(Duration::from_millis(20));
    let mut kept = Vec::new();
    let refusal = loop {
        match bench.engine.submit(request(kept.len() as u64, 8, 50)).await {
            Ok(answer) => kept.push(answer),
            Err(refusal) => break refusal,
        }
        assert!(kept.len() < 8, "nothing was refused");
    };
    let Refusal::Overloaded { retry_after } = refusal else {
        panic!("{refusal:?}");
    };
    assert!(retry_after >= Duration::from_secs(1));
    drop(kept);
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn a_failing_row_leaves_its_neighbours_alone() {
    let bench = start(|_| {}).await;
    let mark = kvrun_fake_shard::Mark::RowError("nan_logits: row of the test".to_owned());
    bench.shards[0].faults().mark(31_999, mark);
    let mut bad = request(99, 20, 20);
    bad.prompt = bad.prompt.iter().copied().chain([31_999]).collect();
    let good: Vec<_> = (0..7).map(|n| request(n, 20, 20)).collect();
    let (failed, answers) = tokio::join!(
        ask(&bench.engine, bad),
        join_all(good.iter().map(|r| ask(&bench.engine, r.clone())))
    );
    assert_eq!(
        failed,
        (
            vec![],
            End::Failed(Failure::Row("nan_logits: row of the test".to_owned()))
        )
    );
    for (request, (ids, _)) in good.iter().zip(answers) {
        assert_eq!(ids, bench.alone(request, None));
    }
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn prompt_log_probabilities_come_once_and_before_the_first_token() {
    let bench = start(|setup| setup.engine.step_tokens = 16).await;
    let mut request = request(5, 50, 4);
    request.sampling.prompt_logprobs = true;
    request.reuse_prefix = false;
    let mut answer = bench.engine.submit(request.clone()).await.unwrap();
    let mut events = Vec::new();
    while let Some(event) = within(answer.next()).await {
        events.push(event);
    }
    let Event::Prompt(tokens) = &events[1] else {
        panic!("{events:?}");
    };
    let ids: Vec<_> = tokens.iter().map(|token| token.id).collect();
    assert_eq!(ids, request.prompt[1..]);
    assert!(
        events[2..]
            .iter()
            .all(|event| !matches!(event, Event::Prompt(_)))
    );
}

#[tokio::test]
async fn a_request_fails_soon_after_its_deadline_and_keeps_what_it_got() {
    let bench = start(|_| {}).await;
    bench.shards[0]
        .faults()
        .step_delay(Duration::from_millis(20));
    let mut request = request(1, 10, 4000);
    request.end_tokens = Arc::from([]);
    let begun = Instant::now();
    request.deadline = Some(begun + Duration::from_millis(300));
    let (ids, end) = ask(&bench.engine, request).await;
    assert_eq!(end, End::Failed(Failure::Deadline));
    assert!(!ids.is_empty());
    assert!(
        begun.elapsed() < Duration::from_secs(40), // its answer would take 80
        "{:?}",
        begun.elapsed()
    );
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn two_ranks_compute_every_step_together() {
    let bench = start(|setup| {
        setup.ranks = 2;
        setup.adapters = vec!["a"];
    })
    .await;
    let mut with = request(1, 30, 30);
    with.adapter = bench.adapter("a");
    let without = request(2, 30, 30);
    let (a, b) = tokio::join!(
        ask(&bench.engine, with.clone()),
        ask(&bench.engine, without.clone())
    );
    assert_eq!(a.0, bench.alone(&with, Some("a")));
    assert_eq!(b.0, bench.alone(&without, None));
    // Until the last release has come to both, one rank may be a step ahead of the other.
    bench.assert_all_returned().await;
    let seen = bench.shards.iter().map(|shard| shard.watch().last());
    let seen: Vec<_> = seen.collect();
    assert_eq!(seen[0], seen[1]);
}

#[tokio::test]
async fn draining_finishes_what_runs_and_refuses_what_comes() {
    let bench = start(|_| {}).await;
    bench.shards[0]
        .faults()
        .step_delay(Duration::from_millis(5));
    let asked = request(1, 10, 40);
    let answer = bench.engine.submit(asked.clone()).await.unwrap();
    let engine = bench.engine.clone();
    let drain = tokio::spawn(async move { engine.drain(Duration::from_secs(30)).await });
    while !bench.engine.status().draining {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(
        bench.engine.submit(asked.clone()).await.err(),
        Some(Refusal::Draining)
    );
    assert_eq!(collect(answer).await.0, bench.alone(&asked, None));
    within(drain).await.unwrap();
}

#[tokio::test]
async fn the_end_of_the_grace_time_fails_what_still_runs() {
    let bench = start(|_| {}).await;
    bench.shards[0]
        .faults()
        .step_delay(Duration::from_millis(10));
    let mut endless = request(1, 10, 4000);
    endless.end_tokens = Arc::from([]);
    let answer = bench.engine.submit(endless).await.unwrap();
    within(bench.engine.drain(Duration::from_millis(100))).await;
    assert_eq!(collect(answer).await.1, End::Failed(Failure::ShuttingDown));
    bench.assert_all_returned().await;
}

/// The quantile of a histogram on the metrics page: the upper bound of the bucket that holds it, in seconds.
fn quantile(page: &str, name: &str, quantile: f64) -> f64 {
    let buckets: Vec<(f64, f64)> = page
        .lines()
        .filter_map(|line| line.strip_prefix(&format!("{name}_bucket{{le=\"")))
        .filter_map(|line| line.split_once("\"} "))
        .map(|(bound, count)| {
            (
                bound.parse().unwrap_or(f64::INFINITY),
                count.parse().unwrap(),
            )
        })
        .collect();
    let total = buckets.last().map_or(0.0, |(_, count)| *count);
    let holds = |(_, count): &&(f64, f64)| *count >= total * quantile;
    buckets
        .iter()
        .find(holds)
        .map_or(f64::NAN, |(bound, _)| *bound)
}

#[tokio::test]
async fn the_router_takes_less_than_a_third_of_a_millisecond_between_steps() {
    let page = kvrun_router::metrics::install();
    let bench = start(|_| {}).await;
    let streams = (0..32).map(|number| {
        let mut asked = request(number, 50, 400);
        asked.end_tokens = Arc::from([]);
        ask(&bench.engine, asked)
    });
    join_all(streams).await;
    let page = page.render();
    for name in ["kvrun_router_gap_seconds", "kvrun_step_transport_seconds"] {
        let (p50, p99) = (quantile(&page, name, 0.5), quantile(&page, name, 0.99));
        println!("{name}: p50 <= {p50} s, p99 <= {p99} s");
    }
    // Other tests of this process count into the same histogram, all with fewer rows or about as many.
    let gap = quantile(&page, "kvrun_router_gap_seconds", 0.5);
    assert!(gap <= 0.0003, "p50 {gap} s");
}
