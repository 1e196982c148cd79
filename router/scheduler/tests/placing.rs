//! Adapters that lie in pages: where they come, when they leave, and what does not fit beside them.
#![allow(clippy::unwrap_used)]

mod toy;

use kvrun_scheduler::{
    AdapterId, AdapterOrder, Failure, LoadFault, Refusal, Residency, Step, What,
};
use toy::{Toy, request, sizes};

/// An adapter that the shard just loaded, and that takes so many pages while it is used.
fn loaded(toy: &mut Toy, pages: u32) -> AdapterId {
    let id = toy.scheduler.adapters_mut().register(10, false, toy.now);
    let orders = toy.scheduler.plan_adapters(toy.now);
    let [AdapterOrder::Load { handle, .. }] = orders[..] else {
        panic!("{orders:?}");
    };
    let digest = format!("digest {}", id.0);
    toy.scheduler
        .adapter_loaded(toy.now, handle, &digest, 10, pages);
    id
}

fn ask_under(toy: &mut Toy, adapter: AdapterId, prompt: u32, answer: u32) -> u64 {
    let mut under = request("t", prompt, answer);
    under.adapter = Some(adapter);
    toy.scheduler.submit(toy.now, under).unwrap()
}

fn placed(step: &Step) -> Vec<u32> {
    step.place.iter().map(|place| place.first).collect()
}

#[test]
fn an_adapter_comes_into_the_highest_pages_with_its_first_row_and_stays() {
    let mut toy = Toy::new(100, 200, 8);
    let id = loaded(&mut toy, 30);
    ask_under(&mut toy, id, 10, 1);
    let step = toy.turn();
    assert_eq!((placed(&step), step.rows[0].pages[0]), (vec![70], 0));
    assert_eq!(step.place[0].adapter, step.admit[0].adapter);
    let other = loaded(&mut toy, 20);
    ask_under(&mut toy, other, 10, 2);
    ask_under(&mut toy, id, 10, 2);
    let step = toy.turn();
    assert_eq!((placed(&step), step.rows.len()), (vec![50], 2));
    assert_eq!(toy.scheduler.load().pages.adapters, 50);
}

#[test]
fn an_adapter_that_nothing_runs_under_makes_room_for_a_sequence_and_one_in_use_does_not() {
    let mut toy = Toy::new(20, 400, 8);
    let (cold, used) = (loaded(&mut toy, 6), loaded(&mut toy, 6));
    ask_under(&mut toy, cold, 10, 1);
    let handle = toy.turn().place[0].adapter;
    ask_under(&mut toy, used, 10, 100);
    assert_eq!(placed(&toy.turn()), [8]);
    toy.ask("t", 16 * 10, 1);
    let steps: Vec<Step> = (0..8).map(|_| toy.turn()).collect();
    let displaced: Vec<u64> = steps
        .iter()
        .flat_map(|step| step.displace.clone())
        .collect();
    let admitted: usize = steps.iter().map(|step| step.admit.len()).sum();
    assert_eq!((displaced, admitted), (vec![handle], 1));
    toy.ask("t", 16 * 15, 1);
    let admitted: usize = (0..8).map(|_| toy.turn().admit.len()).sum();
    assert_eq!((admitted, toy.scheduler.load().pages.adapters), (0, 6));
}

#[test]
fn an_adapter_that_was_displaced_comes_again_where_there_is_room() {
    let mut toy = Toy::new(20, 400, 8);
    let (first, second) = (loaded(&mut toy, 12), loaded(&mut toy, 12));
    ask_under(&mut toy, first, 10, 1);
    assert_eq!(placed(&toy.turn()), [8]);
    ask_under(&mut toy, second, 10, 1);
    let step = toy.turn();
    assert_eq!((placed(&step), step.displace.len()), (vec![8], 1));
    ask_under(&mut toy, first, 10, 1);
    ask_under(&mut toy, second, 10, 1);
    let step = toy.turn();
    assert_eq!(
        (step.rows.len(), step.place[0].adapter),
        (1, step.admit[0].adapter)
    );
    let step = toy.turn();
    assert_eq!(
        (step.rows.len(), step.place[0].adapter),
        (1, step.admit[0].adapter)
    );
}

#[test]
fn running_sequences_grow_into_the_pages_of_a_cold_adapter_before_one_gives_way() {
    let mut toy = Toy::new(30, 400, 8);
    let cold = loaded(&mut toy, 18);
    ask_under(&mut toy, cold, 10, 1);
    toy.turn();
    toy.ask("t", 30, 300);
    assert!(
        toy.turn().displace.is_empty(),
        "it is admitted beside the adapter"
    );
    let displaced: usize = (0..298).map(|_| toy.turn().displace.len()).sum();
    assert_eq!((displaced, toy.scheduler.load().preemptions), (1, 0));
}

#[test]
fn an_adapter_as_large_as_the_pool_is_refused_and_unloaded() {
    let mut toy = Toy::new(20, 400, 8);
    let id = loaded(&mut toy, 20);
    let Residency::Failed { fault, reason } =
        toy.scheduler.adapters().get(id).unwrap().residency.clone()
    else {
        panic!("it was taken");
    };
    assert_eq!(fault, LoadFault::NoRoom);
    assert!(
        reason.contains("takes 20 pages and the pool has 20"),
        "{reason}"
    );
    let orders = toy.scheduler.plan_adapters(toy.now);
    assert!(
        matches!(orders[..], [AdapterOrder::Unload { .. }]),
        "{orders:?}"
    );
    assert!(toy.scheduler.plan_adapters(toy.now).is_empty());
}

#[test]
fn a_request_that_does_not_fit_beside_its_adapter_ends_when_that_is_known() {
    let mut toy = Toy::new(20, 400, 8);
    let id = toy.scheduler.adapters_mut().register(10, false, toy.now);
    let orders = toy.scheduler.plan_adapters(toy.now);
    let [AdapterOrder::Load { handle, .. }] = orders[..] else {
        panic!("{orders:?}");
    };
    let (short, long) = (
        ask_under(&mut toy, id, 10, 1),
        ask_under(&mut toy, id, 16 * 10, 1),
    );
    toy.scheduler
        .adapter_loaded(toy.now, handle, "digest", 10, 10);
    let events = toy.scheduler.take_events();
    let [event] = &events[..] else {
        panic!("{events:?}");
    };
    assert!(
        matches!(&event.what, What::Failed(Failure::Adapter(text)) if text.contains("10 of 20 pages"))
    );
    assert_eq!(
        (event.request, sizes(&toy.turn())),
        (long, vec![(short, 10)])
    );
    let mut under = request("t", 16 * 10, 1);
    under.adapter = Some(id);
    let refused = toy.scheduler.submit(toy.now, under);
    assert_eq!(
        refused,
        Err(Refusal::TooLong {
            asked: 176,
            limit: 160
        })
    );
}
