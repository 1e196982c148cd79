//! Adapters come and go while requests run, and nobody waits for anybody else's.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use kvrun_router::request::{AdapterSpec, AdapterState, Event, Failure, LoadError, Refusal};
use support::{ask, collect, request, start, within, write_adapter};

#[tokio::test]
async fn a_loaded_adapter_is_listed_with_what_the_shard_said() {
    let mut bench = start(|_| {}).await;
    bench.write_adapter("a", 100);
    let info = bench.engine.adapters().load(bench.spec("a")).await.unwrap();
    assert_eq!(
        (info.state, info.bytes, info.rank_max),
        (AdapterState::Ready, 100, 4)
    );
    assert_eq!(info.digest.len(), 64);
    assert_eq!(info.targets, ["q_proj"]);
    let again = bench.engine.adapters().load(bench.spec("a")).await.unwrap();
    assert_eq!(again.id, info.id);
    assert_eq!(bench.engine.adapters().list().len(), 1);
}

#[tokio::test]
async fn bad_adapters_are_refused_with_the_reason() {
    let mut bench = start(|setup| setup.engine.adapter_bytes = 1000).await;
    let load = |spec| bench.engine.adapters().load(spec);
    assert!(matches!(
        load(bench.spec("missing")).await,
        Err(LoadError::NotFound(_))
    ));
    std::fs::create_dir_all(bench.home.path().join("adapters/empty")).unwrap();
    assert!(matches!(
        load(bench.spec("empty")).await,
        Err(LoadError::Invalid(_))
    ));
    bench.write_adapter("huge", 1001);
    bench.write_adapter("a", 10);
    let load = |spec| bench.engine.adapters().load(spec);
    assert!(matches!(
        load(bench.spec("huge")).await,
        Err(LoadError::NoRoom(_))
    ));
    load(bench.spec("a")).await.unwrap();
    let mut other = bench.spec("huge");
    other.name = "a".to_owned();
    assert!(matches!(load(other).await, Err(LoadError::Taken { .. })));
    assert!(bench.engine.adapters().resolve("huge").is_err());
}

#[tokio::test]
async fn adapters_beyond_the_room_wait_for_their_first_request() {
    let home = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..20).map(|number| format!("a{number:02}")).collect();
    let mut bench = start(|setup| {
        setup.engine.adapter_bytes = 100;
        let specs = names.iter().map(|name| {
            let path = home.path().join(name);
            write_adapter(&path, name, 30);
            AdapterSpec {
                name: name.clone(),
                path,
                pinned: false,
            }
        });
        setup.engine.adapters = specs.collect();
    })
    .await;
    let states = |bench: &support::Bench| -> Vec<AdapterState> {
        let all = bench.engine.adapters().list();
        all.into_iter().map(|info| info.state).collect()
    };
    let first = states(&bench);
    let ready = first.iter().filter(|&&state| state == AdapterState::Ready);
    assert_eq!(ready.count(), 3, "{first:?}");
    assert_eq!(first[7..], [AdapterState::Known; 13], "{first:?}");
    assert!(!first.contains(&AdapterState::Failed), "{first:?}");
    for name in ["a19", "a12", "a00", "a15"] {
        bench.write_adapter(name, 30);
        let mut asked = request(1, 20, 20);
        asked.adapter = bench.adapter(name);
        let answer = within(ask(&bench.engine, asked.clone())).await.0;
        assert_eq!(answer, bench.alone(&asked, Some(name)));
    }
    assert!(!states(&bench).contains(&AdapterState::Failed));
}

#[tokio::test]
async fn a_slow_load_stops_nobody_else() {
    let mut bench = start(|setup| setup.adapters = vec!["warm"]).await;
    bench.write_adapter("slow", 64);
    bench.shards[0].faults().load_delay(Duration::from_secs(4));
    let (engine, spec) = (bench.engine.clone(), bench.spec("slow"));
    let load = tokio::spawn(async move { engine.adapters().load(spec).await });
    let mut warm = request(1, 20, 20);
    warm.adapter = bench.adapter("warm");
    let base = request(2, 20, 20);
    tokio::join!(ask(&bench.engine, warm), ask(&bench.engine, base));
    assert!(!load.is_finished());
    let mut slow = request(3, 20, 20);
    slow.adapter = bench.adapter("slow");
    assert_eq!(
        ask(&bench.engine, slow.clone()).await.0,
        bench.alone(&slow, Some("slow"))
    );
    load.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_load_that_the_shard_could_not_answer_is_tried_again_within_the_epoch() {
    let mut bench = start(|_| {}).await;
    bench.write_adapter("a", 64);
    bench.shards[0].faults().refuse_loads(2);
    let begun = Instant::now();
    within(bench.engine.adapters().load(bench.spec("a")))
        .await
        .unwrap();
    assert!(
        begun.elapsed() > Duration::from_millis(500),
        "it backs off: {:?}",
        begun.elapsed()
    );
    let mut asked = request(1, 20, 20);
    asked.adapter = bench.adapter("a");
    assert_eq!(
        ask(&bench.engine, asked.clone()).await.0,
        bench.alone(&asked, Some("a"))
    );
    assert_eq!(bench.engine.status().epoch, 1);
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn a_load_that_is_never_answered_fails_with_the_shards_words_and_strands_nobody() {
    let mut bench = start(|setup| setup.adapters = vec!["kept"]).await;
    bench.write_adapter("a", 64);
    bench.shards[0].faults().refuse_loads(u32::MAX);
    let (engine, spec) = (bench.engine.clone(), bench.spec("a"));
    let load = tokio::spawn(async move { engine.adapters().load(spec).await });
    let mut waits = request(1, 20, 20);
    waits.adapter = loop {
        if let Ok(id) = bench.engine.adapters().resolve("a") {
            break Some(id);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    let (_, end) = ask(&bench.engine, waits).await;
    let support::End::Failed(Failure::Adapter(text)) = end else {
        panic!("{end:?}");
    };
    assert!(text.contains("the shard is busy"), "{text}");
    assert!(matches!(
        within(load).await.unwrap(),
        Err(LoadError::Unavailable(_))
    ));
    let mut other = request(2, 20, 20);
    other.adapter = bench.adapter("kept");
    ask(&bench.engine, other).await;
    bench.shards[0].faults().refuse_loads(0);
    let loaded = bench.engine.adapters().load(bench.spec("a")).await;
    assert_eq!(loaded.unwrap().state, AdapterState::Ready);
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn an_adapter_unloaded_in_use_serves_its_running_requests_to_the_end() {
    let bench = start(|setup| setup.adapters = vec!["a"]).await;
    bench.shards[0]
        .faults()
        .step_delay(Duration::from_millis(3));
    let mut asked = request(1, 20, 40);
    asked.end_tokens = Arc::from([]);
    asked.adapter = bench.adapter("a");
    let mut answer = bench.engine.submit(asked.clone()).await.unwrap();
    let mut ids = Vec::new();
    while ids.is_empty() {
        if let Some(Event::Token(token)) = within(answer.next()).await {
            ids.push(token.id);
        }
    }
    let info = bench.engine.adapters().unload("a").await.unwrap();
    assert_eq!((info.state, info.users), (AdapterState::Draining, 1));
    assert!(bench.engine.adapters().resolve("a").is_err());
    assert_eq!(
        bench.engine.submit(asked.clone()).await.err(),
        Some(Refusal::UnknownAdapter("a".to_owned()))
    );
    assert_eq!(bench.shards[0].watch().last().adapters, 1);
    while let Some(event) = within(answer.next()).await {
        if let Event::Token(token) = event {
            ids.push(token.id);
        }
    }
    assert_eq!(ids, bench.alone(&asked, Some("a")));
    while !bench.engine.adapters().list().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn more_adapters_than_fit_take_turns() {
    let names = ["a", "b", "c", "d", "e"];
    let bench = start(|setup| {
        setup.engine.adapter_bytes = 64 * 2;
        setup.adapters = names.to_vec();
    })
    .await;
    let jobs: Vec<_> = (0..20u64)
        .map(|number| {
            let name = names[number as usize % names.len()];
            let mut request = request(number, 20, 20);
            request.adapter = bench.adapter(name);
            (request, name)
        })
        .collect();
    let answers = join_all(jobs.iter().map(|(r, _)| ask(&bench.engine, r.clone()))).await;
    for ((request, name), (ids, _)) in jobs.iter().zip(answers) {
        assert_eq!(ids, bench.alone(request, Some(name)));
    }
    assert!(bench.shards[0].watch().last().adapters <= 2);
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn adapters_churn_in_flight_and_every_answer_is_right() {
    let bench = start(|setup| setup.adapters = vec!["a", "b"]).await;
    bench.shards[0]
        .faults()
        .step_delay(Duration::from_millis(1));
    let churn = async {
        for _ in 0..20 {
            bench.engine.adapters().unload("a").await.unwrap();
            bench.engine.adapters().load(bench.spec("a")).await.unwrap();
        }
    };
    let streams = join_all((0..40u64).map(|number| {
        let bench = &bench;
        async move {
            tokio::time::sleep(Duration::from_millis(number * 2)).await;
            let name = ["a", "b"][number as usize % 2];
            let Ok(id) = bench.engine.adapters().resolve(name) else {
                return;
            };
            let mut asked = request(number, 20, 20);
            asked.adapter = Some(id);
            match bench.engine.submit(asked.clone()).await {
                Ok(answer) => assert_eq!(collect(answer).await.0, bench.alone(&asked, Some(name))),
                Err(refusal) => assert_eq!(refusal, Refusal::UnknownAdapter(name.to_owned())),
            }
        }
    }));
    tokio::join!(churn, streams);
    bench.assert_all_returned().await;
}

#[tokio::test]
async fn adapters_are_loaded_again_after_the_shards_died() {
    let mut bench = start(|setup| setup.adapters = vec!["a"]).await;
    bench.restart_shards();
    let mut asked = request(1, 20, 20);
    asked.adapter = bench.adapter("a");
    assert_eq!(
        ask(&bench.engine, asked.clone()).await.0,
        bench.alone(&asked, Some("a"))
    );
    let info = bench.engine.adapters().list().remove(0);
    assert_eq!(info.state, AdapterState::Ready);
}

#[tokio::test]
async fn adapters_that_lie_in_pages_take_turns_beside_requests() {
    let names = ["a", "b", "c", "d", "e"];
    let bench = start(|setup| {
        setup.ranks = 2;
        setup.shard.places_adapters = true;
        setup.shard.pages = 16;
        setup.engine.queue_tokens = 10_000;
    })
    .await;
    for name in names {
        write_adapter(&bench.home.path().join("adapters").join(name), name, 5000);
        let info = bench.engine.adapters().load(bench.spec(name)).await;
        assert_eq!(info.unwrap().bytes, 5000);
    }
    let jobs: Vec<_> = (0..40u64)
        .map(|number| {
            let name = names.get(number as usize % 6).copied();
            let mut request = request(number, 20, 30);
            request.adapter = name.and_then(|name| bench.adapter(name));
            (request, name)
        })
        .collect();
    let answers = join_all(jobs.iter().map(|(r, _)| ask(&bench.engine, r.clone()))).await;
    for ((request, name), (ids, _)) in jobs.iter().zip(answers) {
        assert_eq!(ids, bench.alone(request, *name));
    }
    bench.assert_all_returned().await;
    let status = bench.engine.status();
    assert!([5, 10].contains(&status.adapter_pages), "{status:?}");
    let free = status.free_pages + status.cached_pages;
    assert_eq!(free + status.adapter_pages, status.pages);
}

#[tokio::test]
async fn an_adapter_that_no_pool_of_pages_holds_is_refused() {
    let mut bench = start(|setup| {
        setup.shard.places_adapters = true;
        setup.shard.pages = 16;
    })
    .await;
    bench.write_adapter("a", 16 * 1024);
    let refused = bench.engine.adapters().load(bench.spec("a")).await;
    let Err(LoadError::NoRoom(reason)) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        reason.contains("takes 16 pages and the pool has 16"),
        "{reason}"
    );
    while bench.shards[0].watch().last().adapters > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bench.assert_all_returned().await;
}
