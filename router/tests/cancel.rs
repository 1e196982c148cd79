//! Clients that leave: everything they held is given back within a step.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use kvrun_router::request::{Event, ValidRequest};
use support::{ask, request, start, within};

fn endless(number: u64) -> ValidRequest {
    ValidRequest {
        end_tokens: Arc::from([]),
        ..request(number, 40, 3000)
    }
}

#[tokio::test]
async fn a_dropped_answer_frees_its_pages_within_a_step() {
    let bench = start(|_| {}).await;
    bench.shards[0]
        .faults()
        .step_delay(Duration::from_millis(20));
    let mut answer = bench.engine.submit(endless(1)).await.unwrap();
    while !matches!(within(answer.next()).await, Some(Event::Token(_))) {}
    let seen = bench.shards[0].faults().steps_seen();
    drop(answer);
    bench.assert_all_returned().await;
    let steps = bench.shards[0].faults().steps_seen() - seen;
    // The step in flight, and the one that releases.
    assert!(steps <= 2, "{steps} steps");
}

#[tokio::test]
async fn a_request_dropped_in_the_queue_is_never_computed() {
    let bench = start(|setup| setup.engine.step_rows = 1).await;
    bench.shards[0]
        .faults()
        .step_delay(Duration::from_millis(5));
    let first = bench.engine.submit(endless(1)).await.unwrap();
    let second = bench.engine.submit(endless(2)).await.unwrap();
    drop(second);
    drop(first);
    let third = request(3, 10, 5);
    assert_eq!(
        ask(&bench.engine, third.clone()).await.0,
        bench.alone(&third, None)
    );
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn a_submission_that_is_abandoned_before_admission_leaves_nothing() {
    let bench = start(|_| {}).await;
    for number in 0..50 {
        let submit = bench.engine.submit(endless(number));
        let _ = tokio::time::timeout(Duration::from_micros(number * 3), submit).await;
    }
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn a_third_of_the_clients_leave_and_the_others_notice_nothing() {
    let bench = start(|_| {}).await;
    let jobs = (0..64u64).map(|number| {
        let bench = &bench;
        async move {
            let asked = request(number, 10 + number as u32 * 5, 60);
            if number % 3 != 0 {
                assert_eq!(
                    ask(&bench.engine, asked.clone()).await.0,
                    bench.alone(&asked, None)
                );
                return;
            }
            let mut answer = bench.engine.submit(asked).await.unwrap();
            for _ in 0..number / 3 {
                within(answer.next()).await;
            }
        }
    });
    join_all(jobs).await;
    bench.assert_all_returned().await;
}
