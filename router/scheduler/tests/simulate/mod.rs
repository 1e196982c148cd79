//! The scheduler against a simulated world: random requests, cancels, row errors, shard deaths and hangs, stale and
//! repeated replies, steps in lockstep and overlapped, adapters coming and going, jumps of the clock, small pools. After every event each invariant is
//! recomputed, and every answer must equal the answer alone.
//!
//! `KVRUN_SIM_SEEDS=1000000` runs more seeds, `KVRUN_SIM_SEED=17` runs one and says what happens in it.

mod world;

use kvrun_scheduler::PlantedBug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use world::World;

const SEEDS: u64 = 20_000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs one seed; the text of the first broken invariant otherwise.
fn run(seed: u64, planted: Option<PlantedBug>, told: bool) -> Result<world::Seen, String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| World::new(seed, planted, told).run()));
    outcome.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.unwrap_or_else(|| "panicked".to_owned()))
    })
}

#[test]
fn every_invariant_holds_in_every_seed() {
    if let Some(seed) = number("KVRUN_SIM_SEED") {
        run(seed, None, true).unwrap();
        return;
    }
    let mut seen = world::Seen::default();
    for seed in 0..number("KVRUN_SIM_SEEDS").unwrap_or(SEEDS) {
        match run(seed, None, false) {
            Ok(of_seed) => seen.add(of_seed),
            Err(text) => panic!(
                "seed {seed}: {text}\nrerun: KVRUN_SIM_SEED={seed} cargo test --release -p kvrun-scheduler --lib simulate -- --nocapture"
            ),
        }
    }
    println!("{seen:?}");
    seen.assert_everything_happened();
}

fn is_found(bug: PlantedBug) {
    let found = (0..500).find_map(|seed| Some((seed, run(seed, Some(bug), false).err()?)));
    assert!(found.is_some(), "{bug:?} was planted and nobody noticed");
    println!("{bug:?}: {found:?}");
}

#[test]
fn a_leaked_page_is_found() {
    is_found(PlantedBug::LeakPage);
}

#[test]
fn a_page_published_before_the_shard_answered_is_found() {
    is_found(PlantedBug::PublishUnacked);
}

#[test]
fn a_prefix_shared_across_adapters_is_found() {
    is_found(PlantedBug::KeyWithoutAdapter);
}

#[test]
fn a_prefix_shared_between_long_and_short_is_found() {
    is_found(PlantedBug::KeyWithoutLength);
}

#[test]
fn a_token_from_an_old_epoch_is_found() {
    is_found(PlantedBug::AcceptStale);
}

#[test]
fn a_prefix_shared_across_images_is_found() {
    is_found(PlantedBug::KeyWithoutImages);
}

#[test]
fn a_leaked_memory_is_found() {
    is_found(PlantedBug::LeakMemory);
}

#[test]
fn a_tenant_that_takes_more_than_its_turn_is_found() {
    is_found(PlantedBug::FreePrompts);
}

#[test]
fn a_wrong_guess_taken_for_a_computed_token_is_found() {
    is_found(PlantedBug::TrustGuesses);
}

#[test]
fn an_image_cut_by_a_step_is_found() {
    is_found(PlantedBug::CutImages);
}

#[test]
fn a_token_in_flight_taken_for_a_computed_one_is_found() {
    is_found(PlantedBug::TrustInFlight);
}

#[test]
fn a_row_ahead_that_no_answer_can_hold_is_found() {
    is_found(PlantedBug::Overrun);
}

#[test]
fn a_row_ahead_without_a_page_is_found() {
    is_found(PlantedBug::ForgetPending);
}

#[test]
fn a_row_ahead_of_guesses_is_found() {
    is_found(PlantedBug::GuessAhead);
}

#[test]
fn giving_way_while_a_row_is_in_flight_is_found() {
    is_found(PlantedBug::PreemptInFlight);
}

#[test]
fn a_release_that_no_step_says_is_found() {
    is_found(PlantedBug::ReleaseInFlight);
}

#[test]
fn an_adapter_that_leaves_before_its_last_row_is_found() {
    is_found(PlantedBug::UnholdEarly);
}

#[test]
fn a_death_that_counts_twice_is_found() {
    is_found(PlantedBug::StrikeTwice);
}

#[test]
fn an_adapter_placed_over_the_pages_of_others_is_found() {
    is_found(PlantedBug::PlaceOverOthers);
}

#[test]
fn an_adapter_displaced_under_its_rows_is_found() {
    is_found(PlantedBug::DisplaceInUse);
}

#[test]
fn a_row_before_its_adapter_is_placed_is_found() {
    is_found(PlantedBug::RowsBeforePlacement);
}

#[test]
fn an_adapter_s_pages_used_again_without_a_word_are_found() {
    is_found(PlantedBug::DisplaceUntold);
}

#[test]
fn pages_that_an_unloaded_adapter_keeps_are_found() {
    is_found(PlantedBug::LeakRun);
}

#[test]
fn an_adapter_taken_to_lie_where_it_lay_before_the_shard_died_is_found() {
    is_found(PlantedBug::KeepPlaces);
}
