//! What goes ahead of the outcome of the step in flight, and what waits for it, over a shard that always answers 7.
#![allow(clippy::unwrap_used)]

mod toy;

use kvrun_scheduler::{Acceptance, Failure, Finish, Reply, Step, Time, Violation, What};
use std::sync::Arc;
use toy::{Toy, request, sizes};

/// Sequence, first position, tokens, whether it samples.
fn rows(step: &Step) -> Vec<(u64, u32, u32, bool)> {
    step.rows
        .iter()
        .map(|row| (row.sequence, row.start, row.tokens, row.sample))
        .collect()
}

fn reply(step: &Step) -> Reply {
    Reply {
        epoch: step.epoch,
        number: step.number,
        rows: Vec::new(),
    }
}

#[test]
fn a_row_goes_ahead_at_the_place_of_a_token_that_nobody_knows_yet() {
    let mut toy = Toy::new(100, 200, 8);
    let id = toy.ask("t", 16, 100);
    let first = toy.plan().unwrap();
    let second = toy.ahead().unwrap();
    assert_eq!(rows(&second), [(id, 16, 1, true)]);
    assert_eq!(
        second.rows[0].pages.len(),
        1,
        "it lies on a page of its own"
    );
    assert_eq!((toy.plan(), toy.ahead()), (None, None), "two are in flight");
    toy.answer(&first);
    assert_eq!(toy.plan(), None);
    let third = toy.ahead().unwrap();
    assert_eq!(rows(&third), [(id, 17, 1, true)]);
    toy.answer(&second);
    toy.answer(&third);
    assert_eq!(toy.scheduler.journal(id).unwrap().answer(), [7, 7, 7]);
}

#[test]
fn a_prompt_goes_on_with_its_next_chunk() {
    let mut toy = Toy::new(100, 64, 8);
    let id = toy.ask("t", 130, 2);
    assert_eq!(rows(&toy.plan().unwrap()), [(id, 0, 64, false)]);
    assert_eq!(rows(&toy.ahead().unwrap()), [(id, 64, 64, false)]);
}

#[test]
fn newcomers_join_a_step_ahead() {
    let mut toy = Toy::new(100, 64, 8);
    let old = toy.ask("t", 90, 2);
    toy.plan().unwrap();
    let new = toy.ask("u", 10, 2);
    let step = toy.ahead().unwrap();
    assert_eq!(sizes(&step), [(old, 26), (new, 10)]);
    assert_eq!(step.admit[0].sequence, new);
}

#[test]
fn prompts_do_not_wait_for_a_second_step_without_them() {
    let mut toy = Toy::new(100, 64, 8);
    let old = toy.ask("t", 4, 50);
    toy.turn();
    let new = toy.ask("u", 10, 2);
    let alone = toy.plan().unwrap();
    assert_eq!(sizes(&alone), [(old, 1)]);
    assert_eq!(toy.ahead(), None);
    toy.answer(&alone);
    assert_eq!(sizes(&toy.plan().unwrap()), [(old, 1), (new, 10)]);
    assert_eq!(sizes(&toy.ahead().unwrap()), [(old, 1), (new, 1)]);
}

#[test]
fn no_row_goes_ahead_of_the_last_token_asked_for() {
    let mut toy = Toy::new(100, 200, 8);
    let (short, long) = (toy.ask("t", 4, 2), toy.ask("t", 4, 3));
    let first = toy.plan().unwrap();
    let second = toy.ahead().unwrap();
    assert_eq!(sizes(&second), [(short, 1), (long, 1)]);
    toy.answer(&first);
    let third = toy.ahead().unwrap();
    assert_eq!(sizes(&third), [(long, 1)]);
    toy.answer(&second);
    assert_eq!(toy.ahead(), None, "nothing is left but a release");
    toy.answer(&third);
    let last = toy.plan().unwrap();
    assert_eq!((last.release, last.rows.len()), (vec![short, long], 0));
}

#[test]
fn what_ends_meanwhile_is_released_by_the_next_step_which_may_have_its_pages() {
    let mut toy = Toy::new(2, 200, 8);
    let mut ends = request("t", 20, 12);
    ends.end_tokens = Arc::from([7]);
    let old = toy.scheduler.submit(toy.now, ends).unwrap();
    let first = toy.plan().unwrap();
    let surplus = toy.ahead().unwrap();
    assert_eq!(rows(&surplus), [(old, 20, 1, true)]);
    let new = toy.ask("u", 20, 12);
    toy.answer(&first);
    assert_eq!(toy.scheduler.load().pages.used, 0);
    let next = toy.ahead().unwrap();
    assert_eq!(
        (&next.release[..], sizes(&next)),
        (&[old][..], vec![(new, 20)])
    );
    let mut pages = [first.rows[0].pages.clone(), next.rows[0].pages.clone()];
    pages.iter_mut().for_each(|pages| pages.sort_unstable());
    assert_eq!(pages[0], pages[1]);
    toy.scheduler.take_events();
    toy.answer(&surplus);
    assert_eq!(toy.scheduler.take_events(), [], "its answer is dropped");
    toy.answer(&next);
}

#[test]
fn a_finished_answer_is_as_long_as_in_lockstep() {
    let mut toy = Toy::new(100, 200, 8);
    let id = toy.ask("t", 4, 5);
    let mut flown = vec![toy.plan().unwrap()];
    let mut told = Vec::new();
    while !flown.is_empty() {
        flown.extend(toy.ahead());
        let oldest = flown.remove(0);
        toy.answer(&oldest);
        told.extend(toy.scheduler.take_events());
        flown.extend(toy.plan());
    }
    let tokens = told
        .iter()
        .filter(|event| matches!(event.what, What::Token { .. }));
    assert_eq!(tokens.count(), 5);
    let last = told.last().unwrap();
    assert_eq!(
        (last.request, &last.what),
        (id, &What::Finished(Finish::Length))
    );
}

#[test]
fn nobody_gives_way_while_a_row_of_it_is_in_flight() {
    let mut toy = Toy::new(24, 200, 8);
    let (_, young) = (toy.ask("t", 40, 300), toy.ask("u", 40, 300));
    let mut in_flight = toy.plan().unwrap();
    // Twelve pages each hold 192 tokens; the next of the older one would take a page of the younger.
    while let Some(step) = toy.ahead() {
        let oldest = std::mem::replace(&mut in_flight, step);
        toy.answer(&oldest);
        assert_eq!(toy.scheduler.load().preemptions, 0);
    }
    assert_eq!(toy.scheduler.load().running, 2);
    toy.answer(&in_flight);
    let step = toy.plan().unwrap();
    assert_eq!(
        (step.release, toy.scheduler.load().preemptions),
        (vec![young], 1)
    );
}

#[test]
fn rows_that_may_carry_guesses_wait_for_the_text_to_look_in() {
    let mut toy = Toy::guessing(100, 200, 16, 4);
    for _ in 0..7 {
        toy.ask("t", 4, 50);
    }
    let first = toy.plan().unwrap();
    assert_eq!(toy.ahead(), None);
    toy.ask("t", 4, 50);
    toy.answer(&first);
    toy.turn();
    // Eight rows fill a step up to what is worth guessing for.
    let all = toy.plan().unwrap();
    assert_eq!(all.rows.len(), 8);
    assert_eq!(toy.ahead().unwrap().rows.len(), 8);
}

#[test]
fn a_release_alone_waits_for_the_next_step() {
    let mut toy = Toy::new(100, 200, 8);
    let id = toy.ask("t", 4, 50);
    let first = toy.plan().unwrap();
    toy.scheduler.cancel(toy.now, id);
    assert_eq!(toy.ahead(), None);
    toy.answer(&first);
    assert_eq!(toy.plan().unwrap().release, [id]);
}

#[test]
fn outcomes_come_in_the_order_of_the_steps() {
    let mut toy = Toy::new(100, 200, 8);
    toy.ask("t", 4, 50);
    let first = toy.plan().unwrap();
    let second = toy.ahead().unwrap();
    let early = toy.scheduler.commit(toy.now, &reply(&second));
    let (got, expected) = (2, 1);
    assert_eq!(early, Err(Violation::Number { got, expected }));
    toy.answer(&first);
    let again = toy.scheduler.commit(toy.now, &reply(&first));
    assert_eq!(again, Ok(Acceptance::Stale));
    toy.answer(&second);
}

#[test]
fn a_death_counts_once_for_a_request_with_two_rows_in_flight() {
    let mut toy = Toy::new(100, 200, 8);
    let id = toy.ask("t", 4, 50);
    for death in 1..=3 {
        toy.plan().unwrap();
        assert_eq!(toy.ahead().is_some(), death < 3, "a suspect goes alone");
        toy.scheduler.lose_epoch(toy.now);
        toy.begin(100);
        let failed = toy
            .scheduler
            .take_events()
            .into_iter()
            .any(|event| event.request == id && event.what == What::Failed(Failure::Deadly));
        assert_eq!(failed, death == 3);
    }
}

#[test]
fn prompts_are_cut_as_in_lockstep() {
    let chunks = |overlaps: bool| {
        let mut toy = Toy::new(1000, 512, 8);
        let stream = toy.ask("t", 4, 1000);
        let mut flown = vec![toy.plan().unwrap()];
        let (mut sizes_seen, mut steps) = (Vec::new(), 0);
        while steps < 40 {
            if overlaps {
                flown.extend(toy.ahead());
            }
            let oldest = flown.remove(0);
            let prompt: u32 = oldest.rows.iter().map(|row| row.tokens).sum::<u32>() - 1;
            // Ten milliseconds for the stream, and a quarter of one for each prompt token.
            toy.now += Time::from_micros(250) * prompt;
            toy.answer(&oldest);
            steps += 1;
            if steps == 6 {
                toy.ask("u", 4000, 1);
            }
            if prompt > 0 && steps > 30 {
                sizes_seen.push(prompt);
            }
            flown.extend(toy.plan());
        }
        assert!(toy.scheduler.journal(stream).is_some());
        sizes_seen
    };
    let (lockstep, overlapped) = (chunks(false), chunks(true));
    assert!(
        lockstep.iter().all(|&tokens| (26..=29).contains(&tokens)),
        "{lockstep:?}"
    );
    assert!(
        overlapped.iter().all(|&tokens| (26..=29).contains(&tokens)),
        "{overlapped:?}"
    );
    assert_eq!((lockstep.len(), overlapped.len()), (10, 10));
}
