//! The next step is sent while one is computed: answers are the same, and what ends in between costs a row and no more.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use kvrun_router::engine::Overlap;
use kvrun_router::request::{Event, Finish, ValidRequest};
use support::{Bench, End, ask, request, start, within};

const STEP: Duration = Duration::from_millis(5);

async fn overlapped() -> Bench {
    let bench = start(|setup| {
        setup.overlap(Overlap::On);
        setup.adapters = vec!["a", "b"];
    })
    .await;
    assert!(bench.engine.status().overlap);
    bench
}

#[tokio::test]
async fn steps_overlap_where_the_shards_do_not_compute_on_the_cpu() {
    for (overlap, device, on) in [
        (Overlap::Auto, "cpu", false),
        (Overlap::Auto, "cuda:0", true),
        (Overlap::On, "cpu", true),
        (Overlap::Off, "cuda:0", false),
    ] {
        let bench = start(|setup| {
            setup.engine.overlap = overlap;
            setup.shard.device = device.to_owned();
            setup.shard.in_flight = if on { 2 } else { 1 };
        })
        .await;
        let asked = request(1, 20, 20);
        let (ids, _) = ask(&bench.engine, asked.clone()).await;
        assert_eq!(ids, bench.alone(&asked, None));
        let deepest = bench.shards[0].watch().deepest();
        assert_eq!(
            (bench.engine.status().overlap, deepest),
            (on, 1 + u64::from(on))
        );
        bench.assert_all_returned().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_the_same_on_ranks_of_different_speed() {
    let bench = start(|setup| {
        setup.ranks = 2;
        setup.overlap(Overlap::On);
        setup.adapters = vec!["a", "b"];
    })
    .await;
    bench.shards[1].faults().step_delay(STEP);
    let jobs = (0..12u64).map(|number| {
        let bench = &bench;
        async move {
            let name = [None, Some("a"), Some("b")][number as usize % 3];
            let mut asked = request(number, 20 + number as u32 * 40, 30 + number as u32);
            asked.adapter = name.and_then(|name| bench.adapter(name));
            let (ids, end) = ask(&bench.engine, asked.clone()).await;
            assert!(matches!(end, End::Finished(_)), "{end:?}");
            assert_eq!(ids, bench.alone(&asked, name));
        }
    });
    join_all(jobs).await;
    let deepest = |shard: &kvrun_fake_shard::FakeShard| shard.watch().deepest();
    assert!(bench.shards.iter().all(|shard| deepest(shard) == 2));
    assert_eq!(bench.engine.status().epoch, 1, "nothing was replayed");
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn an_answer_of_known_length_takes_no_step_more_than_in_lockstep() {
    let bench = overlapped().await;
    let seen = bench.shards[0].faults().steps_seen();
    let asked = ValidRequest {
        end_tokens: Arc::from([]),
        ..request(1, 20, 30)
    };
    let (ids, end) = ask(&bench.engine, asked).await;
    assert_eq!((ids.len(), end), (30, End::Finished(Finish::Length)));
    bench.assert_all_returned().await;
    // One for each token, and one that releases.
    assert_eq!(bench.shards[0].faults().steps_seen() - seen, 31);
}

#[tokio::test]
async fn what_follows_the_end_of_an_answer_is_told_to_nobody() {
    let bench = overlapped().await;
    let endless = ValidRequest {
        end_tokens: Arc::from([]),
        ..request(1, 20, 30)
    };
    let whole = bench.alone(&endless, None);
    let seen = bench.shards[0].faults().steps_seen();
    let asked = ValidRequest {
        end_tokens: Arc::from([whole[9]]),
        ..endless
    };
    let (ids, end) = ask(&bench.engine, asked).await;
    assert_eq!(
        (&ids[..], end),
        (&whole[..10], End::Finished(Finish::EndToken))
    );
    bench.assert_all_returned().await;
    // One for each token, one too many, and one that releases.
    assert_eq!(bench.shards[0].faults().steps_seen() - seen, 12);
}

#[tokio::test]
async fn a_dropped_answer_frees_its_pages_once_two_steps_are_done() {
    let bench = overlapped().await;
    bench.shards[0].faults().step_delay(4 * STEP);
    let endless = ValidRequest {
        end_tokens: Arc::from([]),
        ..request(1, 40, 3000)
    };
    let mut answer = bench.engine.submit(endless).await.unwrap();
    while !matches!(within(answer.next()).await, Some(Event::Token(_))) {}
    let seen = bench.shards[0].faults().steps_seen();
    drop(answer);
    bench.assert_all_returned().await;
    let steps = bench.shards[0].faults().steps_seen() - seen;
    // The steps in flight, of which one may have come meanwhile, and the one that releases.
    assert!(steps <= 3, "{steps} steps");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_come_close_after_each_other_are_in_one_step() {
    let bench = overlapped().await;
    // From then on it is known how long one row takes.
    ask(&bench.engine, request(9, 2, 4)).await;
    bench.assert_all_returned().await;
    bench.shards[0].faults().step_delay(20 * STEP);
    let seen = bench.shards[0].faults().steps_seen();
    let jobs = (0..8u64).map(|number| {
        let engine = &bench.engine;
        async move {
            tokio::time::sleep(STEP * number as u32).await;
            let endless = ValidRequest {
                end_tokens: Arc::from([]),
                ..request(number, 2, 8)
            };
            ask(engine, endless).await
        }
    });
    join_all(jobs).await;
    bench.assert_all_returned().await;
    // One for the first, eight from the first token of all others to their last, and one that releases.
    assert_eq!(bench.shards[0].faults().steps_seen() - seen, 10);
}
