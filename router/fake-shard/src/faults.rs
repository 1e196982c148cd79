//! Faults that a test switches on while the shard runs.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What goes wrong with one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The shard dies before it answers.
    Die,
    /// The shard never answers again.
    Hang,
    /// The step finds no memory: its epoch ends, and the shard lives.
    OutOfMemory,
    /// This one outcome is lost; later steps are answered.
    DropReply,
    /// The outcome is sent twice.
    DuplicateReply,
    /// An outcome of the epoch before comes first, with other tokens.
    StaleReply,
}

/// What goes wrong with rows whose sequence holds a marked token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mark {
    /// The row alone fails with this text.
    RowError(String),
    /// The shard dies whenever such a row is computed.
    Poison,
}

/// The switches. All of them may be turned at any time.
#[derive(Debug, Default)]
pub struct Faults {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    steps_seen: u64,
    planned: HashMap<u64, Fault>,
    marks: HashMap<u32, Mark>,
    step_delay: Duration,
    load_delay: Duration,
    refused_loads: u32,
}

impl Faults {
    /// Plans a fault for the `nth` step from now, 1 being the next; epochs do not reset the count.
    pub fn after_steps(&self, nth: u64, fault: Fault) {
        let mut inner = self.lock();
        let at = inner.steps_seen + nth;
        inner.planned.insert(at, fault);
    }

    /// Marks a token id.
    pub fn mark(&self, token: u32, mark: Mark) {
        self.lock().marks.insert(token, mark);
    }

    /// Takes every mark and planned fault back; the delays stay.
    pub fn clear(&self) {
        let mut inner = self.lock();
        inner.planned.clear();
        inner.marks.clear();
    }

    /// Every step takes at least this long.
    pub fn step_delay(&self, delay: Duration) {
        self.lock().step_delay = delay;
    }

    /// Every adapter load takes at least this long.
    pub fn load_delay(&self, delay: Duration) {
        self.lock().load_delay = delay;
    }

    /// The next `count` adapter loads are answered UNAVAILABLE, while the shard serves on.
    pub fn refuse_loads(&self, count: u32) {
        self.lock().refused_loads = count;
    }

    /// Steps that arrived so far, over all epochs.
    pub fn steps_seen(&self) -> u64 {
        self.lock().steps_seen
    }

    pub(crate) fn next_step(&self) -> (Option<Fault>, Duration) {
        let mut inner = self.lock();
        inner.steps_seen += 1;
        let now = inner.steps_seen;
        (inner.planned.remove(&now), inner.step_delay)
    }

    pub(crate) fn loading(&self) -> Duration {
        self.lock().load_delay
    }

    /// Whether this load is refused.
    pub(crate) fn refuses_load(&self) -> bool {
        let mut inner = self.lock();
        let left = inner.refused_loads.checked_sub(1);
        inner.refused_loads = left.unwrap_or(0);
        left.is_some()
    }

    pub(crate) fn mark_of(&self, tokens: &[u32]) -> Option<Mark> {
        let inner = self.lock();
        if inner.marks.is_empty() {
            return None;
        }
        tokens.iter().find_map(|id| inner.marks.get(id).cloned())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
