//! What the engine measures. Handles are looked up once: a turn has no time for registries.

use std::time::Duration;

use kvrun_scheduler::Load;
use metrics::{Counter, Histogram, counter, histogram};

use crate::metrics as names;

pub(super) struct Meters {
    gap: Histogram,
    hidden: Histogram,
    transport: Histogram,
    step: Histogram,
    forward: Histogram,
    sent: [Counter; 2],
    answered: [Counter; 2],
    lost: [Counter; 2],
    preemptions: Counter,
    replays: Counter,
    guessed: Counter,
    guessed_right: Counter,
    pub(super) failed_rows: Counter,
    pub(super) deadly: Counter,
}

/// Whether a step computes prompts or only decodes, as the `method` label says it.
fn by_method(name: &'static str) -> [Counter; 2] {
    ["prefill", "decode"].map(|method| counter!(name, "method" => method))
}

impl Meters {
    pub(super) fn new() -> Self {
        Self {
            gap: histogram!(names::ROUTER_GAP),
            hidden: histogram!(names::ROUTER_HIDDEN),
            transport: histogram!(names::STEP_TRANSPORT),
            step: histogram!(names::BATCH_DURATION),
            forward: histogram!(names::FORWARD_DURATION),
            sent: by_method(names::BATCH_COUNT),
            answered: by_method(names::BATCH_SUCCESS),
            lost: by_method(names::BATCH_FAILURE),
            preemptions: counter!(names::PREEMPTIONS),
            replays: counter!(names::REPLAYED_REQUESTS),
            guessed: counter!(names::GUESSED),
            guessed_right: counter!(names::GUESSED_RIGHT),
            failed_rows: counter!(names::FAILED_ROWS),
            deadly: counter!(names::POISON),
        }
    }

    /// The shards waited so long for the next step.
    pub(super) fn gap(&self, time: Duration) {
        self.gap.record(time.as_secs_f64());
    }

    /// The next step came so long after an outcome, while the shards computed the one between.
    pub(super) fn hidden(&self, time: Duration) {
        self.hidden.record(time.as_secs_f64());
    }

    pub(super) fn sent(&self, decodes: bool) {
        self.sent[usize::from(decodes)].increment(1);
    }

    pub(super) fn lost(&self, decodes: bool) {
        self.lost[usize::from(decodes)].increment(1);
    }

    /// A step took `time`, of which the shard says it computed for `computed`, in the model for `forward`.
    pub(super) fn answered(
        &self,
        decodes: bool,
        time: Duration,
        computed: Duration,
        forward: Duration,
    ) {
        self.answered[usize::from(decodes)].increment(1);
        self.step.record(time.as_secs_f64());
        self.forward.record(forward.as_secs_f64());
        self.transport
            .record(time.saturating_sub(computed).as_secs_f64());
    }

    pub(super) fn load(&self, load: &Load) {
        self.preemptions.absolute(load.preemptions);
        self.replays.absolute(load.replays);
        self.guessed.absolute(load.guessed.tokens);
        self.guessed_right.absolute(load.guessed.right);
    }
}
