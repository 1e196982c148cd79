//! Which adapters lie on the shard: loads on demand, leaves, evictions, and the bytes they take by their true ranks.
//!
//! States seen from outside: known -> loading -> ready -> draining -> gone. Loads and unloads are orders to the engine;
//! nothing here waits, and a request waits only for its own adapter.

mod audit;
mod places;
mod residency;

use crate::pages::Run;
use crate::{AdapterId, Time};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Shard deaths during its load, in a row, that make an adapter unfit.
const DEADLY_LOADS: u32 = 3;

/// What the engine shall do; each handle is used once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterOrder {
    /// Load on every rank, then report `loaded` or `load_failed`.
    Load {
        /// Whose folder.
        adapter: AdapterId,
        /// The shard's name for it.
        handle: u64,
    },
    /// Unload on every rank, then report `unloaded`.
    Unload {
        /// The shard's name for it.
        handle: u64,
    },
}

/// Why an adapter is not on the shard although it was wanted there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadFault {
    /// It does not suit the model, or killed the shard.
    Unfit,
    /// No such folder.
    Missing,
    /// Its bytes do not fit.
    NoRoom,
    /// The shard gave no verdict; the load is tried again a few times.
    Unanswered,
}

/// Where an adapter stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Residency {
    /// Not on the shard.
    Absent,
    /// The shard reads it.
    Loading {
        /// The shard's name for it.
        handle: u64,
    },
    /// On the shard.
    Resident {
        /// The shard's name for it.
        handle: u64,
    },
    /// The shard frees it; its bytes still count.
    Unloading {
        /// The shard's name for it.
        handle: u64,
    },
    /// The last load failed; stays so until it is asked for again.
    Failed {
        /// What kind of failure.
        fault: LoadFault,
        /// The shard's words.
        reason: String,
    },
}

/// One registered adapter.
#[derive(Debug, Clone)]
pub struct AdapterView {
    /// Where it stands.
    pub residency: Residency,
    /// Content digest of the last load.
    pub digest: Option<Arc<str>>,
    /// Bytes on the fullest rank; an estimate before the first load.
    pub bytes: u64,
    /// Pages of the pool that it lies in while it is used, on the rank that wants most; 0 = none, or not known yet.
    pub pages: u32,
    /// Open requests.
    pub users: u32,
    /// Exempt from eviction.
    pub pinned: bool,
    /// Refuses new requests, leaves when the last one ends.
    pub leaving: bool,
    /// Sequences that the shard may still hold under it.
    held: u32,
    /// Sequences under it that run.
    running: u32,
    /// Where it lies now.
    place: Option<Run>,
    /// Takes no further rows for waiting requests, so that another adapter gets its turn.
    yielding: bool,
    used_at: Time,
    resident_since: Time,
    deadly_loads: u32,
    /// Loads in a row that the shard gave no verdict on.
    unanswered: u32,
    /// Not loaded again before this moment.
    rests_until: Time,
}

/// All registered adapters.
#[derive(Debug, Default)]
pub struct Adapters {
    all: BTreeMap<AdapterId, AdapterView>,
    /// Absent adapters that somebody wants.
    wanted: BTreeSet<AdapterId>,
    /// Nobody asked for them yet; they are wanted as long as none has to make room for another.
    early: BTreeSet<AdapterId>,
    leaving: BTreeSet<AdapterId>,
    by_handle: BTreeMap<u64, AdapterId>,
    /// Handles that the shard loaded and nobody can use.
    useless: BTreeMap<u64, places::Useless>,
    capacity: u64,
    serving: bool,
    last_id: u64,
    last_handle: u64,
}

impl Adapters {
    /// Registers an adapter and wants it loaded; `estimate` is its bytes as far as known.
    pub fn register(&mut self, estimate: u64, pinned: bool, now: Time) -> AdapterId {
        self.last_id += 1;
        let id = AdapterId(self.last_id);
        let view = AdapterView {
            residency: Residency::Absent,
            digest: None,
            bytes: estimate,
            pages: 0,
            users: 0,
            pinned,
            leaving: false,
            held: 0,
            running: 0,
            place: None,
            yielding: false,
            used_at: now,
            resident_since: now,
            deadly_loads: 0,
            unanswered: 0,
            rests_until: Time::ZERO,
        };
        self.all.insert(id, view);
        self.wanted.insert(id);
        id
    }

    /// Registers an adapter to load before anybody asks for it, if there is room; otherwise its first request wants it.
    pub fn register_early(&mut self, estimate: u64, pinned: bool, now: Time) -> AdapterId {
        let id = self.register(estimate, pinned, now);
        if !pinned {
            self.early.insert(id);
        }
        id
    }

    /// Whether it is on its way to the shard.
    pub fn is_coming(&self, id: AdapterId) -> bool {
        let loading = |view: &AdapterView| matches!(view.residency, Residency::Loading { .. });
        self.wanted.contains(&id) || self.get(id).is_some_and(loading)
    }

    /// One adapter.
    pub fn get(&self, id: AdapterId) -> Option<&AdapterView> {
        self.all.get(&id)
    }

    /// The adapter that a load was ordered for under this handle.
    pub fn of_handle(&self, handle: u64) -> Option<AdapterId> {
        self.by_handle.get(&handle).copied()
    }

    /// Every adapter.
    pub fn iter(&self) -> impl Iterator<Item = (AdapterId, &AdapterView)> {
        self.all.iter().map(|(&id, view)| (id, view))
    }

    /// Wants an absent or failed adapter on the shard (again).
    pub fn want(&mut self, id: AdapterId) {
        self.early.remove(&id);
        if let Some(view) = self.all.get_mut(&id) {
            if matches!(view.residency, Residency::Failed { .. }) {
                view.residency = Residency::Absent;
            }
            if view.residency == Residency::Absent {
                self.wanted.insert(id);
            }
        }
    }

    /// Exempts from eviction, or no longer; false when unknown.
    pub fn pin(&mut self, id: AdapterId, pinned: bool) -> bool {
        self.all
            .get_mut(&id)
            .map(|view| view.pinned = pinned)
            .is_some()
    }

    /// Refuses new requests from now on; gone when the last one ends. False when unknown.
    pub fn leave(&mut self, id: AdapterId) -> bool {
        let Some(view) = self.all.get_mut(&id) else {
            return false;
        };
        view.leaving = true;
        self.leaving.insert(id);
        true
    }

    /// Whether a new request may name it.
    pub fn accepts(&self, id: AdapterId) -> bool {
        self.all.get(&id).is_some_and(|view| {
            !view.leaving && !matches!(view.residency, Residency::Failed { .. })
        })
    }

    pub(crate) fn open(&mut self, id: AdapterId, now: Time) {
        if let Some(view) = self.all.get_mut(&id) {
            view.users += 1;
            view.used_at = now;
            self.early.remove(&id);
            if view.residency == Residency::Absent {
                self.wanted.insert(id);
            }
        }
    }

    pub(crate) fn close(&mut self, id: AdapterId, now: Time) {
        if let Some(view) = self.all.get_mut(&id) {
            view.users -= 1;
            view.used_at = now;
        }
    }

    /// A sequence under it is about to be admitted on the shard.
    pub(crate) fn hold(&mut self, id: AdapterId) {
        if let Some(view) = self.all.get_mut(&id) {
            view.held += 1;
            view.running += 1;
        }
    }

    /// Such a sequence is about to be released.
    pub(crate) fn rest(&mut self, id: AdapterId) {
        if let Some(view) = self.all.get_mut(&id) {
            view.running -= 1;
        }
    }

    /// The shard answered the step that released such a sequence.
    pub(crate) fn unhold(&mut self, id: AdapterId) {
        if let Some(view) = self.all.get_mut(&id) {
            view.held -= 1;
        }
    }

    /// Whether waiting requests may be admitted under it.
    pub(crate) fn usable(&self, id: AdapterId) -> bool {
        self.all.get(&id).is_some_and(|view| {
            matches!(view.residency, Residency::Resident { .. }) && !view.yielding
        })
    }

    /// The shard's name and the digest of a resident adapter.
    pub(crate) fn resident(&self, id: AdapterId) -> Option<(u64, &str)> {
        let view = self.all.get(&id)?;
        match (&view.residency, &view.digest) {
            (Residency::Resident { handle }, Some(digest)) => Some((*handle, digest)),
            _ => None,
        }
    }

    /// A load succeeded. Answers with the adapter, and whether its content is another than the last time.
    pub(crate) fn loaded(
        &mut self,
        handle: u64,
        digest: &str,
        (bytes, pages): (u64, u32),
        now: Time,
    ) -> Option<(AdapterId, bool)> {
        let id = *self.by_handle.get(&handle)?;
        let view = self.all.get_mut(&id)?;
        if view.residency != (Residency::Loading { handle }) {
            return None;
        }
        let changed = view.digest.as_deref().is_some_and(|old| old != digest);
        view.residency = Residency::Resident { handle };
        view.digest = Some(Arc::from(digest));
        view.bytes = bytes;
        view.pages = pages;
        view.resident_since = now;
        view.deadly_loads = 0;
        view.unanswered = 0;
        Some((id, changed))
    }

    /// An unload is done.
    pub(crate) fn unloaded(&mut self, handle: u64) {
        self.useless.remove(&handle);
        let Some(id) = self.by_handle.remove(&handle) else {
            return;
        };
        if let Some(view) = self.all.get_mut(&id) {
            view.residency = Residency::Absent;
            view.yielding = false;
            if view.users > 0 {
                self.wanted.insert(id);
            }
        }
    }

    /// The shard's memory is gone. Answers with adapters given up because their loads keep killing it.
    pub(crate) fn epoch_lost(&mut self) -> Vec<AdapterId> {
        self.serving = false;
        self.by_handle.clear();
        self.useless.clear();
        let mut deadly = Vec::new();
        for (&id, view) in &mut self.all {
            view.held = 0;
            view.running = 0;
            view.place = None;
            view.yielding = false;
            let loading = matches!(view.residency, Residency::Loading { .. });
            match view.residency {
                Residency::Failed { .. } | Residency::Absent => continue,
                Residency::Loading { .. } | Residency::Resident { .. } => {
                    self.wanted.insert(id);
                }
                Residency::Unloading { .. } if view.users > 0 => {
                    self.wanted.insert(id);
                }
                Residency::Unloading { .. } => {}
            }
            view.residency = Residency::Absent;
            view.deadly_loads += u32::from(loading);
            if view.deadly_loads >= DEADLY_LOADS {
                let reason =
                    format!("the shard died {DEADLY_LOADS} times while it loaded this adapter");
                view.residency = Residency::Failed {
                    fault: LoadFault::Unfit,
                    reason,
                };
                view.deadly_loads = 0;
                self.wanted.remove(&id);
                deadly.push(id);
            }
        }
        deadly
    }

    /// A new epoch holds nothing yet and has room for `capacity` bytes.
    pub(crate) fn begin(&mut self, capacity: u64) {
        self.capacity = capacity;
        self.serving = true;
    }

    /// Bytes taken on the shard, loads and unloads under way included.
    pub fn taken(&self) -> u64 {
        let useless: u64 = self.useless.values().map(|useless| useless.bytes).sum();
        useless
            + self.bytes_of(|view| {
                !matches!(view.residency, Residency::Absent | Residency::Failed { .. })
            })
    }

    /// Bytes of the adapters that count.
    fn bytes_of(&self, counts: impl Fn(&AdapterView) -> bool) -> u64 {
        let views = self.all.values().filter(|view| counts(view));
        views.map(|view| view.bytes).sum()
    }
}
