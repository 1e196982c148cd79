//! Shards die, hang, stutter and lie; no answer loses, repeats or changes a token.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::join_all;
use kvrun_fake_shard::{Fault, Mark};
use kvrun_router::engine::{Control, Overlap};
use kvrun_router::request::{Failure, Refusal, ValidRequest};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::{Bench, End, ask, request, start};

/// Streams of different lengths, a third of them under each adapter, half of them seeded alike.
fn jobs(bench: &Bench, count: u64) -> Vec<(ValidRequest, Option<&'static str>)> {
    (0..count)
        .map(|number| {
            let name = [None, Some("a"), Some("b")][number as usize % 3];
            let mut request = request(number, 20 + number as u32 * 9, 120);
            request.adapter = name.and_then(|name| bench.adapter(name));
            (request, name)
        })
        .collect()
}

async fn assert_all_right(bench: &Bench, jobs: &[(ValidRequest, Option<&'static str>)]) {
    let answers = join_all(jobs.iter().map(|(r, _)| ask(&bench.engine, r.clone()))).await;
    for ((request, name), (ids, end)) in jobs.iter().zip(answers) {
        assert!(matches!(end, End::Finished(_)), "{end:?}");
        assert_eq!(ids, bench.alone(request, *name));
    }
}

/// Streams, wave after wave, while `disturb` is called at random moments, `times` times at least.
async fn streams_survive(
    ranks: u32,
    overlap: Overlap,
    times: usize,
    disturb: impl Fn(&mut Bench, &mut StdRng) + Send + 'static,
) {
    let mut bench = start(|setup| {
        setup.ranks = ranks;
        setup.overlap(overlap);
        setup.adapters = vec!["a", "b"];
    })
    .await;
    for shard in &bench.shards {
        shard.faults().step_delay(Duration::from_millis(1));
    }
    let mut rng = StdRng::seed_from_u64(7);
    let (mut disturbed, mut answered) = (0, 0);
    while disturbed < times {
        let jobs = jobs(&bench, 16);
        let engine = bench.engine.clone();
        let done = Arc::new(AtomicBool::new(false));
        let finished = done.clone();
        let requests: Vec<_> = jobs.iter().map(|(r, _)| r.clone()).collect();
        let streams = tokio::spawn(async move {
            let answers = join_all(requests.into_iter().map(|r| ask(&engine, r))).await;
            finished.store(true, Ordering::Release);
            answers
        });
        while !done.load(Ordering::Acquire) {
            let pause = rng.random_range(40..160);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            if !done.load(Ordering::Acquire) {
                disturb(&mut bench, &mut rng);
                disturbed += 1;
            }
        }
        for ((request, name), (ids, end)) in jobs.iter().zip(streams.await.unwrap()) {
            assert!(matches!(end, End::Finished(_)), "{end:?}");
            assert_eq!(ids, bench.alone(request, *name));
            answered += 1;
        }
    }
    println!("{disturbed} disturbances, {answered} answers, all as alone");
    bench.assert_all_returned().await;
}

/// `KVRUN_KILLS=100` for the long run.
fn kills() -> usize {
    std::env::var("KVRUN_KILLS")
        .ok()
        .and_then(|kills| kills.parse().ok())
        .unwrap_or(8)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_survive_kills_at_random_moments() {
    streams_survive(1, Overlap::Off, kills(), |bench, _| bench.restart_shards()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_survive_kills_with_two_steps_in_flight() {
    streams_survive(1, Overlap::On, kills(), |bench, _| bench.restart_shards()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_survive_the_death_of_either_rank() {
    for overlap in [Overlap::Off, Overlap::On] {
        streams_survive(2, overlap, kills() / 2, |bench, rng| {
            bench.shards[rng.random_range(0..2)].kill();
            bench.restart_shards();
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_survive_steps_that_find_no_memory() {
    for overlap in [Overlap::Off, Overlap::On] {
        streams_survive(1, overlap, 10, |bench, _| {
            bench.shards[0].faults().after_steps(1, Fault::OutOfMemory);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeated_and_stale_replies_change_nothing() {
    for overlap in [Overlap::Off, Overlap::On] {
        streams_survive(2, overlap, 10, |bench, rng| {
            let fault = if rng.random() {
                Fault::DuplicateReply
            } else {
                Fault::StaleReply
            };
            let rank = rng.random_range(0..2);
            bench.shards[rank].faults().after_steps(1, fault);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_reply_ends_the_epoch_when_the_next_one_comes() {
    streams_survive(1, Overlap::On, 4, |bench, _| {
        bench.shards[0].faults().after_steps(1, Fault::DropReply);
    })
    .await;
}

/// Acts as the launcher: restarts the group whenever the engine says that it hangs.
async fn recovers_from_silence(overlap: Overlap, fault: Fault) {
    let mut bench = start(|setup| {
        setup.overlap(overlap);
        setup.adapters = vec!["a", "b"];
    })
    .await;
    let jobs = jobs(&bench, 8);
    // The watchdog judges by what steps took, so it has to have seen some.
    ask(&bench.engine, request(50, 5, 5)).await;
    bench.shards[0].faults().after_steps(20, fault);
    let (engine, requests) = (
        bench.engine.clone(),
        jobs.iter().map(|(r, _)| r.clone()).collect::<Vec<_>>(),
    );
    let streams =
        tokio::spawn(async move { join_all(requests.into_iter().map(|r| ask(&engine, r))).await });
    let hung = |bench: &Bench| {
        let controls = bench.controls.lock().unwrap();
        controls
            .iter()
            .any(|control| matches!(control, Control::ShardHung { .. }))
    };
    while !hung(&bench) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bench.restart_shards();
    for ((request, name), (ids, _)) in jobs.iter().zip(streams.await.unwrap()) {
        assert_eq!(ids, bench.alone(request, *name));
    }
    bench.assert_all_returned().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_shard_is_reported_and_its_streams_go_on() {
    recovers_from_silence(Overlap::Off, Fault::Hang).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_is_that_of_the_oldest_step() {
    recovers_from_silence(Overlap::On, Fault::Hang).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_reply_is_a_hang_too() {
    recovers_from_silence(Overlap::Off, Fault::DropReply).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poisonous_request_is_given_up_and_the_others_go_on() {
    for overlap in [Overlap::Off, Overlap::On] {
        the_poisonous_is_given_up(overlap).await;
    }
}

async fn the_poisonous_is_given_up(overlap: Overlap) {
    const POISON: u32 = 31_998;
    let mut bench = start(|setup| {
        setup.overlap(overlap);
        setup.adapters = vec!["a", "b"];
    })
    .await;
    bench.shards[0].faults().mark(POISON, Mark::Poison);
    let good = jobs(&bench, 6);
    let mut poison = request(99, 20, 20);
    poison.prompt = poison.prompt.iter().copied().chain([POISON]).collect();
    let (engine, asked) = (bench.engine.clone(), poison.clone());
    let culprit = tokio::spawn(async move { ask(&engine, asked).await });
    let (engine, requests) = (
        bench.engine.clone(),
        good.iter().map(|(r, _)| r.clone()).collect::<Vec<_>>(),
    );
    let others =
        tokio::spawn(async move { join_all(requests.into_iter().map(|r| ask(&engine, r))).await });
    let mut deaths = 0;
    while !(culprit.is_finished() && others.is_finished()) {
        if !bench.shards[0].alive() {
            deaths += 1;
            bench.restart_shards();
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let (ids, end) = culprit.await.unwrap();
    assert!(ids.is_empty());
    assert_eq!(end, End::Failed(Failure::Deadly));
    assert_eq!(deaths, 3);
    for ((request, name), (ids, _)) in good.iter().zip(others.await.unwrap()) {
        assert_eq!(ids, bench.alone(request, *name));
    }
    let mut harmless = poison.clone();
    harmless.prompt = poison.prompt[..20].into();
    assert_eq!(
        ask(&bench.engine, harmless.clone()).await.0,
        bench.alone(&harmless, None)
    );
    // The same from somebody else with another seed and another length.
    poison.sampling.seed += 1;
    poison.tenant = "somebody else".into();
    poison.max_new_tokens += 1;
    let refused = bench.engine.submit(poison).await.err();
    assert!(
        matches!(refused, Some(Refusal::Quarantined { remaining }) if remaining > Duration::from_secs(500)),
        "{refused:?}"
    );
    assert!(bench.shards[0].alive());
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn requests_wait_for_shards_that_come_back() {
    let mut bench = start(|setup| setup.adapters = vec!["a", "b"]).await;
    bench.shards[0].kill();
    while bench.engine.status().ready {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let jobs = jobs(&bench, 3);
    let engine = bench.engine.clone();
    let first = jobs[1].0.clone();
    let early = tokio::spawn(async move { ask(&engine, first).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    bench.restart_shards();
    assert_eq!(early.await.unwrap().0, bench.alone(&jobs[1].0, jobs[1].1));
    assert_all_right(&bench, &jobs).await;
}

#[tokio::test]
async fn every_epoch_that_serves_is_announced_once() {
    let mut bench = start(|_| {}).await;
    for served in 1..=3 {
        let announced = bench.controls.lock().unwrap().clone();
        assert_eq!(announced, vec![Control::Ready; served]);
        bench.shards[0].kill();
        while bench.engine.status().ready {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        bench.restart_shards();
        assert_all_right(&bench, &jobs(&bench, 1)).await;
    }
}
