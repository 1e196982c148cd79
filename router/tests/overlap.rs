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
    assert!(
        bench
            .shards
            .iter()
            .all(|shard| shard.watch().deepest() == 2)
    );
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
async fn requests_that_come_together_are_computed_together() {
    let bench = overlapped().await;
    bench.shards[0].faults().step_delay(4 * STEP);
    let jobs = (0..8).map(|number| ask(&bench.engine, request(number, 8, 12)));
    join_all(jobs).await;
    assert_eq!(bench.shards[0].watch().widest().rows, 8);
    // A prompt's step for the first, one for all others, then one for each token; no step is split.
    let steps = bench.shards[0].faults().steps_seen();
    assert!(steps <= 12 + 1 + 2, "{steps} steps");
    bench.assert_all_returned().await;
}
