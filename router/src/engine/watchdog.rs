//! When silence is too long: how much time a step may take, judged by what steps took before.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// No step is called hung before this.
const LEAST: Duration = Duration::from_secs(10);
/// Allowed before anything was measured: the first steps also warm caches up.
const UNKNOWN: Duration = Duration::from_secs(120);
/// Steps that the judgement rests on.
const REMEMBERED: usize = 256;
/// How much longer than usual is too long.
const PATIENCE: u32 = 8;

/// Watches the steps in flight, of which the shards compute the oldest. Time in which this process itself did not run does
/// not count.
#[derive(Debug, Default)]
pub(super) struct Watchdog {
    steps: VecDeque<Duration>,
    /// Slowest time per token of the steps remembered by size; prompts may be far larger than anything before.
    per_token: Duration,
    /// Tokens of the steps in flight, oldest first.
    in_flight: VecDeque<Option<u32>>,
    /// When the shards could begin with the oldest.
    begun: Option<Instant>,
    silent: Duration,
    last_tick: Option<Instant>,
}

impl Watchdog {
    /// A step of `tokens` tokens was sent; `None` when their number does not tell how long it may take.
    pub(super) fn sent(&mut self, now: Instant, tokens: Option<u32>) {
        self.in_flight.push_back(tokens);
        if self.in_flight.len() == 1 {
            self.listen(now);
        }
    }

    /// The oldest step was answered; answers with the time it took, without what it waited behind the one before it.
    pub(super) fn answered(&mut self, now: Instant) -> Duration {
        let (Some(tokens), Some(begun)) = (self.in_flight.pop_front(), self.begun) else {
            return Duration::ZERO;
        };
        let took = now.duration_since(begun);
        self.listen(now);
        let Some(tokens) = tokens else {
            return took;
        };
        if self.steps.len() == REMEMBERED {
            self.steps.pop_front();
        }
        self.steps.push_back(took);
        if tokens > 0 {
            // Forgets slowly, so that one slow step does not blunt the watchdog for ever.
            self.per_token = (self.per_token * 99 / 100).max(took / tokens);
        }
        took
    }

    /// The shards begin with the oldest step now.
    fn listen(&mut self, now: Instant) {
        self.begun = Some(now);
        self.silent = Duration::ZERO;
        self.last_tick = Some(now);
    }

    /// Whether a step is in flight.
    pub(super) fn in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Nothing is in flight any more.
    pub(super) fn rest(&mut self) {
        self.in_flight.clear();
    }

    /// Called every `period`; answers with the silence when it is too long.
    pub(super) fn tick(&mut self, now: Instant, period: Duration) -> Option<Duration> {
        let tokens = *self.in_flight.front()?;
        let since = now.duration_since(self.last_tick.replace(now)?);
        self.silent += since.min(2 * period);
        (self.silent > self.allowance(tokens)).then_some(self.silent)
    }

    fn allowance(&self, tokens: Option<u32>) -> Duration {
        let Some(tokens) = tokens.filter(|_| !self.steps.is_empty()) else {
            return UNKNOWN;
        };
        let mut sorted: Vec<_> = self.steps.iter().copied().collect();
        sorted.sort_unstable();
        let slow = sorted[(sorted.len() - 1) * 99 / 100];
        let by_size = self.per_token.saturating_mul(tokens);
        LEAST.max(slow.max(by_size) * PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(250);

    fn trained() -> (Watchdog, Instant) {
        let (mut dog, start) = (Watchdog::default(), Instant::now());
        for _ in 0..10 {
            dog.sent(start, Some(10));
            dog.answered(start + Duration::from_millis(20));
        }
        (dog, start)
    }

    #[test]
    fn ten_silent_seconds_are_a_hang() {
        let (mut dog, start) = trained();
        dog.sent(start, Some(10));
        let barks: Vec<_> = (1..=60)
            .filter(|&n| dog.tick(start + TICK * n, TICK).is_some())
            .collect();
        assert_eq!(barks.first(), Some(&41));
    }

    #[test]
    fn a_large_prompt_gets_time_by_its_size() {
        let (mut dog, start) = trained();
        dog.sent(start, Some(4000));
        assert!((1..=200).all(|n| dog.tick(start + TICK * n, TICK).is_none()));
    }

    #[test]
    fn a_step_that_looks_at_images_gets_time_and_teaches_nothing() {
        let (mut dog, start) = trained();
        dog.sent(start, None);
        assert!((1..=400).all(|n| dog.tick(start + TICK * n, TICK).is_none()));
        dog.answered(start + TICK * 400);
        dog.sent(start, Some(10));
        assert!((1..=60).any(|n| dog.tick(start + TICK * n, TICK).is_some()));
    }

    #[test]
    fn a_step_sent_ahead_begins_when_the_one_before_it_is_answered() {
        let (mut dog, start) = trained();
        dog.sent(start, Some(10));
        dog.sent(start, Some(10));
        let answered = start + 30 * TICK;
        assert!((1..=30).all(|n| dog.tick(start + TICK * n, TICK).is_none()));
        assert_eq!(dog.answered(answered), 30 * TICK);
        assert!(dog.in_flight());
        let barks: Vec<_> = (1..=400)
            .filter(|&n| dog.tick(answered + TICK * n, TICK).is_some())
            .collect();
        // The step before it took 7.5 s, and eight times that is patience.
        assert_eq!(barks.first(), Some(&241));
        assert_eq!(dog.answered(answered + TICK), TICK);
        assert!(!dog.in_flight());
    }

    #[test]
    fn time_that_this_process_slept_through_does_not_count() {
        let (mut dog, start) = trained();
        dog.sent(start, Some(10));
        assert_eq!(dog.tick(start + Duration::from_secs(3600), TICK), None);
    }

    #[test]
    fn an_idle_engine_is_never_hung() {
        let (mut dog, start) = trained();
        assert_eq!(dog.tick(start + Duration::from_secs(3600), TICK), None);
    }
}
