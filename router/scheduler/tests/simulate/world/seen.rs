//! What happened, so that a simulation in which nothing happens is not taken for a proof.

/// How often the interesting things happened, over all seeds.
#[derive(Debug, Default)]
pub struct Seen {
    pub(super) steps: u64,
    pub(super) ahead: u64,
    pub(super) surplus: u64,
    pub(super) finished: u64,
    pub(super) cancelled: u64,
    pub(super) deadlines: u64,
    pub(super) row_errors: u64,
    pub(super) deaths: u64,
    pub(super) culprits: u64,
    pub(super) replays: u64,
    pub(super) preemptions: u64,
    pub(super) cached_tokens: u64,
    pub(super) stale: u64,
    pub(super) adapter_failures: u64,
    pub(super) evictions: u64,
    pub(super) refusals: u64,
    pub(super) memories: u64,
    pub(super) images: u64,
    pub(super) cached_images: u64,
    pub(super) cached_long: u64,
    pub(super) indivisible: u64,
    pub(super) unanswered_loads: u64,
    pub(super) kept_out: u64,
    pub(super) turns: u64,
    pub(super) right_guesses: u64,
    pub(super) wrong_guesses: u64,
    pub(super) placed: u64,
    pub(super) displaced: u64,
    pub(super) too_large: u64,
}

impl Seen {
    pub fn add(&mut self, other: Self) {
        for (mine, theirs) in self.all().into_iter().zip(other.values()) {
            *mine += theirs;
        }
    }

    /// A simulator in which something never happens proves nothing about it.
    pub fn assert_everything_happened(&self) {
        assert!(self.values().iter().all(|&count| count > 0), "{self:?}");
    }

    fn all(&mut self) -> [&mut u64; 29] {
        [
            &mut self.steps,
            &mut self.ahead,
            &mut self.surplus,
            &mut self.finished,
            &mut self.cancelled,
            &mut self.deadlines,
            &mut self.row_errors,
            &mut self.deaths,
            &mut self.culprits,
            &mut self.replays,
            &mut self.preemptions,
            &mut self.cached_tokens,
            &mut self.stale,
            &mut self.adapter_failures,
            &mut self.evictions,
            &mut self.refusals,
            &mut self.memories,
            &mut self.images,
            &mut self.cached_images,
            &mut self.cached_long,
            &mut self.indivisible,
            &mut self.unanswered_loads,
            &mut self.kept_out,
            &mut self.turns,
            &mut self.right_guesses,
            &mut self.wrong_guesses,
            &mut self.placed,
            &mut self.displaced,
            &mut self.too_large,
        ]
    }

    fn values(&self) -> [u64; 29] {
        [
            self.steps,
            self.ahead,
            self.surplus,
            self.finished,
            self.cancelled,
            self.deadlines,
            self.row_errors,
            self.deaths,
            self.culprits,
            self.replays,
            self.preemptions,
            self.cached_tokens,
            self.stale,
            self.adapter_failures,
            self.evictions,
            self.refusals,
            self.memories,
            self.images,
            self.cached_images,
            self.cached_long,
            self.indivisible,
            self.unanswered_loads,
            self.kept_out,
            self.turns,
            self.right_guesses,
            self.wrong_guesses,
            self.placed,
            self.displaced,
            self.too_large,
        ]
    }
}
